"""When the next part of a stream is sent. Pure: the time is an argument.

Tokens that are generated while a stream waits become one part, so a fast stream costs no more than a slow one.
"""

from contextvars import ContextVar


class Pace:
    """The pace of one stream: the first part at once, then after windows of 1, 2, 4, 4, 4 … times `shortest` seconds.

    A reader notices a delay in the first words and none in the tenth line.
    """

    def __init__(self, shortest: float) -> None:
        self._window = shortest
        self._longest = 4 * shortest
        self._due = float("-inf")

    def wait(self, now: float) -> float:
        """Return the seconds until the next part is due; 0 or less if it is due now."""
        return self._due - now

    def sent(self, now: float) -> None:
        """Note that a part was sent."""
        self._due = now + self._window
        self._window = min(2 * self._window, self._longest)


current_pace: ContextVar[Pace | None] = ContextVar("current_pace", default=None)
"""The pace of the request that the current task works for; None sends each token at once."""
