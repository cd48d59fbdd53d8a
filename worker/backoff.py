"""How long to wait before the next attempt. Pure: randomness is an argument."""

import random
from collections.abc import Callable


class Backoff:
    """Waits that double from `first` to `most` seconds, with jitter so that workers do not retry at the same moment."""

    def __init__(self, first: float, most: float, chance: Callable[[], float] = random.random) -> None:
        self._first = first
        self._most = most
        self._chance = chance
        self._ceiling = first

    def next(self) -> float:
        """Return the next wait in seconds: between half of the current ceiling and all of it."""
        ceiling = self._ceiling
        self._ceiling = min(2 * ceiling, self._most)
        return ceiling * (0.5 + 0.5 * self._chance())

    def reset(self) -> None:
        """Start again with the first wait, after a success."""
        self._ceiling = self._first
