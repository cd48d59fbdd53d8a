"""Workers that are killed at any moment: no line is lost, and none is in the output twice."""

import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.batches import KEY, LIMIT, InlineExecutor, answer, custom_ids, item, jsonl
from tests.support.clock import run_on_virtual_clock
from tests.support.tiny import ROOT
from worker import race
from worker.batch.journal import Journal
from worker.batch.lines import Line
from worker.batch.output import Order
from worker.batch.runner import NotAnsweredError, Runner
from worker.batch.source import Source
from worker.errors import Json

COUNT, KILLS = 2000, 20


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.support.batch_worker", *map(str, arguments)]
    worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert worker.stdout
    assert worker.stdout.readline() == "ready\n"
    return worker


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def line_numbers(path: Path) -> list[int]:
    """Return the numbers of the complete lines in an output or a journal, in its order."""
    texts = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [int(json.loads(text)["id"].rpartition("_")[2]) for text in texts if text.endswith(b"\n")]


@pytest.mark.timeout(240)
def test_twenty_kills_lose_and_double_no_line(tmp_path: Path) -> None:
    source, output, part, asked = (tmp_path / name for name in ("IN", "OUT", "OUT.part", "asked"))
    source.write_bytes(jsonl(item(f"id-{number}") for number in range(1, COUNT + 1)))
    # All lines take 2 s at least, so that the last kill comes before the end.
    arguments = (source, output, KEY, asked, 8, 16)
    chance = random.Random(19)
    kills_while_running = 0
    for kill in range(KILLS):
        before, asks = line_numbers(part), len(asked.read_text().split()) if asked.exists() else 0
        worker = start(*arguments)
        if kill % 2:
            wait_for(lambda: len(line_numbers(part)) > len(before))  # noqa: B023 - called at once
        time.sleep(chance.uniform(0, 0.06))
        worker.kill()
        worker.communicate()
        after = line_numbers(part)
        assert after[: len(before)] == before
        assert not set(before) & set(map(int, asked.read_text().split()[asks:]))
        kills_while_running += len(before) < len(after) < COUNT
    assert kills_while_running >= KILLS // 2
    worker = start(*arguments)
    worker.communicate()
    assert worker.returncode == 0
    assert custom_ids(output) == [f"id-{number}" for number in range(1, COUNT + 1)]
    # Each kill costs the lines that were in flight, and no other.
    assert COUNT <= len(asked.read_text().split()) <= COUNT + KILLS * 8


@pytest.mark.timeout(240)
def test_memory_is_flat_over_a_hundred_thousand_lines(tmp_path: Path) -> None:
    source, output = tmp_path / "IN", tmp_path / "OUT"
    with source.open("wb") as file:
        file.writelines(jsonl([item(f"id-{number}")]) for number in range(1, 100_001))
    worker = start(source, output, KEY, tmp_path / "asked", 64, 0)
    growth = int(worker.communicate()[0])
    assert growth < 30_000_000
    assert len(custom_ids(output)) == 100_000


# ---- any interleaving, on a virtual clock

INPUT = [
    *(item(f"id-{number}") for number in range(1, 13)),
    "no object",
    item("id-3"),
    item("id-13", url="/nothing"),
    item("id-13"),
    item("id-14"),
]
EXPECTED = Counter([*(f"id-{number}" for number in range(1, 15)), None, None, None])

moments = st.floats(0, 1.5)
kills = st.lists(
    st.fixed_dictionaries(
        {
            "at": moments,
            "answers": st.lists(st.sampled_from([0.0, 0.1, 0.1, 0.3, None]), min_size=17, max_size=17),
            "concurrency": st.integers(1, 20),
            "torn": st.integers(0, 60),
            "is_lost": st.booleans(),
        }
    ),
    max_size=5,
)


async def run_once(path: Path, answers: list[float | None], concurrency: int, seconds: float | None) -> Journal:
    """Run the batch for some seconds. A line whose answer is None is not answered, because the worker dies."""

    async def ask(line: Line) -> tuple[int, Json | None]:
        delay = answers[line.number - 1]
        await asyncio.sleep(delay or 0)
        if delay is None:
            raise NotAnsweredError
        return 200, answer(line.number)

    journal = Journal.open(path, KEY)
    source = Source.from_list(INPUT, LIMIT)
    task = asyncio.create_task(Runner(ask, journal, source, lambda: concurrency, InlineExecutor()).run())
    await asyncio.wait([task], timeout=seconds)
    if seconds is None:
        await task
    await race.end(task)
    return journal


@settings(deadline=None, max_examples=200)
@given(kills, st.sampled_from(["input", "ended"]))
def test_any_interleaving_of_kills_loses_and_doubles_no_line(plan: list[dict[str, object]], order: Order) -> None:
    async def test(path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        for kill in plan:
            journal = await run_once(path, kill["answers"], kill["concurrency"], kill["at"])  # type: ignore[arg-type]
            if not kill["is_lost"]:
                journal.close()
            torn = int(str(kill["torn"]))
            if torn and part.exists():
                # The kill came in the middle of a write.
                with part.open("ab") as file:
                    file.write(b'{"id":"batch_req_job-1_1","custom_id":"id-1","response":{"st'[:torn])
        journal = await run_once(path, [0.0] * len(INPUT), 5, None)
        journal.finish(order)
        ids = custom_ids(path)
        assert Counter(ids) == EXPECTED
        numbers = line_numbers(path)
        assert sorted(numbers) == list(range(1, 18))
        assert order == "ended" or numbers == sorted(numbers)
        assert journal.counts.completed == 13

    with TemporaryDirectory() as folder:
        run_on_virtual_clock(test(Path(folder) / "OUT"))


@pytest.mark.parametrize("order", ["input", "ended"])
def test_two_workers_at_the_same_time_double_no_line(tmp_path: Path, order: Order) -> None:
    async def test() -> None:
        path = tmp_path / "OUT"
        # The first worker is frozen while its job is given to another, and goes on.
        thawed = asyncio.create_task(run_once(path, [2.0] * len(INPUT), 3, None))
        await asyncio.sleep(1)
        journals = await asyncio.gather(thawed, run_once(path, [0.5] * len(INPUT), 2, None))
        for journal in journals:
            journal.finish(order)
            assert Counter(custom_ids(path)) == EXPECTED
            assert journal.counts.completed == 13
        assert sorted(line_numbers(path)) == list(range(1, 18))

    run_on_virtual_clock(test())
