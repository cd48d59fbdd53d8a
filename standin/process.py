"""A worker as a child process that leaves nothing behind."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self


class WorkerProcess:
    """The command in a process group of its own, which is killed as a whole when the context ends.

    The SDK pings from a process that outlives its parent; ending the worker alone is not enough.
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
        """The exit code once the worker has ended; 128 and the signal's number after a signal, as shells count."""
        code = self._process.wait(timeout)
        return code if code >= 0 else 128 - code
