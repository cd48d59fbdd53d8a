"""The end of a node whose cluster is over: it kills its engine's processes, and after some seconds itself.

Nothing in vLLM notices that another machine is gone. But everything that waits for an engine process notices when it is
killed, so that the rest is the ordinary end after an engine's death.
"""

import logging
import threading
import time

from worker import processes

log = logging.getLogger(__name__)

BACKSTOP_SECONDS = 6.0
"""The time for answers to callers and an orderly exit. With the silence of 8.5 s before, all ends within 15 s."""

KILL_AGAIN_SECONDS = 0.2


class Ending:
    """Ends this process, once."""

    def __init__(self) -> None:
        self._begun = False
        self._noticed = threading.Event()

    def begin(self, code: int | None) -> None:
        """Kill the engine, or a download, again and again, because it may be about to start.

        With a code, this process ends with it after `BACKSTOP_SECONDS`. With None, the killing stops at `noticed`.
        """
        if not self._begun:
            self._begun = True
            threading.Thread(target=self._end, args=(code,), name="cluster end", daemon=True).start()

    def noticed(self) -> None:
        """The main thread knows that the cluster is over, and starts no engine."""
        self._noticed.set()

    def _end(self, code: int | None) -> None:
        if code is None:
            processes.kill_all()
            while not self._noticed.wait(KILL_AGAIN_SECONDS):
                processes.kill_all()
            return
        deadline = time.monotonic() + BACKSTOP_SECONDS
        while time.monotonic() < deadline:
            processes.kill_all()
            time.sleep(KILL_AGAIN_SECONDS)
        log.warning("The worker did not end by itself in time. It ends now with code %d.", code)
        processes.exit_now(code)
