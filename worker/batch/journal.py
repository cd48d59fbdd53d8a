"""The results of a batch while it runs: one file that only grows, so that no line is lost and none is asked twice.

`OUT.part` lies beside the output `OUT`, and has the result lines in the order in which they ended. There is no other
state: the id of each result has the key of the batch and the number of the line. A worker that opens the file of one
that was killed goes on where that one was. Several workers may write at the same time, as when a frozen worker goes on
after its job was given to another: each reads what the others have appended, and drops results that are there.

All methods block, and are called in threads. At most one of `write`, `finish` and `close` runs at a time.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worker.batch import output, results
from worker.batch.duplicates import Seen
from worker.batch.output import Order
from worker.batch.progress import Counts
from worker.batch.suspects import Suspects
from worker.errors import InvalidRequestError

LOCK_SECONDS = 1.0
"""The longest wait for another worker that writes. It takes a moment, unless the worker was frozen meanwhile."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Journal:
    """The results of the batch with one key. `finished`: its output is complete, and there is nothing left to do."""

    def __init__(self, path: Path, key: str, errors: Path | None) -> None:
        """Use `open` instead."""
        self.key = key
        self.counts = Counts()
        self.seen = Seen()
        self.suspects = Suspects(path.with_name(f".{key}.suspects"))
        self.finished = False
        self._path, self._errors, self._part = path, errors, path.with_name(f"{path.name}.part")
        self._ended = bytearray()
        """One byte for each line, 1 once it has ended."""
        self._file = -1
        self._size = 0
        """The bytes of the file that were read or written here."""
        self._is_tidy = True
        """Whether the file has each line once, and nothing else."""

    @classmethod
    def open(cls, path: Path, key: str, errors: Path | None = None) -> "Journal":
        """Open the journal of the batch `key`, whose output will be `path`. It may exist, or be finished.

        The key may have 100 letters, digits, `-` and `_`. With `errors`, lines that failed go into a file of their own.

        Raises:
            InvalidRequestError: the output is that of another batch, or cannot be written there.
            BatchOutputError: the disk is full or fails.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a batch. It may have 1 to 100 letters, digits, '-' and '_'.")
        journal = cls(path, key, errors)
        with output.in_words(path):
            journal._open()
        return journal

    def _open(self) -> None:
        paths = [path for path in (self._path, self._errors, self._part) if path]
        if len(set(paths)) < len(paths):
            raise InvalidRequestError("The output and the file of errors must have different paths.")
        owned = [path for path in paths if output.is_owned(path, self.key)]
        # If every line failed, the output is empty, and the file of errors tells whose it is. It is written first.
        is_empty_output = self._errors in owned and self._path.exists() and not self._part.exists()
        if self._path in owned or is_empty_output:
            self._read_finished(path for path in owned if path != self._part)
            return
        self._file = self._open_part()
        self._catch_up_and_cut()

    def _open_part(self) -> int:
        return os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def _read_finished(self, paths: Iterable[Path]) -> None:
        for path in paths:
            with path.open("rb") as file:
                self._read(file.fileno(), 0)
        self._part.unlink(missing_ok=True)
        self.finished = True

    def __contains__(self, number: int) -> bool:
        """Return whether a line has ended."""
        return number < len(self._ended) and bool(self._ended[number])

    def write(self, lines: Iterable[bytes]) -> None:
        """Append results, all but those of lines that have ended. They are in the file when this returns.

        Raises:
            InvalidRequestError: another batch with the same output has written there first.
            BatchOutputError: the disk is full or fails. What was written before is kept.
        """
        with output.in_words(self._path), self._locked():
            self._catch_up()
            summaries = ((self._summary(line), line) for line in lines)
            new = {summary.number: (summary, line) for summary, line in summaries if summary.number not in self}
            data = b"".join(line for _, line in new.values())
            if self._has_incomplete_line():
                # Another worker was killed, or frozen, within it.
                data = b"\n" + data
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            for summary, _ in new.values():
                self._record(summary)
            # Without locks another worker may have written in between. Then its lines are read the next time.
            if os.lseek(self._file, 0, os.SEEK_CUR) == self._size + len(data):
                self._size += len(data)

    def sync(self) -> None:
        """Make sure that what was written survives a loss of power. May run beside `write`."""
        with output.in_words(self._path):
            os.fsync(self._file)

    def finish(self, order: Order = "ended") -> None:
        """Write the output, and the file of errors if there is one. Nothing can be written after that.

        Without a file of errors, the order "ended" only renames the journal.

        Raises:
            BatchOutputError: the disk is full or fails. The journal is kept.
        """
        if self.finished:
            return
        with output.in_words(self._path):
            self._catch_up_and_cut()
            os.fsync(self._file)
            for path in (self._path, self._errors):
                if path:
                    # Another batch may have written it meanwhile.
                    output.is_owned(path, self.key)
            if order == "ended" and self._is_tidy and self._errors is None:
                self._rename()
            else:
                output.write(self._file, self.key, order, self._path, self._errors)
                self._part.unlink(missing_ok=True)
            output.sync_folder(self._path)
            self.suspects.remove()
        self.finished = True
        self.close()

    def cut(self) -> None:
        """End early: the output has the lines that ended, in that order, errors among them. Takes a moment."""
        self._errors = None
        self.finish("ended")

    def resume(self) -> None:
        """Go on with a finished output that was cut.

        Raises:
            BatchOutputError: the disk fails.
        """
        with output.in_words(self._path):
            self._path.replace(self._part)
            self.counts, self.seen, self._ended, self._size = Counts(), Seen(), bytearray(), 0
            self._is_tidy, self.finished = True, False
            self._file = os.open(self._part, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._catch_up_and_cut()

    def close(self) -> None:
        """Close the file. It is kept for whoever goes on with the batch, unless it is empty."""
        if self._file < 0:
            return
        if not self.finished:
            with self._locked():
                if not os.fstat(self._file).st_size:
                    self._part.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1

    def _rename(self) -> None:
        try:
            self._part.replace(self._path)
        except FileNotFoundError:
            # Another worker has finished the batch, or somebody has removed the journal.
            if not output.is_owned(self._path, self.key):
                output.write(self._file, self.key, "ended", self._path, None)

    def _catch_up(self) -> None:
        """Read what was appended to the file since the last time."""
        if os.fstat(self._file).st_size != self._size:
            self._size = self._read(self._file, self._size)

    def _has_incomplete_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return size > self._size and os.pread(self._file, 1, size - 1) != b"\n"

    def _catch_up_and_cut(self) -> None:
        """Remove a last line that is not complete, too: its worker was killed, or the disk was full."""
        with self._locked():
            self._catch_up()
            if os.fstat(self._file).st_size > self._size:
                os.ftruncate(self._file, self._size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other workers from writing, on file systems that know locks, and unless the other one is frozen."""
        self._lock()
        while (status := os.fstat(self._file)).st_nlink == status.st_size == 0:
            # Another worker, which had no result, has removed the empty file.
            os.close(self._file)
            self._file = self._open_part()
            self._lock()
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _lock(self) -> None:
        until = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                return
            else:
                return

    def _read(self, file: int, start: int) -> int:
        """Read the results from an offset on. Return the offset behind the last complete line.

        Raises:
            InvalidRequestError: another batch has begun to write there at the same time.
        """
        for offset, line in output.lines(file, start):
            summary = results.summary(self.key, line)
            if summary is None and file == self._file:
                output.check_line(self._path, self.key, line)
            self._is_tidy &= summary is not None and summary.number not in self
            if summary:
                self._record(summary)
            start = offset + len(line)
        return start

    def _record(self, summary: results.Summary) -> None:
        if summary.number in self:
            return
        self._ended.extend(bytes(max(summary.number + 1 - len(self._ended), 0)))
        self._ended[summary.number] = 1
        self.counts.add(summary)
        if summary.custom_id is not None:
            self.seen.add(summary.custom_id)

    def _summary(self, line: bytes) -> results.Summary:
        summary = results.summary(self.key, line)
        if summary is None:
            raise ValueError("a line is no result of this batch")
        return summary
