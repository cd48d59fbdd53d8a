"""Freezes a worker with all its processes, as FlashBoot does."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Freeze a process and all its descendants within the block."""
    family = [psutil.Process(pid)]
    family[0].suspend()
    # It starts no more processes now.
    family += family[0].children(recursive=True)
    for process in family[1:]:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(family):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
