"""The worker's own programs, which run beside it, and whatever else it has started."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from worker.errors import ConfigurationError, StartupError

LAST_WORDS_SECONDS = 1.5
"""For telling callers that their requests were ended."""
END_SECONDS = 2.0
LEAVE_SECONDS = 2.5
"""For closing everything in order, once there is nobody left to be answered."""
PR_SET_CHILD_SUBREAPER = 36


def start(module: str, *arguments: str, environ: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package, wherever the worker was started, with `environ` for its environment."""
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-m", module, *arguments],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )


def end_all() -> None:
    """End every process that has been started, and all that they have: an engine's, and the SDK's that pings."""
    children = [child for child in psutil.Process().children(recursive=True) if not _is_tracker(child)]
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=END_SECONDS)


def _is_tracker(process: psutil.Process) -> bool:
    """Tell whether a process is one of Python's that remove shared memory once nobody is left, and then end."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def adopt_orphans() -> None:
    """Have what a child leaves behind become this process's own, so that `end_all` finds it. Only Linux knows how."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@contextmanager
def leaving_soon() -> Iterator[None]:
    """After the block, end this process within seconds, also where a thread waits for something that never comes.

    A mistake in the settings is no reason to leave: there is still somebody to be told.
    """
    code = 1
    try:
        yield
        code = 0
    except ConfigurationError:
        code = -1
        raise
    except StartupError as error:
        code = error.exit_code
        raise
    finally:
        if code >= 0:
            timer = threading.Timer(LEAVE_SECONDS, _leave, [code])
            timer.daemon = True
            timer.start()


def _leave(code: int) -> None:
    end_all()
    os._exit(code)
