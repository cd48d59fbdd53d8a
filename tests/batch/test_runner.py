"""Runs of batches: how many lines are in flight, what is recorded, and how a run ends."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.batches import KEY, LIMIT, InlineExecutor, answer, custom_ids, item, jsonl
from tests.support.clock import run_on_virtual_clock
from worker import race
from worker.batch.journal import Journal
from worker.batch.lines import Line
from worker.batch.runner import Ask, NotAnsweredError, Runner
from worker.batch.source import Source
from worker.errors import BatchOutputError, InvalidRequestError, Json

ITEMS = [item(f"id-{number}") for number in range(1, 101)]


class Engine:
    """Answers each line after a second of virtual time."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.running = self.most = 0

    async def ask(self, line: Line) -> tuple[int, Json | None]:
        self.asked.append(line.number)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(1)
            return await self.answer(line)
        finally:
            self.running -= 1

    async def answer(self, line: Line, /) -> tuple[int, Json | None]:
        return 200, answer(line.number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


def runner(path: Path, ask: Ask, source: Source | None = None, concurrency: Callable[[], int] = lambda: 10) -> Runner:
    source = source or Source.from_list(ITEMS, LIMIT)
    return Runner(ask, Journal.open(path, KEY), source, concurrency, InlineExecutor())


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_on_virtual_clock(work())


def test_every_line_is_asked_once(path: Path) -> None:
    async def test() -> None:
        engine = Engine()
        running = runner(path, engine.ask)
        await running.run()
        assert sorted(engine.asked) == list(range(1, 101))
        assert engine.most == 10
        assert asyncio.get_running_loop().time() == pytest.approx(10)
        running._journal.finish("input")

    run(test)
    assert custom_ids(path) == [value["custom_id"] for value in ITEMS]


def test_progress_says_how_far_the_batch_is(path: Path) -> None:
    async def test() -> None:
        running = runner(path, Engine().ask)
        assert (running.progress.total, running.progress.seconds_left) == (None, None)
        task = asyncio.create_task(running.run())
        await asyncio.sleep(4.5)
        now = running.progress
        assert (now.total, now.counts.completed, now.percent) == (100, 40, 40.0)
        assert now.counts.tokens_in == 280
        assert now.tokens_per_second == pytest.approx(200 / 4.5)
        assert now.seconds_left == pytest.approx(60 * 4.5 / 40)
        await task
        assert (running.progress.counts.done, running.progress.seconds_left) == (100, 0.0)

    run(test)


def test_a_run_goes_on_where_the_last_one_ended(path: Path) -> None:
    async def test() -> None:
        first, second = Engine(), Engine()
        running = runner(path, first.ask)
        task = asyncio.create_task(running.run())
        await asyncio.sleep(3.5)
        await race.end(task)
        assert (first.running, running.progress.counts.done) == (0, 30)
        running._journal.close()
        running = runner(path, second.ask)
        assert running.progress.counts.done == 30
        await running.run()
        assert sorted(second.asked) == list(range(31, 101))
        assert running.progress.tokens_per_second == pytest.approx(70 * 5 / 7)

    run(test)


def test_the_concurrency_may_change_at_any_time(path: Path) -> None:
    concurrency = 4

    async def test() -> None:
        nonlocal concurrency
        engine = Engine()
        task = asyncio.create_task(runner(path, engine.ask, concurrency=lambda: concurrency).run())
        for value in (4, 20, 1, 0, 7):
            concurrency = value
            await asyncio.sleep(2.45)
            assert engine.running == value
        await race.end(task)

    run(test)


def test_errors_are_results(path: Path) -> None:
    class Strict(Engine):
        async def answer(self, _: Line) -> tuple[int, Json | None]:
            return 400, {"error": {"message": "wrong", "code": 400}}

    async def test() -> None:
        engine = Strict()
        source = Source(lambda: BytesIO(jsonl([item("a"), item("a"), item("b")]) + b"no JSON\n"), LIMIT)
        running = runner(path, engine.ask, source)
        await running.run()
        assert sorted(engine.asked) == [1, 3]
        assert (running.progress.counts.failed, running.progress.total) == (4, 4)
        running._journal.finish("input")

    run(test)
    values = [json.loads(text) for text in path.read_bytes().splitlines()]
    found = [(value["custom_id"], value["response"] and value["response"]["status_code"]) for value in values]
    assert found == [("a", 400), (None, None), ("b", 400), (None, None)]
    assert [value["error"] and value["error"]["code"] for value in values] == [
        None,
        "duplicate_custom_id",
        None,
        "invalid_json_line",
    ]


def test_a_line_without_an_answer_stays_open_and_the_others_end(path: Path) -> None:
    class Dying(Engine):
        async def answer(self, line: Line) -> tuple[int, Json | None]:
            if line.number == 13:
                raise NotAnsweredError
            await asyncio.sleep(line.number / 100)
            return await super().answer(line)

    async def test() -> None:
        engine = Dying()
        running = runner(path, engine.ask)
        with pytest.raises(NotAnsweredError):
            await running.run()
        assert engine.running == 0
        ended = {number for number in range(1, 101) if number in running._journal}
        assert ended == set(engine.asked) - {13}
        assert len(engine.asked) < 25

    run(test)


def test_a_line_that_is_cancelled_elsewhere_stays_open(path: Path) -> None:
    class Cancelling(Engine):
        async def answer(self, line: Line, /) -> tuple[int, Json | None]:
            if line.number == 13:
                raise asyncio.CancelledError
            return await super().answer(line)

    async def test() -> None:
        running = runner(path, Cancelling().ask)
        with pytest.raises(NotAnsweredError):
            await running.run()
        assert 13 not in running._journal

    run(test)


def test_an_unforeseen_error_ends_the_run(path: Path) -> None:
    class Broken(Engine):
        async def answer(self, line: Line) -> tuple[int, Json | None]:
            raise LookupError(f"boom {line.number}")

    async def test() -> None:
        engine = Broken()
        with pytest.raises(LookupError, match="boom 1"):
            await runner(path, engine.ask).run()
        assert engine.running == 0

    run(test)


def test_a_full_disk_ends_the_run(path: Path) -> None:
    class Full(Journal):
        def write(self, lines: Any) -> None:  # noqa: ARG002 - the signature of the journal
            raise BatchOutputError("the disk is full")

    async def test() -> None:
        engine = Engine()
        journal = Full.open(path, KEY)
        with pytest.raises(BatchOutputError, match="the disk is full"):
            await Runner(engine.ask, journal, Source.from_list(ITEMS, LIMIT), lambda: 10, InlineExecutor()).run()
        assert engine.running == 0

    run(test)


def test_a_file_that_is_no_batch_fails_before_anything_is_asked(path: Path) -> None:
    async def test() -> None:
        engine = Engine()
        with pytest.raises(InvalidRequestError, match="The input is no batch"):
            await runner(path, engine.ask, Source.from_list([1, 2, 3], LIMIT)).run()
        assert engine.asked == []

    run(test)


def test_damage_at_the_end_of_the_input_fails_the_batch_early(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "IN"
    file.write_bytes(gzip.compress(jsonl(item(f"{number}-{hash(str(number))}") for number in range(5000)))[:-9])

    async def test() -> None:
        engine = Engine()
        with pytest.raises(InvalidRequestError, match="The input of the batch is damaged"):
            await runner(path, engine.ask, Source.from_file(file, LIMIT)).run()
        assert (engine.running, len(engine.asked)) == (0, 0)

    run(test)


def test_a_finished_batch_asks_nothing(path: Path) -> None:
    async def test() -> None:
        engine = Engine()
        running = runner(path, engine.ask)
        await running.run()
        running._journal.finish()
        again = runner(path, engine.ask)
        await again.run()
        assert len(engine.asked) == 100
        assert (again.progress.total, again.progress.percent) == (100, 100.0)

    run(test)


def test_few_lines_are_read_ahead_of_slow_answers(path: Path) -> None:
    read = 0

    def items() -> Any:
        nonlocal read
        for number in range(3000):
            read += 1
            yield number, json.dumps(item(f"id-{number}")).encode()

    class Counting(Source):
        def lines(self) -> Any:
            return items()

        def count(self) -> int:
            return 3000

        def check(self) -> None:
            pass

    async def test() -> None:
        source = Counting.from_list([], LIMIT)
        task = asyncio.create_task(runner(path, Engine().ask, source).run())
        await asyncio.sleep(0.5)
        assert read <= 2 * 256 + 1
        await race.end(task)

    run(test)


async def seconds_to_end(work: Awaitable[None], after: float) -> float:
    """Cancel some work after a while. Return how long it then takes to end."""
    task = asyncio.ensure_future(work)
    await asyncio.sleep(after)
    started = asyncio.get_running_loop().time()
    await race.end(task)
    assert task.cancelled()
    return asyncio.get_running_loop().time() - started


@pytest.mark.parametrize("concurrency", [0, 500])
def test_a_cancelled_run_ends_at_once(path: Path, concurrency: int) -> None:
    """With threads, in real time."""
    asked = 0

    async def ask(_: Line) -> tuple[int, Json | None]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)
        return 200, None

    async def test() -> None:
        with ThreadPoolExecutor(4) as executor:
            journal = Journal.open(path, KEY)
            source = Source.from_list([item(f"id-{number}") for number in range(2000)], LIMIT)
            running = Runner(ask, journal, source, lambda: concurrency, executor)
            assert await seconds_to_end(running.run(), after=0.5) < 1
            assert asked == concurrency
            journal.cut()

    asyncio.run(test())
    assert custom_ids(path) == []


@pytest.mark.parametrize("start", [b"", jsonl(ITEMS)])
def test_a_run_that_reads_a_line_without_end_can_be_cancelled(path: Path, start: bytes) -> None:
    class Endless(BytesIO):
        """Has a last line that never ends."""

        def readline(self, size: int | None = -1, /) -> bytes:
            return super().readline(size) or b"x" * (size or 0)

    async def test() -> None:
        with ThreadPoolExecutor(4) as executor:
            source = Source(lambda: Endless(start), LIMIT)
            running = Runner(Engine().ask, Journal.open(path, KEY), source, lambda: 10, executor)
            assert await seconds_to_end(running.run(), after=0.2) < 1

    asyncio.run(test())


def test_a_line_that_kills_the_engine_is_asked_alone_and_then_not_again(path: Path) -> None:
    """Three workers with an engine each die. The fourth one completes the batch."""
    asked: list[list[int]] = []

    async def life() -> bool:
        asked.append([])
        dead = asyncio.Event()
        running = 0

        async def ask(line: Line) -> tuple[int, Json | None]:
            nonlocal running
            running += 1
            asked[-1].append(line.number)
            if line.number == 50:
                asyncio.get_running_loop().call_later(0.5, dead.set)
            dying = asyncio.create_task(dead.wait())
            await asyncio.wait([dying], timeout=1)
            dying.cancel()
            if dead.is_set():
                raise NotAnsweredError
            return 200, answer(line.number)

        run = runner(path, ask)
        journal = run._journal
        try:
            await run.run()
        except NotAnsweredError:
            journal.suspects.add(run.unanswered)
            journal.close()
            return False
        journal.finish("input")
        return True

    assert [run_on_virtual_clock(life()) for _ in range(4)] == [False, False, False, True]
    assert [50 in numbers for numbers in asked] == [True, True, True, False]
    # At the third death only the line itself was in flight.
    assert asked[2][-1] == 50
    results = {value["custom_id"]: value for value in map(json.loads, path.read_text().splitlines())}
    assert len(results) == 100
    (failed,) = (value for value in results.values() if value["error"])
    assert (failed["custom_id"], failed["error"]["code"]) == ("id-50", "engine_died")
    assert [file.name for file in path.parent.iterdir()] == ["OUT"]


def test_a_stop_ends_the_check_of_an_input_that_expands_without_end(path: Path) -> None:
    class Endless(BytesIO):
        def readline(self, _size: int | None = -1, /) -> bytes:
            return b"x" * (_size or 1)

    async def test() -> None:
        source = Source(Endless, LIMIT)
        with ThreadPoolExecutor(4) as executor:
            running = Runner(Engine().ask, Journal.open(path, KEY), source, lambda: 10, executor)
            task = asyncio.create_task(running.run())
            await asyncio.sleep(0.1)
            running.stop()
            with pytest.raises(NotAnsweredError):
                await asyncio.wait_for(task, 20)

    asyncio.run(test())
