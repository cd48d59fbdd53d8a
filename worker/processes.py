"""Child processes: the worker's own programs, and everything else that it has started."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from worker.errors import ConfigurationError

END_SECONDS = 2.0
EXIT_SECONDS = 2.5
"""Time for an orderly exit, once no caller waits for an answer any more."""
PR_SET_CHILD_SUBREAPER = 36


def start(module: str, *arguments: str, environ: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package in a process with the environment `environ`. It works from any folder."""
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-m", module, *arguments],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )


def end_all() -> None:
    """End all child processes and theirs: the engine's, and the SDK's ping process."""
    children = [child for child in psutil.Process().children(recursive=True) if not _is_tracker(child)]
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=END_SECONDS)


def _is_tracker(process: psutil.Process) -> bool:
    """Return whether a process is a resource tracker of Python: it removes shared memory and ends by itself."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent ends, so that `end_all` finds them. Works on Linux only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def exit_soon_after() -> Iterator[None]:
    """End this process within seconds after the block, even if a thread hangs.

    A `ConfigurationError` does not count: the worker goes on to report it to its callers.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except BaseException:
        _exit_later(1)
        raise
    _exit_later(0)


def _exit_later(code: int) -> None:
    def exit_now() -> None:
        end_all()
        os._exit(code)

    timer = threading.Timer(EXIT_SECONDS, exit_now)
    timer.daemon = True
    timer.start()
