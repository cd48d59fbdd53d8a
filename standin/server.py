"""Serve a platform on 127.0.0.1 from a background thread, and build the environment of a worker for it."""

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .app import create_app
from .platform import Platform
from .wire import RESET_EXTENSION

P = ParamSpec("P")
T = TypeVar("T")

HOST = "127.0.0.1"
# Long, because the SDK's ping process does not retry when the server has closed its idle connection.
KEEP_ALIVE_SECONDS = 600


class ResettableProtocol(HttpToolsProtocol):
    """Lets the app reset the connection of a request, which plain ASGI cannot do."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {RESET_EXTENSION: {"reset": self.reset}}

    def reset(self) -> None:
        """Close the connection with a TCP reset."""
        # With a linger time of 0, the kernel sends RST instead of FIN.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class StandinServer:
    """The stand-in, serving within a `with` block. Port 0 picks a free port. `OSError` if the port is in use."""

    def __init__(self, platform: Platform | None = None, port: int = 0) -> None:
        self.platform = platform or Platform()
        self._socket = _listen(port)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self.base_url_v2 = f"{self.url}/v2"
        self.endpoint_url = f"{self.base_url_v2}/{self.platform.endpoint}"
        self.openai_base_url = f"{self.endpoint_url}/openai/v1"
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._loop = self._runner.get_loop()
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(self.platform),
                http=ResettableProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="standin", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Waiting long polls are dropped, as on the real platform.
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def drop_connections(self) -> None:
        """Reset every connection, as happens to a worker that was frozen for a long time."""

        def drop() -> None:
            for connection in list(self._server.server_state.connections):
                if isinstance(connection, ResettableProtocol):
                    connection.reset()

        self.call(drop)

    def outage(self, seconds: float) -> Future[None]:
        """Reset every connection now, and every request of the workers for `seconds`. Return at once.

        The returned future is done when the outage ends. Outages must not overlap.
        """
        behaviour = self.platform.behaviour
        behaviour.is_away = True
        self.drop_connections()

        async def end() -> None:
            await asyncio.sleep(seconds)
            behaviour.is_away = False

        return self.start(end())

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function` in the platform's event loop and return its result."""

        async def run() -> T:
            return function(*args, **kwargs)

        return self.start(run()).result()

    def start(self, work: Awaitable[T]) -> Future[T]:
        """Start `work` in the platform's event loop and return at once."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    def wait_until(self, condition: Callable[[Platform], Any], timeout: float = 20.0) -> None:
        """Wait until `condition` holds. Raise `TimeoutError` after `timeout` seconds."""

        async def wait() -> None:
            async with asyncio.timeout(timeout):
                await self.platform.until(lambda platform: bool(condition(platform)))

        self.start(wait()).result()

    def _serve(self) -> None:
        with self._runner:
            self._runner.run(self._server.serve(sockets=[self._socket]))


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def worker_environment(port: int, endpoint: str = "local", worker_id: str = "worker-1") -> dict[str, str]:
    """The variables that RunPod sets in the container of a queue worker.

    The SDK replaces `$ID` and `$RUNPOD_POD_ID`, and appends `&…` to the addresses, so each needs a query string.
    """
    base = f"http://{HOST}:{port}/v2/{endpoint}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=CPU",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=CPU",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=CPU",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
        "RUNPOD_POD_ID": worker_id,
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_AI_API_KEY": "local-key",
        "RUNPOD_PING_INTERVAL": "1000",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
