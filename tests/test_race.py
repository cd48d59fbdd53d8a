"""Races between works: which one wins, and what happens to the others."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from worker import race


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test in a loop. It fails if an exception is never retrieved, which asyncio reports when a task is freed."""
    unretrieved: list[Any] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(context))
        await test
        gc.collect()

    asyncio.run(watched())
    assert not unretrieved


async def fail(error: Exception) -> None:
    raise error


class Work:
    """A coroutine that takes for ever, and a moment to end when it is cancelled."""

    def __init__(self) -> None:
        self.cancelled = self.ended = False

    async def run(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            await asyncio.sleep(0.01)
            self.ended = True
            raise


def test_a_coroutine_that_loses_is_cancelled_and_waited_for() -> None:
    async def test() -> None:
        loser = Work()
        winner = await race.first(asyncio.sleep(0.01, "done"), loser.run())
        assert winner.result() == "done"
        assert (loser.cancelled, loser.ended) == (True, True)

    run(test())


def test_a_task_that_loses_goes_on() -> None:
    async def test() -> None:
        loser = asyncio.create_task(asyncio.sleep(0.02, "later"))
        winner = await race.first(loser, asyncio.sleep(0))
        assert winner is not loser
        assert not loser.done()
        assert await loser == "later"

    run(test())


def test_a_task_that_wins_is_the_result() -> None:
    async def test() -> None:
        task = asyncio.create_task(asyncio.sleep(0, "done"))
        assert await race.first(Work().run(), task) is task

    run(test())


def test_the_earliest_argument_of_several_that_have_ended_wins() -> None:
    async def test() -> None:
        tasks = [asyncio.create_task(asyncio.sleep(0, number)) for number in range(3)]
        await asyncio.wait(tasks)
        assert await race.first(tasks[2], tasks[0], tasks[1]) is tasks[2]
        assert (await race.first(asyncio.sleep(0, "a"), asyncio.sleep(0, "b"))).result() == "a"

    run(test())


def test_the_exception_of_a_winner_is_its_result() -> None:
    async def test() -> None:
        winner = await race.first(fail(LookupError("boom")), Work().run())
        with pytest.raises(LookupError, match="boom"):
            winner.result()

    run(test())


def test_exceptions_that_nobody_reads_cause_no_warning() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("loser") from None

    async def test() -> None:
        await race.first(asyncio.sleep(0), fail(ValueError("also ended")), fail_when_cancelled())
        await race.first(fail(LookupError("winner")), asyncio.sleep(60))

    run(test())


def test_a_race_that_is_cancelled_cancels_its_coroutines_but_not_its_tasks() -> None:
    async def test() -> None:
        work, task = Work(), asyncio.create_task(asyncio.sleep(60))
        racing = asyncio.create_task(race.first(work.run(), task))
        await asyncio.sleep(0)
        await race.end(racing)
        assert racing.cancelled()
        assert (work.ended, task.done()) == (True, False)
        await race.end(task)

    run(test())


def test_end_cancels_tasks_and_waits_for_them() -> None:
    async def test() -> None:
        work = Work()
        tasks = [asyncio.create_task(work.run()), asyncio.create_task(fail(ValueError("has ended")))]
        await asyncio.sleep(0)
        await race.end(*tasks)
        assert work.ended
        assert all(task.done() for task in tasks)
        await race.end()

    run(test())
