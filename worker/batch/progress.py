"""How far a batch is. Pure: time is an argument."""

from dataclasses import dataclass, replace

from worker.batch.results import Summary


@dataclass(slots=True)
class Counts:
    """The lines that ended, and the tokens of their answers."""

    completed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def done(self) -> int:
        """The lines that ended, with an answer or an error."""
        return self.completed + self.failed

    def add(self, summary: Summary) -> None:
        """Count one more result."""
        self.completed += summary.is_ok
        self.failed += not summary.is_ok
        self.tokens_in += summary.tokens_in
        self.tokens_out += summary.tokens_out

    def copy(self) -> "Counts":
        """Return these counts as they are now."""
        return replace(self)


@dataclass(frozen=True, slots=True)
class Progress:
    """A batch at one moment. The rates are averages since this worker began, without what an earlier one did."""

    counts: Counts
    total: int | None
    """The number of lines that are not empty; None until the whole input was counted."""
    seconds: float
    """Since this worker began."""
    tokens_per_second: float
    """Generated tokens."""
    seconds_left: float | None
    """None while nobody can know."""

    @property
    def percent(self) -> float | None:
        """The lines that ended in percent of all; None until these were counted."""
        return None if self.total is None else 100.0 * self.counts.done / max(self.total, 1)


def progress(before: Counts, now: Counts, total: int | None, seconds: float) -> Progress:
    """Return the progress of a worker that began `seconds` ago, when `before` had ended."""
    lines, tokens = now.done - before.done, now.tokens_out - before.tokens_out
    left = (total - now.done) * seconds / lines if total is not None and lines else None
    return Progress(now.copy(), total, seconds, tokens / seconds if seconds > 0 else 0.0, left)
