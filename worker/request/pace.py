"""When a stream's next part goes out: the first at once, a later one when its window has passed since the last.

What the engine generates in between is one part, so a fast stream costs no more to tell than a slow one. Pure: the
clock comes in as an argument.
"""

from contextvars import ContextVar


class Pace:
    """The pace of one job's stream.

    The first window is `shortest` seconds, the second twice, every other four times as long: a reader notices 25 ms in
    the first words and nothing in the tenth line.
    """

    def __init__(self, shortest: float) -> None:
        self._window = shortest
        self._longest = 4 * shortest
        self._due = float("-inf")

    def wait(self, now: float) -> float:
        """Return for how many seconds the next part has to wait; none when that is not above 0."""
        return self._due - now

    def went(self, now: float) -> None:
        """Note that a part has gone out."""
        self._due = now + self._window
        self._window = min(2 * self._window, self._longest)


paced: ContextVar[Pace | None] = ContextVar("paced", default=None)
"""The pace of the job in whose context the engine is called; without one, parts go out as they are generated."""
