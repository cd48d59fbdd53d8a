"""The input of a batch as lines of bytes: a file that is plain, gzip or zstd, a list, or base64 of such a file.

Memory does not depend on the size of a file: of a line that is too long, only the beginning is kept, even if a
compressed file expands to a line without end. A list and base64 came in a request, so they are in memory already, and
are read from there without a temporary file.
"""

import base64
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO, RawIOBase
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from worker.batch import lines
from worker.errors import InvalidRequestError

MAX_LINES = 1_000_000
"""The most lines of an input, empty ones included."""
CHECKED_LINES = 20
"""How many lines decide whether an input is a batch at all."""

_BUFFER_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class NotBatchError(InvalidRequestError, status=400, type="BadRequestError"):
    """The input is no batch. `lines` are its first mistakes; none if it is empty."""

    def __init__(self, mistakes: list[lines.LineError]) -> None:
        self.lines = mistakes
        found = " ".join(f"Line {mistake.number}: {mistake.message}" for mistake in mistakes)
        super().__init__(
            "The input is no batch. It must have one request a line, as a JSON object with 'custom_id', 'method', "
            f"'url' and 'body'; gzip and zstd are accepted. {found or 'It is empty.'}"
        )


class ClosedError(Exception):
    """The source was closed while it was read."""


class Source:
    """An input that can be read several times, also by several threads at once."""

    def __init__(self, opened: Callable[[], BinaryIO], limit: int) -> None:
        """Take a function that opens the input, and the most bytes of a line without its line break."""
        self._opened = opened
        self.limit = limit
        self._is_closed = False

    @classmethod
    def from_file(cls, path: Path, limit: int) -> "Source":
        """Return the source of a file, which need not exist yet."""

        def opened() -> BinaryIO:
            if path.exists() and not path.is_file():
                raise InvalidRequestError("The input of the batch is not a file. Check its path.")
            return path.open("rb", _BUFFER_BYTES)

        return cls(opened, limit)

    @classmethod
    def from_list(cls, items: Iterable[object], limit: int) -> "Source":
        """Return the source of lines that are parsed already."""
        data = b"".join(json.dumps(item).encode() + b"\n" for item in items)
        return cls(lambda: BytesIO(data), limit)

    @classmethod
    def from_base64(cls, text: str, limit: int) -> "Source":
        """Return the source of a file in base64.

        Raises:
            InvalidRequestError: the text is not base64.
        """
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            raise InvalidRequestError(
                "The batch's input is neither a file on the volume nor base64. Send a link, a path, a list of lines, "
                "or a file in base64."
            ) from None
        return cls(lambda: BytesIO(data), limit)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number of each line that is not empty, and its text without line break.

        A text of more than `limit` bytes is the beginning of a line that is too long.

        Raises:
            InvalidRequestError: the input cannot be read, is damaged, or has more than MAX_LINES.
            ClosedError: the source was closed.
        """
        number = 0
        with _in_words(), self._opened() as raw, _decompressed(raw) as file:
            while text := self._next_line(file):
                number += 1
                if number > MAX_LINES:
                    raise InvalidRequestError(f"The batch has more than {MAX_LINES:,} lines. Split it into several.")
                text = text.removeprefix(_BOM) if number == 1 else text
                if text and not text.isspace():
                    yield number, text.removesuffix(b"\n").removesuffix(b"\r")

    def _next_line(self, file: BinaryIO) -> bytes:
        """Return the next line, of one that is too long only the beginning; `b""` at the end of the input."""
        most = self.limit + len(_BOM) + len(b"\r\n")
        text = piece = file.readline(most)
        while len(piece) == most and not piece.endswith(b"\n"):
            self._check_open()
            piece = file.readline(most)
        self._check_open()
        return text

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError

    def count(self) -> int:
        """Return the number of lines that are not empty. This reads the whole input.

        Raises:
            InvalidRequestError: the input cannot be read, is damaged, or has more than MAX_LINES.
        """
        return sum(1 for _ in self.lines())

    def check(self) -> None:
        """Check that the input is a batch: one of its first lines is a JSON object.

        Raises:
            NotBatchError: it is none; the message has the first three mistakes.
            InvalidRequestError: it cannot be read, or is damaged.
        """
        first = [lines.parse(number, text, self.limit) for number, text in islice(self.lines(), CHECKED_LINES)]
        mistakes = [line for line in first if isinstance(line, lines.LineError) and line.code in lines.NOT_OBJECTS]
        if len(mistakes) < len(first):
            return
        raise NotBatchError(mistakes[:3])

    def close(self) -> None:
        """End the reading with a ClosedError, also in other threads and within a line that has no end."""
        self._is_closed = True


@contextmanager
def _decompressed(raw: BinaryIO) -> Iterator[BinaryIO]:
    """Open a file for reading. Its first bytes tell how it is compressed."""
    head = raw.read(4)
    raw.seek(0)
    damages: tuple[type[Exception], ...]
    if head.startswith(b"\x1f\x8b"):
        file, damages = cast("RawIOBase", gzip.GzipFile(fileobj=raw)), (EOFError, gzip.BadGzipFile, zlib.error)
    elif head == b"\x28\xb5\x2f\xfd":
        zstd = _zstd()
        file, damages = zstd.ZstdFile(raw), (EOFError, zstd.ZstdError)
    else:
        yield raw
        return
    try:
        # Files that decompress are slow to read in single lines.
        with BufferedReader(file, _BUFFER_BYTES) as reader:
            yield cast("BinaryIO", reader)
    except damages:
        raise InvalidRequestError("The input of the batch is damaged: it cannot be decompressed to its end.") from None


def _zstd() -> Any:
    """Return the module for zstd. It accepts windows of up to 128 MB, zstd's own limit for files from others."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


@contextmanager
def _in_words() -> Iterator[None]:
    """Raise an InvalidRequestError in place of an error of the file system."""
    try:
        yield
    except FileNotFoundError:
        raise InvalidRequestError("The input of the batch does not exist. Check its path.") from None
    except OSError as error:
        raise InvalidRequestError(f"The input of the batch cannot be read: {error.strerror or error}.") from None
