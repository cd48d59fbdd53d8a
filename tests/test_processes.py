"""The worker exits even if a thread hangs, and leaves no processes behind."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import have_ended
from tests.support.tiny import ROOT

EXIT = """
import time
from worker import processes
from worker.errors import ConfigurationError, EngineDiedError
processes.EXIT_SECONDS = 0.3
try:
    with processes.exit_soon_after():
        {statement}
except BaseException:
    pass
time.sleep({seconds})
"""


def run(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        pytest.param("pass", 0, id="end"),
        pytest.param("raise EngineDiedError", 1, id="death"),
        pytest.param("raise LookupError", 1, id="defect"),
        pytest.param("raise SystemExit(0)", 0, id="stop"),
        pytest.param("raise SystemExit('text')", 1, id="a library ends the process"),
    ],
)
def test_a_thread_that_hangs_does_not_delay_the_exit(statement: str, code: int) -> None:
    began = time.monotonic()
    assert run(EXIT.format(statement=statement, seconds=50)) == code
    assert time.monotonic() - began < 30


def test_a_worker_with_wrong_settings_goes_on_to_report_them() -> None:
    began = time.monotonic()
    assert run(EXIT.format(statement="raise ConfigurationError", seconds=1)) == 0
    assert time.monotonic() - began >= 1


TWICE = """
import os, sys, threading, time
from worker import processes
end = os._exit

def slow(code):
    # As coverage does, which writes its data first.
    print(code, flush=True)
    time.sleep(0.5)
    end(code)

os._exit = slow
threading.Thread(target=processes.exit_now, args=(3,)).start()
time.sleep(0.1)
processes.exit_now(4)
"""


def test_only_one_thread_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"3\n")


KILLED = """
import multiprocessing, time
from worker import processes
with processes.children_end_with_this():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
    child.start()
print(child.pid, flush=True)
time.sleep(300)
"""


def test_a_killed_worker_leaves_no_engine_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        engine = psutil.Process(int(worker.stdout.readline()))
        worker.kill()
        worker.wait()
        assert have_ended([engine])


def test_a_signal_for_the_workers_group_does_not_reach_the_engine() -> None:
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as worker:
        assert worker.stdout is not None
        engine = psutil.Process(int(worker.stdout.readline()))
        try:
            assert os.getpgid(worker.pid) == worker.pid
            while os.getpgid(engine.pid) == worker.pid:
                time.sleep(0.01)
        finally:
            worker.kill()


ORPHAN = """
import subprocess, sys
from worker import processes
processes.adopt_orphans()
child = subprocess.Popen(
    [sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '300']).pid, flush=True); input()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
)
orphan = child.stdout.readline().strip()
child.kill()
child.wait()
processes.end_all()
print(orphan)
"""


def test_processes_whose_parent_has_ended_are_ended_too() -> None:
    command = [sys.executable, "-c", ORPHAN]
    orphan = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert not psutil.pid_exists(orphan) or have_ended([psutil.Process(orphan)])
