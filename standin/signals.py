"""Wake waiting coroutines without polling. Each object belongs to one event loop."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Signal:
    """Wakes all waiting coroutines each time it fires. Firing is cheap when none is waiting."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def fire(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds. It is evaluated now and each time the signal fires."""
        while not condition():
            await self.wait()

    async def within(self, seconds: float, condition: Callable[[], bool]) -> None:
        """Like `until`, but return after `seconds` at the latest."""
        if condition():
            return
        try:
            async with asyncio.timeout(seconds):
                await self.until(condition)
        except TimeoutError:
            return


class Mailbox(Generic[T]):
    """Items for one reader, who collects all of them at once."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._arrival = Signal()

    def put(self, item: T) -> None:
        self._items.append(item)
        self._arrival.fire()

    async def collect(self, seconds: float) -> list[T]:
        """Wait up to `seconds` for an item, then remove and return all items."""
        await self._arrival.within(seconds, lambda: bool(self._items))
        items, self._items = self._items, []
        return items
