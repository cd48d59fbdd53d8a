"""The files of a batch's results: whose they are, their lines, and the output in its order."""

import errno
import os
import time
import uuid
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from worker.batch import results
from worker.errors import BatchOutputError, InvalidRequestError

Order = Literal["input", "ended"]
"""The order of the output: that of the input, or that in which the lines ended."""

_HEAD_BYTES = 200
"""The beginning of a file in which the id of its first result ends."""
_BUFFER_BYTES = 1 << 17
_TEMPORARY = ".batch-unfinished-"
_ORPHAN_SECONDS = 3600.0
_REASONS = {
    errno.ENOENT: "its folder does not exist. Create the folder, or choose another path",
    errno.ENOTDIR: "its folder is a file. Choose another path",
    errno.EACCES: "the worker may not write there. Choose another path, or allow it",
    errno.EPERM: "the worker may not write there. Choose another path, or allow it",
    errno.EROFS: "its disk is read-only. Choose another path",
    errno.ENAMETOOLONG: "its name is too long. Choose a shorter one",
}
"""Errors that the caller can avoid."""


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Raise an error for callers in place of an OSError about the output `path`."""
    try:
        yield
    except OSError as error:
        output = f"The batch's output {path.name!r} cannot be written: "
        if reason := _REASONS.get(error.errno or 0):
            raise InvalidRequestError(f"{output}{reason}.", param="output") from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full. Free some space"
        else:
            reason = f"{error.strerror or error}. Check the disk"
        raise BatchOutputError(f"{output}{reason}. Results so far are kept.") from None


def is_owned(path: Path, key: str) -> bool:
    """Return whether a file has results of the batch with this key; False if it is missing or empty.

    Raises:
        InvalidRequestError: the file has something else, is no file, or its folder does not exist.
    """
    with in_words(path):
        os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        if not path.exists():
            return False
    if not path.is_file():
        raise InvalidRequestError(f"The batch's output {path.name!r} is not a file. Choose another path.")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    check_line(path, key, head)
    if results.ID.match(head):
        return True
    prefix = results.prefix(key)
    if b"\n" not in head and (prefix.startswith(head) or head.startswith(prefix)):
        # The first result is incomplete.
        return False
    raise _not_free(path, "content that is no batch's")


def check_line(path: Path, key: str, line: bytes) -> None:
    """Check that a line is no result of another batch than that with this key.

    Raises:
        InvalidRequestError: it is one.
    """
    found = results.ID.match(line)
    if found and found[1] != key.encode():
        raise _not_free(path, "results of another batch")


def _not_free(path: Path, content: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The batch's output {path.name!r} exists and has {content}. Choose another path, or remove the file."
    )


def lines(file: int, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines of an open file from an offset on, each with its offset. The file stays open."""
    with open(file, "rb", _BUFFER_BYTES, closefd=False) as reader:
        reader.seek(start)
        for line in reader:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def write(file: int, key: str, order: Order, path: Path, errors: Path | None) -> None:
    """Write the results in the open `file` to `path`, each line once, and those that failed to `errors`, if given.

    Both appear when they are complete, `path` last. Memory: 8 bytes for each line, and the largest line.
    """
    _remove_orphans(path.parent)
    with ExitStack() as stack:
        output = stack.enter_context(replacing(path))
        failures = stack.enter_context(replacing(errors)) if errors else output
        for line in _ordered(file, key, order):
            summary = results.summary(key, line)
            (output if summary and summary.is_ok else failures).write(line)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, once it is on the disk."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb", _BUFFER_BYTES) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """Return a path beside `path` that nobody else uses, also no other worker."""
    return path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")


def _remove_orphans(folder: Path) -> None:
    """Remove temporary files that nobody writes any more: their workers were killed."""
    for each in folder.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):
            if time.time() - each.stat().st_mtime > _ORPHAN_SECONDS:
                each.unlink()


def _ordered(file: int, key: str, order: Order) -> Iterator[bytes]:
    """Yield the first result of each line."""
    offsets = array("Q")
    for offset, line in lines(file, 0):
        if summary := results.summary(key, line):
            offsets.extend([0] * (summary.number + 1 - len(offsets)))
            # 0 is for lines without a result.
            offsets[summary.number] = offsets[summary.number] or offset + 1
    if order == "input":
        with open(file, "rb", _BUFFER_BYTES, closefd=False) as reader:
            for offset in offsets:
                if offset:
                    reader.seek(offset - 1)
                    yield reader.readline()
        return
    for offset, line in lines(file, 0):
        summary = results.summary(key, line)
        if summary and offsets[summary.number] == offset + 1:
            yield line


def sync_folder(path: Path) -> None:
    """Make sure that a file's name survives a loss of power, where the file system can."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)
