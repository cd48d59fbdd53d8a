"""The worker's state, the reason for it, and what callers are told. Everything that needs to know asks here."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal

from worker import race
from worker.errors import ENGINE_DIED, LEAVING, LOADING, EngineDiedError, JobError, StartFailedError, UnavailableError
from worker.resume import Resumes

State = Literal["starting", "ready", "draining", "failed", "dead", "refused"]

ERROR_SECONDS = 1.5
"""How long a stopped worker takes to send errors to the callers whose requests it ends."""
DEATH_SECONDS = 3.0
"""The same after the engine's death, when nobody is about to kill the worker."""


class Lifecycle:
    """`starting`, then `ready`, and `draining` once the worker is stopped.

    `dead`: the engine has died. `failed`: the worker cannot go on, but another one may. `refused`: the settings cannot
    work, and every caller is told why. Any thread may read the state. It changes in the loop that serves, or before
    anything is served.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._state: State = "starting"
        self._reason = ""
        self._engine_is_dead: Callable[[], bool] = lambda: False
        self.resumes = Resumes()
        """Notices when the worker was frozen, and counts time without that."""
        self.stopping = asyncio.Event()
        """Set when the worker is stopped: it takes no new requests."""
        self.over = asyncio.Event()
        """Set when running requests have to end now, with `error()`."""

    @property
    def state(self) -> State:
        """The current state."""
        if self._engine_is_dead():
            return "dead"
        return "draining" if self._state == "ready" and self.stopping.is_set() else self._state

    @property
    def uptime(self) -> float:
        """Seconds since the worker started."""
        return time.monotonic() - self._began

    def ready(self, engine_is_dead: Callable[[], bool]) -> None:
        """Requests are answered, for as long as `engine_is_dead` returns False."""
        self._state, self._engine_is_dead = "ready", engine_is_dead

    def fail(self, reason: str) -> None:
        """The worker cannot go on; another one may."""
        self._state, self._reason = "failed", reason.rstrip(".")
        self.over.set()

    def refuse(self, reason: str) -> None:
        """The worker can never answer, for this reason."""
        self._state, self._reason = "refused", reason
        self.over.set()

    async def serve(
        self, died: Coroutine[Any, Any, object], idle: Callable[[float], Awaitable[object]], grace: float
    ) -> None:
        """Wait until the worker is stopped or cannot go on, and end its requests.

        After a stop they have `grace` seconds to finish. Those that still run end with an error. `died` returns, or
        raises, when the worker cannot go on; `idle(seconds)` waits at most so long until no request runs.

        Raises:
            EngineDiedError: `died` has returned.
        """
        dying = asyncio.ensure_future(died)
        try:
            stopped = await race.first(dying, self.stopping.wait()) is not dying
            self.stopping.set()
            if stopped:
                await race.first(dying, idle(grace))
            self.over.set()
            await idle(DEATH_SECONDS if dying.done() else ERROR_SECONDS)
            if dying.done():
                dying.result()
                raise EngineDiedError
        finally:
            await race.end(dying)

    def error(self) -> JobError:
        """Return the error for a request that is refused, or ended before its response is complete."""
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
