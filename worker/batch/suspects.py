"""The lines that were in flight when an engine died: one of them may have caused it, and would kill the next engine."""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from worker.batch import output
from worker.batch.lines import LineError

SUSPECT = 2
"""A line that was in flight at so many deaths is asked alone from then on."""
GUILTY = 3
"""After so many, it is not asked again."""


class Suspects:
    """How many engines have died while a line was in flight: a hidden file beside the output. Its methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._deaths: Counter[int] = Counter()
        with suppress(OSError, ValueError):
            self._deaths.update({int(number): deaths for number, deaths in json.loads(path.read_bytes()).items()})

    def __contains__(self, number: int) -> bool:
        """Return whether a line must be asked alone."""
        return self._deaths[number] >= SUSPECT

    def error(self, number: int, custom_id: str) -> LineError | None:
        """Return the error of a line that must not be asked again."""
        if self._deaths[number] < GUILTY:
            return None
        message = f"The engine died {GUILTY} times while it answered this line, the last time with no other line."
        return LineError(number, custom_id, "engine_died", message)

    def add(self, numbers: Iterable[int]) -> None:
        """Note that an engine died while these lines were in flight.

        Raises:
            BatchOutputError: the disk is full or fails.
        """
        self._deaths.update(numbers)
        with output.in_words(self._path), output.replacing(self._path) as file:
            file.write(json.dumps(self._deaths).encode())

    def remove(self) -> None:
        """Remove the file: the batch has ended."""
        self._path.unlink(missing_ok=True)
