"""Child processes: the worker's own programs, and everything else that it has started."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil

from worker.errors import ConfigurationError

END_SECONDS = 2.0
EXIT_SECONDS = 2.5
"""Time for an orderly exit, once no caller waits for an answer any more."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_exiting = threading.Lock()
_children_end_with_parent = False
_parent = 0


def start(module: str, *arguments: str, environ: Mapping[str, str], **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package in a process with the environment `environ`. It works from any folder."""
    return subprocess.Popen(  # noqa: S603 - our own code
        [sys.executable, "-m", module, *arguments],
        env={**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        **options,
    )


def end_all(seconds: float = END_SECONDS) -> None:
    """End all child processes and theirs: the engine's, and the SDK's ping process. Wait at most so long for them."""
    psutil.wait_procs(kill_all(), timeout=seconds)


def kill_all() -> list[psutil.Process]:
    """Kill all child processes and theirs, and return them.

    Without a wait: it would take the exit codes, and `multiprocessing` would believe that its processes are running.
    """
    children = [child for child in psutil.Process().children(recursive=True) if not _is_tracker(child)]
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    return children


def _is_tracker(process: psutil.Process) -> bool:
    """Return whether a process is a resource tracker of Python: it removes shared memory and ends by itself."""
    try:
        return any("resource_tracker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent ends, so that `end_all` finds them. Works on Linux only."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def children_end_with_this() -> Iterator[None]:
    """The kernel kills processes that are forked within the block when the thread that forked them ends.

    Otherwise a killed worker would leave its engine's processes behind, with their memory and their ports.
    """
    global _children_end_with_parent
    _children_end_with_parent = True
    try:
        yield
    finally:
        _children_end_with_parent = False


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Signals to the parent's group, such as Ctrl-C, no longer reach it: the parent ends it once requests have ended.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):
        os.setpgid(0, 0)


def _before_fork() -> None:
    global _parent
    _parent = os.getpid()


def _after_fork() -> None:
    if _children_end_with_parent:
        end_with_parent()
        if os.getppid() != _parent:
            # The parent has ended already.
            os._exit(1)


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _prctl(option: int, value: int) -> None:
    """Set a property of this process. Works on Linux only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


@contextmanager
def exit_soon_after() -> Iterator[None]:
    """End this process within seconds after the block, even if a thread hangs.

    A `ConfigurationError` does not count: the worker goes on to report it to its callers.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except SystemExit as error:
        _exit_later(code_of(error))
        raise
    except BaseException:
        _exit_later(1)
        raise
    _exit_later(0)


def code_of(error: SystemExit) -> int:
    """Return the exit code that Python would end with. A library may have raised the error with a text."""
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def exit_now(code: int) -> NoReturn:
    """End this process and all its children, without waiting for threads. The first thread that calls this decides."""
    _exiting.acquire()
    end_all()
    os._exit(code)


def _exit_later(code: int) -> None:
    timer = threading.Timer(EXIT_SECONDS, exit_now, (code,))
    timer.daemon = True
    timer.start()
