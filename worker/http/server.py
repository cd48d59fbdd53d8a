"""The HTTP server. It runs in a thread with a loop of its own, because loading the model blocks the main thread."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeVar, cast

import uvicorn
import uvloop

from worker.errors import ConfigurationError
from worker.forks import PausedInForks
from worker.http.protocol import LIMITS, Limits, Protocol, Waiting
from worker.request.asgi import App

KEEP_ALIVE_SECONDS = 75
"""Longer than load balancers keep idle connections, so that they never use one that was just closed."""

T = TypeVar("T")


class HttpServer:
    """Serves an app on some ports from its own thread, within a `with` block."""

    def __init__(self, app: App, ports: Iterable[int], host: str, limits: Limits = LIMITS) -> None:
        self._sockets = [_listen(host, port) for port in dict.fromkeys(ports)]
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._loop = self._runner.get_loop()
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=partial(Protocol, waiting=Waiting(limits)),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._pauses = PausedInForks(self._thread, self._loop)

    @property
    def ports(self) -> list[int]:
        """The ports it listens on."""
        return [listener.getsockname()[1] for listener in self._sockets]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def notify(self, event: asyncio.Event) -> None:
        """Set an event of the server's loop; signal handlers may call this. Without effect once the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(event.set)

    def _serve(self) -> None:
        with self._runner:
            self._runner.run(self._serve_until_exit())

    async def _serve_until_exit(self) -> None:
        await self._server.serve(sockets=self._sockets)
        # uvloop cannot end its loop while connections are open whose clients still send or do not read.
        for connection in [*self._server.server_state.connections]:
            cast(Protocol, connection).abort()
        await asyncio.sleep(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")
    except OSError as error:
        raise ConfigurationError(
            f"Port {port} cannot be opened: {error.strerror} (HOST={host!r}). Choose another with PORT, PORT_HEALTH or "
            "METRICS_PORT. HOST must be an address of this machine."
        ) from None
