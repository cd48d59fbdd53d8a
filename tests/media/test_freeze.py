"""A worker that is frozen while a file is decoded."""

import subprocess
import sys
import time

import psutil

from tests.support.tiny import ROOT

LIMIT_SECONDS = 2.0
SCRIPT = f"""
from worker.media.checks import Limit
from worker.media.pool import Process

process = Process(1 << 16, [])
process.begin(b"x", Limit("SOME_SETTING", {LIMIT_SECONDS}))
print("begun", flush=True)
input()
print("asks", flush=True)
print(process.request("ready"), flush=True)
process.close()
"""


def test_the_time_in_which_the_worker_was_frozen_does_not_count_for_the_decoder() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        (decoder,) = psutil.Process(worker.pid).children()
        # It answers only some time after the worker was resumed.
        decoder.suspend()
        worker.stdin.write("\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "asks\n"
        process = psutil.Process(worker.pid)
        process.suspend()
        time.sleep(LIMIT_SECONDS + 0.5)
        process.resume()
        time.sleep(0.3)
        decoder.resume()
        assert worker.stdout.readline() == "True\n"
