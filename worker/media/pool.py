"""The processes that decode media: each serves one file at a time, and can be killed at any time."""

import asyncio
import json
import mmap
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from worker import processes, threads
from worker.errors import MediaBusyError, MediaError, MediaTooLargeError
from worker.media.checks import Limit
from worker.memory import Account
from worker.threads import Result

START_SECONDS = 30.0
STEP_SECONDS = 0.5
"""How long one wait for a reply is. If the worker is frozen meanwhile, no more than that counts."""
LARGE_BYTES = 64 << 20
"""Shared memory beyond this is freed after each use."""
KEPT_BYTES = 256 << 20
"""A process that still holds more memory after a file is ended."""
PATIENCE_SECONDS = 0.25
"""How long media wait for a process that is in use before they get another one."""
MORE = 4
"""How many times as many processes there may be then."""
ERRORS: dict[str | None, type[MediaError]] = {error.__name__: error for error in (MediaError, MediaTooLargeError)}
ENVIRONMENT = {
    # One heap for all threads: each further heap takes address space.
    "MALLOC_ARENA_MAX": "1",
    # Keep up to 64 MB for the next file: getting memory from the kernel takes longer than decoding a photograph.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "OPENCV_LOG_LEVEL": "OFF",
    # FFmpeg must not take a file for a playlist or a description of a network stream.
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": "format_whitelist;mov,mp4,matroska,webm,avi,gif",
}
"""The whole environment of the processes. The worker's own contains secrets."""

DAMAGED = "it cannot be decoded: the file is truncated or damaged"


class Process:
    """One decoder process (`decoder.py`), and the memory that it shares with this one."""

    def __init__(self, memory_bytes: int, modules: Iterable[str]) -> None:
        ours, theirs = socket.socketpair()
        descriptor = os.memfd_create("media")
        os.ftruncate(descriptor, memory_bytes)
        self.memory = mmap.mmap(descriptor, 0)
        descriptors = (theirs.fileno(), descriptor)
        with theirs, os.fdopen(descriptor):
            self._popen = processes.start(
                "worker.media.decoder",
                *map(str, descriptors),
                ",".join(modules),
                environ=ENVIRONMENT,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._left = START_SECONDS
        """How many seconds replies may still take."""
        self._limit: Limit | None = None
        self._used = 0
        self._is_killed = False

    @property
    def is_alive(self) -> bool:
        """Whether it can decode."""
        return not self._is_killed and self._popen.poll() is None

    @property
    def is_usable(self) -> bool:
        """Whether it can decode another file: it is alive, and has freed the memory for the last one."""
        with suppress(OSError, ValueError):
            resident, shared = Path(f"/proc/{self._popen.pid}/statm").read_text().split()[1:3]
            return self.is_alive and (int(resident) - int(shared)) * mmap.PAGESIZE <= KEPT_BYTES
        return False

    def begin(self, data: bytes, limit: Limit, used: float = 0.0) -> None:
        """Copy a file into the shared memory, and give the process the seconds in `limit`, less `used`, to decode it.

        Raises:
            MediaTooLargeError: the file is too large, or no seconds are left.
        """
        if used >= limit.value:
            raise _too_slow(limit)
        if len(data) > len(self.memory):
            raise MediaTooLargeError(f"it has more than {len(self.memory)} bytes")
        self.memory[: len(data)] = data
        self._used = len(data)
        if self._limit is None:
            # The first file also waits for the start of the process, for as long as the constructor allows.
            self.request("ready")
        self._limit, self._left = limit, limit.value - used

    def request(self, operation: str, *arguments: object) -> Any:
        """Send a request and return its result. Without a reply the process is killed: its state is unknown.

        Raises:
            MediaError: the media are damaged, too large, or take too long.
        """
        is_late = False
        with suppress(OSError, EOFError, ValueError):
            self._connection.send_bytes(json.dumps([operation, *arguments]).encode())
            if self._replies():
                error, result = json.loads(self._connection.recv_bytes())
                if error:
                    raise ERRORS.get(error, MediaError)(str(result))
                return result
            is_late = True
        self.kill()
        if self._limit is None:
            raise MediaBusyError("the process that decodes media could not start; try again in a few seconds")
        if is_late:
            raise _too_slow(self._limit)
        raise MediaError(f"{DAMAGED}, or it needs too much memory")

    def _replies(self) -> bool:
        """Wait for a reply, and return whether there is one in time."""
        while self._left > 0:
            step, began = min(self._left, STEP_SECONDS), time.monotonic()
            has_reply = self._connection.poll(step)
            self._left -= min(time.monotonic() - began, step)
            if has_reply:
                return True
        return self._connection.poll(0)

    def result(self, size: int) -> memoryview:
        """Return the first bytes of the shared memory. The next use overwrites them."""
        self._used = max(self._used, size)
        return memoryview(self.memory)[:size]

    def free(self) -> None:
        """Give large shared memory back to the system."""
        if self._used > LARGE_BYTES:
            self.memory.madvise(mmap.MADV_REMOVE)
        self._used = 0

    def kill(self) -> None:
        """End the process. A call of `request` in another thread fails at once."""
        self._is_killed = True
        self._popen.kill()

    def close(self) -> None:
        """End the process and free its resources."""
        self.kill()
        self._popen.wait()
        self._connection.close()


def _too_slow(limit: Limit) -> MediaTooLargeError:
    return MediaTooLargeError(f"it takes longer to decode than {limit} s allows")


class Pool:
    """The processes, and who may use one next. It starts a process when none is idle, and keeps `each`.

    A request may use `each` processes at once. All requests together use as many, or more if media have to wait for
    long, because others are slow to decode. The request that uses the fewest processes comes first, and lines of
    batches come last.
    """

    def __init__(self, each: int, start: Callable[[], Process]) -> None:
        self._each = each
        self._start = start
        self._idle: list[Process] = []
        self._callers: list[_Turn] = []
        """The turns that wait."""
        self._lines: list[_Turn] = []
        """Those of lines of batches."""
        self._using: Counter[Account] = Counter()
        self._lent = 0
        """How many processes are lent."""
        self._long = 0
        """How many turns for long media go on."""
        self._threads = ThreadPoolExecutor(MORE * each + 2, thread_name_prefix="media")
        self._is_closed = False

    async def prepare(self) -> None:
        """Start a process now, so that the first media do not wait for it."""
        self._idle.append(await self.in_thread(self._start))

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Call `work` in a thread for media, with the context of the caller."""
        return await threads.call(self._threads, work, *arguments)

    @asynccontextmanager
    async def process(self, request: Account, *, is_long: bool = False) -> AsyncIterator[Process]:
        """Lend a process to a request. If the caller is cancelled, the process is killed, and its work fails."""
        loop = asyncio.get_running_loop()
        waiting = self._lines if request.is_line else self._callers
        turn = _Turn(request, is_long, waiting, loop.create_future(), loop.time())
        hurry = loop.call_later(PATIENCE_SECONDS, self._serve)
        waiting.append(turn)
        try:
            self._serve()
            await turn.future
            idle = self._idle_process()
            process = idle if idle is not None else await self.in_thread(self._start)
            self._lent += 1
            try:
                yield process
            except asyncio.CancelledError:
                process.kill()
                raise
            finally:
                self._give_back(process)
        finally:
            hurry.cancel()
            self._end(turn)

    def _serve(self) -> None:
        """Let those go on who may."""
        while (turn := self._next()) is not None:
            turn.waiting.remove(turn)
            self._using[turn.request] += 1
            self._long += turn.is_long
            turn.future.set_result(None)
            served = turn.request
            # The others are next.
            self._callers.sort(key=lambda other: other.request is served)

    def _next(self) -> "_Turn | None":
        """Return who may go on: of the callers, one with the fewest processes; else the first of the lines."""
        if callers := [turn for turn in self._callers if self._may_go_on(turn)]:
            return min(callers, key=lambda turn: self._using[turn.request])
        if self._using.total() >= self._each:
            # There may be thousands of lines.
            return None
        return next(filter(self._may_go_on, self._lines), None)

    def _may_go_on(self, turn: "_Turn") -> bool:
        has_waited = asyncio.get_running_loop().time() - turn.since >= PATIENCE_SECONDS and not turn.request.is_line
        most = MORE * self._each if has_waited else self._each
        # Videos and sounds may take minutes. They never use all processes.
        is_crowded = turn.is_long and self._long >= (MORE - 1) * self._each
        has_place = self._using.total() < most and self._using[turn.request] < self._each and not is_crowded
        # A turn that was cancelled just now is removed by its own task.
        return has_place and not turn.future.done()

    def _end(self, turn: "_Turn") -> None:
        if turn in turn.waiting:
            turn.waiting.remove(turn)
            return
        self._using[turn.request] -= 1
        self._using += Counter()  # Removes those with none.
        self._long -= turn.is_long
        self._serve()

    def _idle_process(self) -> Process | None:
        while self._idle:
            process = self._idle.pop()
            if process.is_alive:
                return process
            self._threads.submit(process.close)
        return None

    def _give_back(self, process: Process) -> None:
        self._lent -= 1
        if self._is_closed:
            process.close()
        elif not process.is_usable:
            self._threads.submit(process.close)
        else:
            process.free()
            self._idle.append(process)
            # Those whose turn it is just now need one each.
            needed = len(self._callers) + self._using.total() - self._lent
            while len(self._idle) > max(self._each, needed):
                self._threads.submit(self._idle.pop().close)

    def close(self) -> None:
        """End the idle processes. A busy one ends when its work does."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        self._threads.shutdown(wait=False)


@dataclass(eq=False, slots=True)
class _Turn:
    request: Account
    is_long: bool
    waiting: "list[_Turn]"
    """Where it is until it may go on."""
    future: "asyncio.Future[None]"
    since: float
