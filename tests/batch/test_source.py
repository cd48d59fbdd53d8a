"""Inputs: what is read from them, how much memory that takes, and what is no batch."""

import base64
import gzip
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from tests.support.batches import LIMIT, item, jsonl
from worker.batch import source
from worker.batch.source import ClosedError, Source
from worker.errors import InvalidRequestError

ITEMS = [item("a"), item("b", prompt="こんにちは")]
TEXT = jsonl(ITEMS)
NUMBERED = list(enumerate(TEXT.splitlines(), 1))


def of(data: bytes, limit: int = LIMIT) -> Source:
    return Source(lambda: io.BytesIO(data), limit)


def numbers(data: bytes, limit: int = LIMIT) -> list[tuple[int, bytes]]:
    return list(of(data, limit).lines())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TEXT, id="plain"),
        pytest.param(TEXT.removesuffix(b"\n"), id="without the last newline"),
        pytest.param(TEXT.replace(b"\n", b"\r\n"), id="lines of Windows"),
        pytest.param(b"\xef\xbb\xbf" + TEXT, id="byte order mark"),
        pytest.param(gzip.compress(TEXT), id="gzip"),
        pytest.param(gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:]), id="gzip of two parts"),
        pytest.param(zstd.compress(TEXT), id="zstd"),
        pytest.param(zstd.compress(TEXT[:50]) + zstd.compress(TEXT[50:]), id="zstd of two parts"),
        pytest.param(zstd.compress(b"\xef\xbb\xbf" + TEXT, level=19), id="zstd of a file with a byte order mark"),
    ],
)
def test_every_form_of_a_file_has_the_same_lines(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "IN"
    path.write_bytes(data)
    assert list(Source.from_file(path, LIMIT).lines()) == NUMBERED
    assert list(Source.from_base64(base64.b64encode(data).decode(), LIMIT).lines()) == NUMBERED


def test_a_list_has_its_items_as_lines() -> None:
    assert list(Source.from_list(ITEMS, LIMIT).lines()) == NUMBERED


def test_base64_may_have_line_breaks_but_no_other_characters() -> None:
    encoded = base64.encodebytes(TEXT).decode()
    assert Source.from_base64(encoded, LIMIT).count() == 2
    with pytest.raises(InvalidRequestError, match="is neither a file on the volume nor base64"):
        Source.from_base64("{}", LIMIT)


def test_a_source_can_be_read_again() -> None:
    a_source = of(gzip.compress(TEXT))
    assert a_source.count() == a_source.count() == 2


def test_empty_lines_are_numbered_but_not_lines() -> None:
    assert numbers(b"\n  \nx\n\r\n\t\ny") == [(3, b"x"), (6, b"y")]
    assert of(b"\n  \nx\n\r\n\t\ny").count() == 2


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("over", [-1, 0, 1, 2, 3, 4, 5, 6, 20, 21, 1000])
def test_a_line_that_is_too_long_is_cut_and_the_next_one_is_whole(start: bytes, ending: bytes, over: int) -> None:
    text = b"x" * (20 + over)
    first, *others = numbers(start + text + ending + (b"next\n" if ending else b""), limit=20)
    assert others == ([(2, b"next")] if ending else [])
    assert first == (1, text) if over <= 0 else len(first[1]) > 20


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress, bytes])
def test_a_line_without_end_takes_little_memory(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "IN"
    path.write_bytes(compress(b"[" * 60_000_000 + b"\n{}\n"))
    tracemalloc.start()
    try:
        first, second = Source.from_file(path, LIMIT).lines()
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
    assert len(first[1]) > LIMIT
    assert second == (2, b"{}")


def test_closing_ends_the_reading_within_a_line() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readline(self, _size: int | None = -1, /) -> bytes:
            opened.close()
            return b"x" * 35

        def read(self, _size: int = -1, /) -> bytes:
            return b"xxxx"

        def seek(self, _offset: int, _whence: int = 0, /) -> int:
            return 0

    opened = Source(lambda: Endless(), 30)  # type: ignore[arg-type,return-value]
    with pytest.raises(ClosedError):
        next(opened.lines())


def test_a_closed_source_does_not_look_like_one_that_has_ended() -> None:
    closed = of(TEXT)
    closed.close()
    with pytest.raises(ClosedError):
        closed.count()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gzip.compress(TEXT * 99)[:-9], id="gzip that is cut"),
        pytest.param(gzip.compress(TEXT * 99)[:-8] + b"12345678", id="gzip with a wrong checksum"),
        pytest.param(gzip.compress(TEXT)[:12] + b"\xff" * 30, id="gzip with wrong data"),
        pytest.param(zstd.compress(TEXT * 99)[:-9], id="zstd that is cut"),
        pytest.param(zstd.compress(TEXT)[:9] + b"\xff" * 30, id="zstd with wrong data"),
    ],
)
def test_damaged_files_are_reported_in_words(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="The input of the batch is damaged"):
        of(data).count()


def test_a_file_that_cannot_be_read_is_reported_in_words(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        Source.from_file(tmp_path / "IN", LIMIT).count()
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InvalidRequestError, match="is not a file"):
            Source.from_file(path, LIMIT).count()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequestError, match="cannot be read: Not a directory"):
        Source(lambda: (tmp_path / "file" / "IN").open("rb"), LIMIT).count()


def test_a_batch_has_a_million_lines_at_most() -> None:
    assert of(b"x\n" * source.MAX_LINES).count() == source.MAX_LINES
    with pytest.raises(InvalidRequestError, match=r"more than 1,000,000 lines\. Split it"):
        of(b"x\n" * (source.MAX_LINES + 1)).count()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "It is empty.", id="empty"),
        pytest.param(b"\n\n", "It is empty.", id="empty lines"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0", "Line 1: .*not UTF-8.* Line 2: .*not valid JSON", id="an image"),
        pytest.param(b"\0\xff" * 30_000, "Line 1: The line has more than", id="binary data without line breaks"),
        pytest.param(b"<html>\n<p>\n</p>\n</html>\n", "Line 1: .* Line 2: .* Line 3: [^L]*The", id="HTML"),
        pytest.param(b"[\n{\n}\n]", "Line 1: The line is not valid JSON: Expecting value at", id="a formatted list"),
        pytest.param(b'[{"custom_id": "a"}]', "must be a JSON object, not a list", id="a list in one line"),
        pytest.param(b"id,prompt\n1,a\n", "Line 1: The line is not valid JSON", id="CSV"),
        pytest.param(TEXT.decode().encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param(gzip.compress(b"1\n2\n3\n4\n"), "one request a line", id="a compressed file of numbers"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_with_its_first_mistakes(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"(?s)The input is no batch.*{message}") as refused:
        of(data).check()
    assert "Line 4" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TEXT, id="a batch"),
        pytest.param(b"x\n" * 19 + TEXT, id="a batch whose first 19 lines are wrong"),
        pytest.param(jsonl([item("a", url="/nothing")]), id="a batch with wrong requests"),
    ],
)
def test_a_batch_with_mistakes_is_a_batch(data: bytes) -> None:
    of(data).check()
