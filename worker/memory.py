"""The container's memory, and the budget that all requests share: for their bodies, downloads and decoded media."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from worker.errors import JobError, MemoryBusyError, MemoryExceededError

WAIT_SECONDS = 60.0
"""How long a request waits for memory before it fails."""
CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files with a container's memory limit and usage, in versions 2 and 1 of control groups."""
MEMINFO = Path("/proc/meminfo")


def container_memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Return the bytes of memory that the container may use: the machine's, or less if it has a limit."""
    return min([_meminfo(meminfo, "MemTotal"), *(limit for limit, _ in _limits(cgroup))])


def free_memory(cgroup: Path = CGROUP, meminfo: Path = MEMINFO) -> int:
    """Return the bytes of memory that the container may still use."""
    return min([_meminfo(meminfo, "MemAvailable"), *(limit - usage for limit, usage in _limits(cgroup))])


def _meminfo(meminfo: Path, name: str) -> int:
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def _limits(cgroup: Path) -> Iterator[tuple[int, int]]:
    """Yield the container's memory limit and usage in bytes, if it has a limit."""
    for names in LIMITS:
        with suppress(OSError, ValueError):
            limit, usage = (int((cgroup / name).read_text()) for name in names)
            yield limit, usage


class Budget:
    """The bytes that all requests hold together, and their limit. Use it in one event loop only."""

    JOB_BYTES = 20_000_000
    """The largest job that RunPod accepts."""

    def __init__(self, limit: int, *, wait_seconds: float = WAIT_SECONDS) -> None:
        self.limit = limit
        self.held = 0
        self._wait_seconds = wait_seconds
        self._accounts: set[Account] = set()
        self._waiting: list[_Waiting] = []

    def account(self, *, is_line: bool = False) -> "Account":
        """Return the account of a new request, or of a batch's line. Close it when the request ends."""
        account = Account(self, is_line=is_line)
        self._accounts.add(account)
        return account

    def room(self) -> int:
        """Return the number of jobs of any size for which there is memory."""
        return max((self.limit - self.held) // self.JOB_BYTES, 0 if self.held else 1)

    def change(self, account: "Account", size: int) -> None:
        """Count `size` more bytes for an account, or fewer if it is negative, and serve requests that wait."""
        account.held += size
        self.held += size
        if size < 0:
            self._serve()
            self._refuse_if_stuck()

    async def wait(self, account: "Account", size: int) -> None:
        """Wait until there are `size` free bytes, and count them for the account.

        Requests are served in order; one that does not fit yet is skipped.
        """
        waiting = _Waiting(account, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            self._refuse_if_stuck()
            async with asyncio.timeout(self._wait_seconds):
                await waiting.turn
        except (TimeoutError, asyncio.CancelledError) as error:
            if waiting.turn.done() and not waiting.turn.cancelled() and not waiting.turn.exception():
                # Its turn came in the same moment.
                account.give_back(size)
            if isinstance(error, TimeoutError):
                raise MemoryBusyError(self.held, self.limit) from None
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(waiting)

    def _serve(self) -> None:
        for waiting in [*self._waiting]:
            if self.held + waiting.size <= self.limit and not waiting.turn.done():
                self._waiting.remove(waiting)
                self.change(waiting.account, waiting.size)
                waiting.turn.set_result(None)

    def _refuse_if_stuck(self) -> None:
        """Refuse the request that holds the most if all that hold anything wait: nobody is left to give memory back."""
        stuck = {waiting.account for waiting in self._waiting if not waiting.account.brief}
        if stuck and all(account in stuck for account in self._accounts if account.held):
            largest = max(self._waiting, key=lambda waiting: waiting.account.held)
            self._waiting.remove(largest)
            if largest.turn.done():
                return
            is_alone = largest.account.held == self.held
            error: JobError = MemoryExceededError(self.limit) if is_alone else MemoryBusyError(self.held, self.limit)
            largest.turn.set_exception(error)

    def close(self, account: "Account") -> None:
        """Free everything that an account holds, and end its waits."""
        self._accounts.discard(account)
        for waiting in [each for each in self._waiting if each.account is account]:
            waiting.turn.cancel()
            self._waiting.remove(waiting)
        self.change(account, -account.held)


class Account:
    """The bytes that one request holds."""

    def __init__(self, budget: Budget, *, is_line: bool = False) -> None:
        self._budget = budget
        self.is_line = is_line
        """Whether it is a line of a batch, for which nobody waits."""
        self.held = 0
        self.media = 0
        """The part of `held` that downloads and decoded media take."""
        self.brief = 0
        """The part of `held` that is given back soon: what decoders need only while they work."""
        self.is_closed = False

    def has_room(self, size: int) -> bool:
        """Tell whether `size` more bytes are free now."""
        return self._budget.held + size <= self._budget.limit

    async def take(self, size: int) -> None:
        """Reserve `size` bytes; wait for them if others hold too many.

        Raises:
            MemoryExceededError: the request would hold more than all requests together may.
            MemoryBusyError: the wait was too long, or would never end.
        """
        if self.is_closed:
            raise asyncio.CancelledError("the request has ended")
        if self.held - self.brief + size > self._budget.limit:
            raise MemoryExceededError(self._budget.limit)
        if self.has_room(size):
            self._budget.change(self, size)
        else:
            await self._budget.wait(self, size)

    async def take_media(self, size: int, *, is_brief: bool = False) -> None:
        """Reserve `size` bytes for media, as `take` does; with `is_brief` until `keep_media` is called."""
        await self.take(size)
        self.media += size
        self.brief += size if is_brief else 0

    def keep_media(self, size: int, kept: int) -> None:
        """Free `size` bytes that were reserved briefly, except `kept` of them."""
        self.brief -= size
        self.give_back_media(size - kept)

    def give_back_media(self, size: int | None = None) -> None:
        """Free `size` bytes of media; None: all of them, because the engine has the request."""
        size = self.media if size is None else min(size, self.media)
        self.media -= size
        self.give_back(size)

    def give_back(self, size: int) -> None:
        """Free some bytes."""
        if not self.is_closed:
            self._budget.change(self, -size)

    def close(self) -> None:
        """Free all bytes. The request has ended."""
        self.is_closed = True
        self._budget.close(self)


@dataclass(eq=False, slots=True)
class _Waiting:
    account: Account
    size: int
    turn: "asyncio.Future[None]"


current_account: ContextVar[Account | None] = ContextVar("current_account", default=None)
"""The account of the request that the current task works for."""
