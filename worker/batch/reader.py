"""The lines of a batch that have not ended, parsed a few at a time."""

from threading import Lock

from worker.batch import lines
from worker.batch.journal import Journal
from worker.batch.lines import Line, LineError
from worker.batch.source import Source

AHEAD_LINES = 256
"""The most lines that are parsed at a time."""
AHEAD_BYTES = 1 << 20
"""How many bytes of them are parsed at a time, and the line that exceeds them."""


class Reader:
    """Reads a batch's input in order, once. Its methods block, and are called in threads."""

    def __init__(self, source: Source, journal: Journal) -> None:
        self._lines = source.lines()
        self._limit = source.limit
        self._journal = journal
        self._lock = Lock()

    def read(self) -> list[Line | LineError]:
        """Return the next lines that have not ended; `[]` once there are none.

        The first line in the input with a `custom_id` has it, whichever ends first. A later one gets an error.

        Raises:
            InvalidRequestError: the input cannot be read, is damaged, or has too many lines.
        """
        found: list[Line | LineError] = []
        size = 0
        with self._lock:
            for number, text in self._lines:
                if number in self._journal:
                    continue
                found.append(self._parsed(number, text))
                size += len(text)
                if len(found) >= AHEAD_LINES or size >= AHEAD_BYTES:
                    break
        return found

    def _parsed(self, number: int, text: bytes) -> Line | LineError:
        line = lines.parse(number, text, self._limit)
        if line.custom_id is not None and not self._journal.seen.add(line.custom_id):
            return lines.duplicate(line)
        return line
