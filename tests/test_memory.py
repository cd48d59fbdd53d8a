"""The budget of memory that all requests share."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from worker.errors import MemoryBusyError, MemoryExceededError
from worker.memory import Account, Budget, container_memory


def accounts(limit: int, count: int, **options: Any) -> tuple[Budget, list[Account]]:
    budget = Budget(limit, **options)
    return budget, [budget.account() for _ in range(count)]


def test_what_fits_is_taken_and_given_back() -> None:
    async def run() -> None:
        budget, (first, second) = accounts(10, 2)
        await first.take(4)
        await second.take_media(6)
        assert (budget.held, second.media) == (10, 6)
        second.give_back_media()
        assert (budget.held, second.media) == (4, 0)
        first.close()
        assert budget.held == 0

    asyncio.run(run())


def test_a_request_waits_until_others_give_back() -> None:
    async def run() -> None:
        budget, (first, second) = accounts(10, 2)
        await first.take(8)
        waiting = asyncio.create_task(second.take(5))
        await asyncio.sleep(0)
        assert not waiting.done()
        first.give_back(2)
        await asyncio.sleep(0)
        assert not waiting.done()
        first.close()
        await waiting
        assert budget.held == 5

    asyncio.run(run())


def test_a_small_request_does_not_wait_behind_a_large_one() -> None:
    async def run() -> None:
        _, (first, large, small) = accounts(10, 3)
        await first.take(6)
        waiting = asyncio.create_task(large.take(9))
        await asyncio.sleep(0)
        await small.take(3)
        first.close()
        small.close()
        await waiting

    asyncio.run(run())


def test_more_than_all_requests_may_hold_is_refused_at_once() -> None:
    async def run() -> None:
        _, (account,) = accounts(10, 1)
        await account.take(4)
        with pytest.raises(MemoryExceededError, match="MAX_TOTAL_REQUEST_BYTES=10"):
            await account.take(7)

    asyncio.run(run())


def test_requests_that_wait_for_each_other_are_not_stuck() -> None:
    """The one that holds the most is refused, so that the others can go on."""

    async def run() -> None:
        _, (small, large) = accounts(10, 2)
        await large.take(6)
        await small.take(4)
        waiting = asyncio.create_task(large.take(2))
        await asyncio.sleep(0)
        second = asyncio.create_task(small.take(2))
        with pytest.raises(MemoryBusyError):
            await waiting
        large.close()
        await second

    asyncio.run(run())


def test_parts_of_one_request_that_do_not_fit_together() -> None:
    async def run() -> None:
        _, (account,) = accounts(10, 1)

        async def part() -> None:
            await account.take(6)
            await account.take(1)

        results = await asyncio.gather(part(), part(), return_exceptions=True)
        assert {type(result) for result in results} == {MemoryExceededError, type(None)}

    asyncio.run(run())


def test_a_wait_ends() -> None:
    async def run() -> None:
        budget, (first, second) = accounts(10, 2, wait_seconds=0.05)
        await first.take(8)
        with pytest.raises(MemoryBusyError, match="Try again"):
            await second.take(5)
        first.close()
        assert budget.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("freed_first", [False, True], ids=["while it waits", "when its turn has come"])
def test_a_request_that_is_cancelled_holds_nothing(freed_first: bool) -> None:
    async def run() -> None:
        budget, (first, second) = accounts(10, 2)
        await first.take(8)
        waiting = asyncio.create_task(second.take(5))
        await asyncio.sleep(0)
        if freed_first:
            first.close()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        first.close()
        assert budget.held == 0
        second.close()
        assert budget.held == 0

    asyncio.run(run())


@pytest.mark.parametrize("method", ["take", "take_media"])
def test_the_loads_of_a_request_that_has_ended_stop(method: str) -> None:
    async def run() -> None:
        budget, (first, second) = accounts(10, 2)
        await first.take(8)
        take: Coroutine[Any, Any, None] = getattr(second, method)(5)
        waiting = asyncio.create_task(take)
        await asyncio.sleep(0)
        second.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(asyncio.CancelledError):
            await getattr(second, method)(1)
        assert budget.held == 8

    asyncio.run(run())


def test_room_for_jobs() -> None:
    budget, (account,) = accounts(50_000_000, 1)
    assert budget.room() == 2
    budget.change(account, 40_000_000)
    assert budget.room() == 0
    assert Budget(1).room() == 1


@pytest.mark.parametrize(("limit", "expected"), [("max", 16 << 30), (str(4 << 30), 4 << 30), (None, 16 << 30)])
def test_the_memory_of_the_container(tmp_path: Path, limit: str | None, expected: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("0")
    assert container_memory(tmp_path, meminfo) == expected
