"""The worker's state, the reason for it, and what callers are told. Everything that needs to know asks here."""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from worker.errors import ENGINE_DIED, LEAVING, LOADING, JobError, StartFailedError, UnavailableError

State = Literal["starting", "ready", "draining", "failed", "dead", "refused"]


class Lifecycle:
    """`starting`, then `ready`, and `draining` once the worker is stopped.

    `dead`: the engine has died. `failed`: the worker cannot go on, but another one may. `refused`: the settings cannot
    work, and every caller is told why. Any thread may read the state; only the loop that serves may change it.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._state: State = "starting"
        self._reason = ""
        self._engine_is_dead: Callable[[], bool] = lambda: False
        self.over = asyncio.Event()
        """Set when running requests have to end now, with `error()`."""

    @property
    def state(self) -> State:
        """The current state."""
        return "dead" if self._engine_is_dead() else self._state

    @property
    def uptime(self) -> float:
        """Seconds since the worker started."""
        return time.monotonic() - self._began

    def ready(self, engine_is_dead: Callable[[], bool]) -> None:
        """Requests are answered, for as long as `engine_is_dead` returns False."""
        self._state, self._engine_is_dead = "ready", engine_is_dead

    def drain(self) -> None:
        """No new requests are taken; running ones may finish until `over` is set."""
        if self._state == "ready":
            self._state = "draining"

    def fail(self, reason: str) -> None:
        """The worker cannot go on; another one may."""
        self._state, self._reason = "failed", reason.rstrip(".")
        self.over.set()

    def refuse(self, reason: str) -> None:
        """The worker can never answer, for this reason."""
        self._state, self._reason = "refused", reason
        self.over.set()

    def error(self) -> JobError:
        """Return what a caller is told whose request is not answered, or not to its end."""
        match self.state:
            case "starting":
                return UnavailableError(LOADING)
            case "ready" | "draining":
                return UnavailableError(LEAVING)
            case "dead":
                return UnavailableError(ENGINE_DIED)
            case "failed":
                return UnavailableError(f"The worker has failed: {self._reason}. Send the request again later.")
            case "refused":
                return StartFailedError(self._reason)
