"""When the next part of a stream is sent. Pure: the time is an argument.

Tokens that are generated while a stream waits become one part, so a fast stream costs no more than a slow one.
"""

from collections.abc import Callable
from contextvars import ContextVar

STREAMS = 28
"""With so many more streams, the longest window has the length of one more shortest window."""
LONGEST = 4
"""The most that the longest window becomes, in shortest windows."""


class Pace:
    """The pace of one stream: the first part at once, then after windows of 1, 2, 4, … times `shortest` seconds.

    A reader notices a delay in the first words and none in the tenth line. How long the windows become follows the
    number of `streams` that run: up to `shortest` for one, up to four times that for 85 and more.
    """

    def __init__(self, shortest: float, streams: Callable[[], int] = lambda: 1) -> None:
        self._shortest = self._window = shortest
        self._streams = streams
        self._due = float("-inf")

    def wait(self, now: float) -> float:
        """Return the seconds until the next part is due; 0 or less if it is due now."""
        return self._due - now

    def sent(self, now: float) -> None:
        """Note that a part was sent."""
        longest = self._shortest * min(1 + max(self._streams() - 1, 0) / STREAMS, LONGEST)
        self._window = min(self._window, longest)
        self._due = now + self._window
        self._window *= 2


current_pace: ContextVar[Pace | None] = ContextVar("current_pace", default=None)
"""The pace of the request that the current task works for; None sends each token at once."""
