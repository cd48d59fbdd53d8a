"""Results are written together, in threads, and none is lost by a cancellation."""

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.batches import KEY, InlineExecutor, disk_full_after, result
from tests.support.clock import run_on_virtual_clock
from worker.batch.journal import Journal
from worker.batch.writer import Writer
from worker.errors import BatchOutputError


class SlowJournal(Journal):
    """A journal whose writes wait for `go_on`, and which counts its writes and syncs."""

    def prepare(self) -> None:
        self.writes: list[int] = []
        self.syncs = 0
        self.go_on = threading.Event()

    def write(self, lines: Iterable[bytes]) -> None:
        lines = list(lines)
        assert self.go_on.wait(10)
        self.writes.append(len(lines))
        super().write(lines)

    def sync(self) -> None:
        self.syncs += 1
        super().sync()


@pytest.fixture
def journal(tmp_path: Path) -> SlowJournal:
    journal = SlowJournal.open(tmp_path / "OUT", KEY)
    assert isinstance(journal, SlowJournal)
    journal.prepare()
    return journal


def part(journal: SlowJournal) -> bytes:
    return journal._part.read_bytes()


def test_results_that_arrive_during_a_write_are_written_together(journal: SlowJournal) -> None:
    async def test() -> None:
        with ThreadPoolExecutor(2) as executor:
            writer = Writer(journal, executor)
            adding = [asyncio.create_task(writer.add(result(number))) for number in range(1, 11)]
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in adding)
            journal.go_on.set()
            await asyncio.gather(*adding)
            await writer.close()

    asyncio.run(test())
    assert journal.writes in ([1, 9], [10])
    assert part(journal) == b"".join(result(number) for number in range(1, 11))


def test_a_cancellation_loses_no_result(journal: SlowJournal) -> None:
    async def test() -> None:
        with ThreadPoolExecutor(2) as executor:
            writer = Writer(journal, executor)
            adding = [asyncio.create_task(writer.add(result(1)))]
            await asyncio.sleep(0.01)
            adding += [asyncio.create_task(writer.add(result(number))) for number in (2, 3)]
            await asyncio.sleep(0.01)
            for task in adding:
                task.cancel()
            await asyncio.wait(adding)
            journal.go_on.set()
            await writer.close()
            assert part(journal) == result(1) + result(2) + result(3)

    asyncio.run(test())


def test_the_disk_is_synced_once_a_second(journal: SlowJournal) -> None:
    async def test() -> None:
        writer = Writer(journal, InlineExecutor())
        for number in range(1, 101):
            await asyncio.sleep(0.1)
            await writer.add(result(number))
        await writer.close()

    journal.go_on.set()
    run_on_virtual_clock(test())
    assert 9 <= journal.syncs <= 11


def test_a_failed_write_is_an_error(journal: SlowJournal) -> None:
    async def test() -> None:
        writer = Writer(journal, InlineExecutor())
        for _ in range(2):
            with pytest.raises(BatchOutputError, match="disk is full"):
                await writer.add(result(1))
        with pytest.raises(BatchOutputError, match="disk is full"):
            await writer.close()

    journal.go_on.set()
    with disk_full_after(100):
        asyncio.run(test())


def test_a_failed_sync_is_an_error(journal: SlowJournal) -> None:
    async def test() -> None:
        writer = Writer(journal, InlineExecutor())
        await writer.add(result(1))
        file, journal._file = journal._file, 1_000_000
        await asyncio.sleep(2)
        writer._sync_if_due()
        await asyncio.sleep(2)
        journal._file = file
        with pytest.raises(BatchOutputError, match="Bad file descriptor"):
            await writer.add(result(1))

    journal.go_on.set()
    run_on_virtual_clock(test())
