"""An event loop on a virtual clock: waiting takes no time, and the order of events is the same in every run."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector:
    """Moves the clock forward instead of waiting. There are no files to wait for."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for something that never happens")
        self.now += max(timeout, 0.0)
        return []

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose time is virtual, in seconds from 0. It has neither sockets nor threads."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _Selector()

    def time(self) -> float:
        return self._selector.now

    def jump(self, seconds: float) -> None:
        """Move the clock forward while nothing runs, as when the whole process is frozen."""
        self._selector.now += seconds

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run_on_virtual_clock(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
