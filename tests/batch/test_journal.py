"""The journal: which lines have ended, also after a kill, and the output at the end."""

import fcntl
import os
import threading
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.batches import KEY, custom_ids, disk_full_after, line, result
from worker.batch import output, results
from worker.batch.journal import Journal
from worker.batch.lines import LineError
from worker.batch.output import Order
from worker.batch.progress import Counts
from worker.errors import BatchOutputError, InvalidRequestError, JobError

BAD_LINE = results.refused(KEY, LineError(4, None, "invalid_json_line", "The line is wrong."))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "OUT.jsonl"


def part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def ended(journal: Journal) -> list[int]:
    return [number for number in range(100) if number in journal]


def killed(path: Path, *lines: bytes) -> None:
    """Leave the journal of a worker that was killed after these writes."""
    journal = Journal.open(path, KEY)
    for text in lines:
        journal.write([text])
    journal.close()


def test_a_new_journal_is_empty(path: Path) -> None:
    journal = Journal.open(path, KEY)
    assert (ended(journal), journal.counts, journal.finished) == ([], Counts(), False)
    assert part(path).exists()


def test_an_empty_journal_leaves_no_file(path: Path) -> None:
    Journal.open(path, KEY).close()
    assert not list(path.parent.iterdir())


def test_a_journal_knows_what_was_written(path: Path) -> None:
    killed(path, result(3), result(1, status=400), BAD_LINE)
    journal = Journal.open(path, KEY)
    assert ended(journal) == [1, 3, 4]
    assert journal.counts == Counts(completed=1, failed=2, tokens_in=7, tokens_out=5)
    assert [journal.seen.add(text) for text in ("id-1", "id-2", "id-3")] == [False, True, False]


def test_counts_are_the_same_while_writing_and_after_a_kill(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1), result(2, status=500), BAD_LINE])
    assert Journal.open(path, KEY).counts == journal.counts


def test_a_result_is_written_once(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1), result(1)])
    journal.write([result(1), result(2)])
    journal.finish()
    assert path.read_bytes() == result(1) + result(2)


def test_a_result_of_another_batch_is_a_mistake_of_the_program(path: Path) -> None:
    journal = Journal.open(path, KEY)
    with pytest.raises(ValueError, match="no result of this batch"):
        journal.write([result(1, key="other")])


@pytest.mark.parametrize("length", range(0, len(result(2)), 7))
@pytest.mark.parametrize("before", [b"", result(1)])
def test_an_incomplete_last_line_is_cut(path: Path, before: bytes, length: int) -> None:
    part(path).write_bytes(before + result(2)[:length])
    journal = Journal.open(path, KEY)
    assert ended(journal) == ([1] if before else [])
    assert part(path).read_bytes() == before
    journal.write([result(2)])
    assert part(path).read_bytes() == before + result(2)


@settings(deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_loses_only_the_line_that_is_cut(data: st.DataObject) -> None:
    texts = [result(number) for number in range(1, 6)]
    length = data.draw(st.integers(0, len(b"".join(texts))))
    whole = [number for number in range(1, 6) if len(b"".join(texts[:number])) <= length]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "OUT.jsonl"
        part(path).write_bytes(b"".join(texts)[:length])
        assert ended(Journal.open(path, KEY)) == whole


@pytest.mark.parametrize("order", ["input", "ended"])
def test_damage_within_the_file_costs_only_the_damaged_lines(path: Path, order: Order) -> None:
    part(path).write_bytes(result(1) + b"\0" * 500 + result(2) + b"rubbish\n" + result(3))
    journal = Journal.open(path, KEY)
    assert ended(journal) == [1, 3]
    journal.write([result(2)])
    journal.finish(order)
    assert path.read_bytes() == result(1) + (result(2) + result(3) if order == "input" else result(3) + result(2))


# ---- the output


@pytest.mark.parametrize(("order", "expected"), [("input", [1, 2, 3, 11]), ("ended", [3, 11, 1, 2])])
def test_the_output_has_the_order_that_was_asked_for(path: Path, order: Order, expected: list[int]) -> None:
    killed(path, result(3), result(11), result(1))
    journal = Journal.open(path, KEY)
    journal.write([result(2)])
    journal.finish(order)
    assert custom_ids(path) == [f"id-{number}" for number in expected]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("order", ["input", "ended"])
def test_errors_may_have_a_file_of_their_own(path: Path, order: Order) -> None:
    errors = path.with_name("errors.jsonl")
    journal = Journal.open(path, KEY, errors)
    journal.write([BAD_LINE, result(3), result(2, status=400), result(1)])
    journal.finish(order)
    assert path.read_bytes() == (result(1) + result(3) if order == "input" else result(3) + result(1))
    failed = [result(2, status=400), BAD_LINE]
    assert errors.read_bytes() == b"".join(failed if order == "input" else reversed(failed))
    assert len(list(path.parent.iterdir())) == 2


def test_a_finished_batch_is_not_run_again(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1), result(2, status=400)])
    journal.finish()
    journal.finish()
    journal.close()
    again = Journal.open(path, KEY)
    assert (again.finished, ended(again)) == (True, [1, 2])
    assert again.counts == journal.counts
    again.finish("input")
    again.close()
    assert path.read_bytes() == result(1) + result(2, status=400)


def test_a_finished_batch_with_errors_apart_is_not_run_again(path: Path) -> None:
    errors = path.with_name("errors.jsonl")
    for name, texts in (("some", [result(1), BAD_LINE]), ("only", [BAD_LINE])):
        output, failed = path.with_name(name), errors.with_name(f"{name}.errors")
        journal = Journal.open(output, KEY, failed)
        journal.write(texts)
        journal.finish()
        again = Journal.open(output, KEY, failed)
        assert again.finished
        assert again.counts == journal.counts


@pytest.mark.parametrize("order", ["input", "ended"])
def test_a_kill_between_the_steps_of_finishing_loses_nothing(path: Path, order: Order) -> None:
    errors = path.with_name("errors.jsonl")
    killed(path, result(1), BAD_LINE)
    # The file of errors is complete, the output is not.
    errors.write_bytes(BAD_LINE)
    orphan = output.temporary(path)
    orphan.write_bytes(b"rubbish")
    os.utime(orphan, (0, 0))
    path.write_bytes(b"")
    journal = Journal.open(path, KEY, errors)
    assert (journal.finished, ended(journal)) == (False, [1, 4])
    journal.finish(order)
    assert (path.read_bytes(), errors.read_bytes()) == (result(1), BAD_LINE)
    # Both are complete, but the journal is still there.
    part(path).write_bytes(result(1) + BAD_LINE)
    journal = Journal.open(path, KEY, errors)
    assert (journal.finished, ended(journal)) == (True, [1, 4])
    assert sorted(path.parent.iterdir()) == [path, errors]


def test_the_output_of_another_batch_that_ended_first_is_not_overwritten(path: Path) -> None:
    first, second = Journal.open(path, "job-1"), Journal.open(path, "job-2")
    first.write([result(1, key="job-1")])
    first.finish("input")
    refused = pytest.raises(InvalidRequestError, match="exists and has results of another batch")
    with refused:
        second.write([result(1, key="job-2")])
    with refused:
        second.finish("input")
    assert path.read_bytes() == result(1, key="job-1")


def test_two_workers_that_finish_at_once_write_different_files(path: Path) -> None:
    killed(path, result(2), result(1))
    first, second = Journal.open(path, KEY), Journal.open(path, KEY)
    with output.replacing(path) as unfinished:
        unfinished.write(b"the other worker")
        first.finish("input")
        assert path.read_bytes() == result(1) + result(2)
        unfinished.seek(0)
        unfinished.truncate()
        unfinished.write(result(1) + result(2))
    second.close()
    assert path.read_bytes() == result(1) + result(2)


def test_no_worker_removes_what_another_one_is_writing(path: Path) -> None:
    """An incomplete last line is cut under the same lock that each write takes."""
    journal = Journal.open(path, KEY)
    with part(path).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writing = threading.Thread(target=journal.write, args=([result(1)],))
        writing.start()
        writing.join(0.2)
        assert writing.is_alive()
        other.write(result(2))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_UN)
        writing.join()
    assert part(path).read_bytes() == result(2) + result(1)


def test_an_output_that_is_cut_has_what_ended(path: Path) -> None:
    errors = path.with_name("errors.jsonl")
    journal = Journal.open(path, KEY, errors)
    journal.write([result(3), BAD_LINE])
    with part(path).open("ab") as file:
        file.write(result(2)[:50])
    journal.cut()
    assert path.read_bytes() == result(3) + BAD_LINE
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert Journal.open(path, KEY, errors).finished


def test_a_batch_that_is_cut_before_a_line_ended_has_an_empty_output(path: Path) -> None:
    Journal.open(path, KEY).cut()
    assert path.read_bytes() == b""
    assert not Journal.open(path, KEY).finished


# ---- two workers with the same journal


def test_two_workers_complete_one_journal(path: Path) -> None:
    frozen, other = Journal.open(path, KEY), Journal.open(path, KEY)
    frozen.write([result(1)])
    other.write([result(2), result(1)])
    frozen.write([result(2), result(3)])
    other.write([result(4)])
    assert ended(other) == [1, 2, 3, 4]
    assert frozen.counts.done == 3
    other.finish()
    frozen.write([result(4)])
    frozen.finish()
    assert path.read_bytes() == result(1) + result(2) + result(3) + result(4)
    assert ended(frozen) == [1, 2, 3, 4]


@pytest.mark.parametrize("order", ["input", "ended"])
def test_a_line_that_two_workers_wrote_at_the_same_moment_is_in_the_output_once(path: Path, order: Order) -> None:
    part(path).write_bytes(result(2) + result(1) + result(2, status=400) + result(3))
    journal = Journal.open(path, KEY)
    assert journal.counts == Counts(completed=3, tokens_in=21, tokens_out=15)
    journal.finish(order)
    expected = [result(1), result(2)] if order == "input" else [result(2), result(1)]
    assert path.read_bytes() == b"".join([*expected, result(3)])


def test_a_worker_that_finds_the_batch_finished_does_not_replace_its_output(path: Path) -> None:
    first, second = Journal.open(path, KEY), Journal.open(path, KEY)
    first.write([result(1)])
    second.write([])
    first.finish("input")
    second.finish("ended")
    assert path.read_bytes() == result(1)


def test_a_worker_without_a_result_does_not_take_the_journal_from_another_one(path: Path) -> None:
    first, second = Journal.open(path, KEY), Journal.open(path, KEY)
    second.close()
    first.write([result(1)])
    first.close()
    assert ended(Journal.open(path, KEY)) == [1]


def test_of_two_batches_that_begin_with_the_same_output_the_later_one_is_refused(path: Path) -> None:
    first, second = Journal.open(path, KEY), Journal.open(path, "job-2")
    first.write([result(1)])
    with pytest.raises(InvalidRequestError, match="results of another batch"):
        second.write([result(1, key="job-2")])
    second.close()
    first.finish()
    assert path.read_bytes() == result(1)


@pytest.mark.parametrize("cut", [2, 30, 100])
def test_a_worker_that_writes_behind_an_incomplete_line_keeps_its_own_and_asks_the_other_again(
    path: Path, cut: int
) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1)])
    with part(path).open("ab") as file:
        # A worker that was killed while it wrote this, after `journal` was opened.
        file.write(result(2)[:-cut])
    journal.write([result(3)])
    assert ended(journal) == [1, 3]
    journal.write([result(4)])
    assert ended(Journal.open(path, KEY)) == [1, 3, 4]
    journal.write([result(2)])
    journal.finish()
    assert sorted(map(str, custom_ids(path))) == ["id-1", "id-2", "id-3", "id-4"]


def test_a_journal_that_somebody_removed_is_not_lost(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1)])
    part(path).unlink()
    journal.finish()
    assert path.read_bytes() == result(1)


# ---- mistakes


@pytest.mark.parametrize("key", ["", "a b", "a/b", "x" * 101, 'a"'])
def test_a_key_has_few_characters(path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="is no key of a batch"):
        Journal.open(path, key)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(result(1, key="job-2"), "has results of another batch", id="another batch"),
        pytest.param(result(1, key="job-1_1"), "has results of another batch", id="a similar key"),
        pytest.param(b"precious\n", "has content that is no batch's", id="a file of the user"),
        pytest.param(b"\0" * 1000, "has content that is no batch's", id="a binary file"),
    ],
)
@pytest.mark.parametrize("name", ["OUT.jsonl", "OUT.jsonl.part", "errors.jsonl"])
def test_files_of_others_are_left_alone(path: Path, name: str, content: bytes, message: str) -> None:
    file = path.with_name(name)
    file.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=rf"'{name}' exists and {message}\. Choose another path"):
        Journal.open(path, KEY, path.with_name("errors.jsonl"))
    assert [other.name for other in path.parent.iterdir()] == [name]
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["OUT.jsonl", "OUT.jsonl.part", "errors.jsonl"])
def test_a_folder_is_no_output(path: Path, name: str) -> None:
    path.with_name(name).mkdir()
    with pytest.raises(InvalidRequestError, match=f"'{name}' is not a file"):
        Journal.open(path, KEY, path.with_name("errors.jsonl"))


def test_output_and_errors_differ(path: Path) -> None:
    for errors in (path, part(path)):
        with pytest.raises(InvalidRequestError, match="must have different paths"):
            Journal.open(path, KEY, errors)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param("missing/OUT.jsonl", "its folder does not exist. Create the folder", id="no folder"),
        pytest.param("file/OUT.jsonl", "its folder is a file", id="a file as folder"),
        pytest.param("x" * 300, "its name is too long", id="a name that is too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_reported_in_words(tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match=message) as refused:
        Journal.open(tmp_path / output, KEY)
    assert refused.value.param == "output"
    assert str(tmp_path) not in str(refused.value)
    # The same for a file of errors, although it is written only at the end.
    with pytest.raises(InvalidRequestError, match=f"'{Path(output).name}' cannot be written: {message}"):
        Journal.open(tmp_path / "OUT", KEY, tmp_path / output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_reported_in_words(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(InvalidRequestError, match="the worker may not write there"):
            Journal.open(path, KEY)
    finally:
        path.parent.chmod(0o700)


def test_a_full_disk_keeps_what_was_written(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(1)])
    with (
        disk_full_after(len(result(1)) + 50),
        pytest.raises(BatchOutputError, match=r"disk is full\. Free some space\. Results so far are kept") as failed,
    ):
        journal.write([result(2)])
    assert failed.value.status == 507
    assert 2 not in journal
    assert ended(Journal.open(path, KEY)) == [1]
    journal.write([result(2)])
    journal.finish("input")
    assert path.read_bytes() == result(1) + result(2)


def test_a_disk_that_is_full_at_the_end_keeps_the_journal(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([result(2), result(1)])
    with disk_full_after(50), pytest.raises(JobError, match="Results so far are kept"):
        journal.finish("input")
    assert [file.name for file in path.parent.iterdir()] == [part(path).name]
    journal.finish("input")
    assert path.read_bytes() == result(1) + result(2)


# ---- memory


@pytest.mark.parametrize("order", ["input", "ended"])
def test_memory_does_not_grow_with_the_results(path: Path, order: Order) -> None:
    count = 20_000
    with part(path).open("wb") as file:
        file.writelines(result(number) for number in range(count, 0, -1))
    tracemalloc.start()
    try:
        journal = Journal.open(path, KEY, path.with_name("errors.jsonl"))
        journal.finish(order)
        # The ids that were seen take most of it. A result has about 350 bytes.
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert journal.counts.done == count
    assert len(custom_ids(path)) == count


def test_a_line_of_any_number_is_found(path: Path) -> None:
    journal = Journal.open(path, KEY)
    journal.write([results.answered(KEY, line(1_000_000), 200, None)])
    assert 1_000_000 in journal
    assert 999_999 not in journal
    assert 1_000_001 not in journal


def test_a_worker_that_writes_at_the_same_moment_is_noticed_the_next_time(path: Path) -> None:
    class Racing(Journal):
        is_racing = False

        def _catch_up(self) -> None:
            super()._catch_up()
            if self.is_racing and other.counts.done < 3:
                other.write([result(1), result(2), result(3)])

    other = Journal.open(path, KEY)
    journal = Racing.open(path, KEY)
    Racing.is_racing = True
    journal.write([result(3), result(4)])
    assert part(path).read_bytes().count(b"\n") == 5
    journal.write([result(2), result(5)])
    assert ended(journal) == [1, 2, 3, 4, 5]
    assert journal.counts.done == 5
    journal.finish()
    assert sorted(custom_ids(path), key=str) == [f"id-{number}" for number in range(1, 6)]
