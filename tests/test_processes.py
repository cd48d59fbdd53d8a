"""That a worker leaves, whatever hangs, and leaves nothing behind."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.support.tiny import ROOT

LEAVE = """
import threading, time
from worker import processes as program
from worker.errors import ConfigurationError, EngineDiedError
program.LEAVE_SECONDS = 0.3
try:
    with program.leaving_soon():
        {what}
except Exception:
    pass
time.sleep({seconds})
"""


def run(program: str) -> int:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("what", "code"),
    [("pass", 0), ("raise EngineDiedError", 1), ("raise LookupError", 1)],
    ids=["end", "death", "defect"],
)
def test_whatever_hangs_holds_up_no_exit(what: str, code: int) -> None:
    began = time.monotonic()
    assert run(LEAVE.format(what=what, seconds=50)) == code
    assert time.monotonic() - began < 30


def test_a_worker_that_has_to_say_what_is_wrong_stays() -> None:
    began = time.monotonic()
    assert run(LEAVE.format(what="raise ConfigurationError", seconds=1)) == 0
    assert time.monotonic() - began >= 1


ORPHAN = """
import subprocess, sys
from worker import processes as program
program.adopt_orphans()
child = subprocess.Popen(
    [sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '300']).pid, flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
orphan = child.stdout.readline().strip()
child.kill()
child.wait()
program.end_all()
print(orphan)
"""


def test_what_a_dead_child_leaves_behind_is_ended() -> None:
    command = [sys.executable, "-c", ORPHAN]
    orphan = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
