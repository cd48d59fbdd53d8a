"""A worker as a child process, killed together with all of its own children."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self


class WorkerProcess:
    """A command in a process group of its own. Leaving the context kills the whole group.

    Killing the command alone is not enough: the SDK pings from a child process that outlives its parent.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | int | None = None
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            process_group=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code: 128 plus the signal's number after a signal, as in a shell."""
        code = self._process.wait(timeout)
        return code if code >= 0 else 128 - code
