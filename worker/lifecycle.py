"""Where the worker is in its life, for whoever asks, from any thread."""

import time
from collections.abc import Callable
from typing import Any, Literal

State = Literal["loading", "ready", "draining", "dead", "failed"]


class Status:
    """Loading, then ready, at the end draining; dead as soon as its engine is; failed where it can never be ready."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._state: State = "loading"
        self._is_dead: Callable[[], bool] = lambda: False
        self.engine: dict[str, Any] | None = None
        """What the engine tells of itself, once it is there."""
        self.failure: str | None = None
        """Why the worker can never be ready."""

    @property
    def state(self) -> State:
        """The state at this moment."""
        return "dead" if self._is_dead() else self._state

    @property
    def uptime(self) -> float:
        """Seconds since the worker began."""
        return time.monotonic() - self._began

    def ready(self, engine: dict[str, Any], is_dead: Callable[[], bool]) -> None:
        """Note that the engine answers, for as long as it is not dead."""
        self.engine, self._is_dead, self._state = engine, is_dead, "ready"

    def fail(self, why: str) -> None:
        """Note that no engine will ever be there, and why."""
        self.failure, self._state = why, "failed"

    def drain(self) -> None:
        """Note that the worker takes nothing more."""
        self._state = "draining"
