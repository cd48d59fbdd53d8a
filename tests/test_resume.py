"""How a freeze is noticed and what it changes, on a virtual clock."""

import asyncio
from collections.abc import Callable

import pytest

from tests.support.clock import VirtualLoop, run_on_virtual_clock
from worker.resume import FROZEN_SECONDS, TICK_SECONDS, Resumes


class Clocks:
    """The clocks of a worker that is watched, in a running event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.ahead = 1_000_000.0
        self.used = 0.0
        self.resumes = Resumes(lambda: loop.time() + self.ahead, lambda: self.used)
        self.noticed: list[float] = []
        self.resumes.listen(lambda: self.noticed.append(loop.time()))

    def freeze(self, seconds: float) -> None:
        self.loop.jump(seconds)

    def compute(self, seconds: float) -> None:
        """Block the loop."""
        self.used += seconds
        self.loop.jump(seconds)

    def restore(self, seconds: float) -> None:
        """Continue from a checkpoint that is so many seconds old."""
        self.ahead += seconds


def noticed(change: Callable[[Clocks], None]) -> list[float]:
    """Return when a watched worker notices a resume, if `change` happens at 1 s."""

    async def run() -> list[float]:
        clocks = Clocks()
        with clocks.resumes.watched():
            await asyncio.sleep(1)
            change(clocks)
            await asyncio.sleep(10)
        return clocks.noticed

    return run_on_virtual_clock(run())


@pytest.mark.parametrize(
    ("change", "at"),
    [
        pytest.param(lambda clocks: clocks.freeze(600), 601, id="both clocks have jumped"),
        pytest.param(lambda clocks: clocks.restore(600), 1, id="only the wall clock has jumped"),
    ],
)
def test_a_resume_is_noticed_once_and_soon(change: Callable[[Clocks], None], at: float) -> None:
    (moment,) = noticed(change)
    assert at <= moment <= at + TICK_SECONDS


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda clocks: clocks.freeze(FROZEN_SECONDS - TICK_SECONDS), id="a loop that was busy for a moment"
        ),
        pytest.param(lambda clocks: clocks.compute(60), id="a loop that was busy for a minute"),
        pytest.param(lambda clocks: clocks.restore(1), id="a small step of the wall clock"),
        pytest.param(lambda clocks: clocks.restore(-3600), id="a wall clock that is set back"),
    ],
)
def test_other_changes_of_the_clocks_are_no_resume(change: Callable[[Clocks], None]) -> None:
    assert noticed(change) == []


def ends_at(seconds: float, after_resume: float | None = None, freezes: tuple[float, ...] = ()) -> float:
    """Return when a timeout ends that began at 0 s, if the worker is frozen for an hour at some times."""

    async def run() -> float:
        clocks = Clocks()
        for at in freezes:
            clocks.loop.call_at(at, clocks.freeze, 3600)
        with clocks.resumes.watched(), pytest.raises(TimeoutError):
            async with clocks.resumes.timeout(seconds, after_resume):
                await asyncio.Event().wait()
        return clocks.loop.time()

    return run_on_virtual_clock(run())


@pytest.mark.parametrize(
    ("after_resume", "freezes", "end"),
    [
        pytest.param(None, (), 60, id="without a freeze"),
        pytest.param(None, (10.05,), 3660, id="the frozen time does not count"),
        pytest.param(None, (10.05, 3620.05), 7260, id="two freezes"),
        pytest.param(5, (10.05,), 3615, id="what may wait for a dead connection"),
        pytest.param(5, (58.05,), 3660, id="less was left"),
    ],
)
def test_timeouts_count_the_time_in_which_the_worker_ran(
    after_resume: float | None, freezes: tuple[float, ...], end: float
) -> None:
    assert ends_at(60, after_resume, freezes) == pytest.approx(end, abs=2 * TICK_SECONDS)


def test_a_timeout_that_ends_just_now_is_not_moved() -> None:
    async def run() -> None:
        resumes = Resumes()
        async with resumes.timeout(1):
            try:
                await asyncio.Event().wait()
            finally:
                resumes.resumed(60)

    with pytest.raises(TimeoutError):
        run_on_virtual_clock(run())


def test_the_frozen_time_between_two_moments() -> None:
    async def run() -> None:
        clocks = Clocks()
        clocks.loop.jump(100)
        clocks.resumes.resumed(60)
        began = clocks.ahead + 40
        assert clocks.resumes.frozen_seconds == 60
        assert clocks.resumes.frozen(began - 1, began + 70) == 60
        # It arrived when the worker resumed, or ended before the freeze.
        assert clocks.resumes.frozen(began + 60, began + 70) == clocks.resumes.frozen(began - 5, began - 1) == 0

    run_on_virtual_clock(run())
