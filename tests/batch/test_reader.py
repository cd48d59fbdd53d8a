"""Which lines are left to ask, a few at a time, and which are duplicates."""

from collections.abc import Iterable
from pathlib import Path

from tests.support.batches import KEY, LIMIT, item, line, result
from worker.batch import lines, reader, results
from worker.batch.journal import Journal
from worker.batch.lines import LineError
from worker.batch.reader import Reader
from worker.batch.source import Source
from worker.errors import Json


def read_all(path: Path, items: Iterable[object]) -> list[tuple[int, str | None]]:
    """Return the number of each line that is left, and the code of its error, with a journal at `path`."""
    journal = Journal.open(path, KEY)
    a_reader = Reader(Source.from_list(items, LIMIT), journal)
    found: list[tuple[int, str | None]] = []
    while chunk := a_reader.read():
        found += [(line.number, line.code if isinstance(line, LineError) else None) for line in chunk]
    journal.close()
    return found


def test_lines_that_have_ended_are_left_out(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "OUT", KEY)
    journal.write([result(2), result(3)])
    items = [item(f"id-{number}") for number in range(1, 6)]
    assert read_all(tmp_path / "OUT", items) == [(1, None), (4, None), (5, None)]


def test_the_first_line_with_an_id_has_it(tmp_path: Path) -> None:
    items = [item("a"), item("b", url="/nothing"), item("a"), item("b"), item("a"), item("c")]
    duplicate = "duplicate_custom_id"
    expected = [(1, None), (2, "invalid_url"), (3, duplicate), (4, duplicate), (5, duplicate), (6, None)]
    assert read_all(tmp_path / "OUT", items) == expected


def test_the_verdicts_are_the_same_whatever_has_ended(tmp_path: Path) -> None:
    items = [item("a"), item("a"), item("b"), item("a"), item("b")]
    verdicts = dict(read_all(tmp_path / "fresh", items))
    results_of_all = {
        number: results.refused(KEY, lines.duplicate(line(number, "x"))) if code else result(number, "ab"[number // 3])
        for number, code in verdicts.items()
    }
    for ended in range(1 << len(items)):
        journal = Journal.open(tmp_path / str(ended), KEY)
        done = [number for number in verdicts if ended >> number - 1 & 1]
        journal.write([results_of_all[number] for number in done])
        left = {number: code for number, code in verdicts.items() if number not in done}
        assert dict(read_all(tmp_path / str(ended), items)) == left


def sizes(path: Path, items: list[Json], limit: int) -> list[int]:
    a_reader = Reader(Source.from_list(items, limit), Journal.open(path, KEY))
    found = []
    while chunk := a_reader.read():
        found.append(len(chunk))
    return found


def test_few_lines_are_read_ahead(tmp_path: Path) -> None:
    short = [item(str(number)) for number in range(2 * reader.AHEAD_LINES + 1)]
    assert sizes(tmp_path / "short", short, LIMIT) == [reader.AHEAD_LINES, reader.AHEAD_LINES, 1]
    long = [item(str(number), prompt="x" * (reader.AHEAD_BYTES // 2)) for number in range(5)]
    assert sizes(tmp_path / "long", long, 2 * reader.AHEAD_BYTES) == [2, 2, 1]
