"""Calls an ASGI app in this process: no socket, no HTTP parsing, and the app sees an ordinary client.

`exchange()` sends one request and gives a `Response` whose body is read as it is produced. Leaving the block early
is the client's disconnect, by which Starlette and vLLM end what they were doing for it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

DISCONNECT_SECONDS = 1.0
"""How long an app may take to notice that its client is gone before its task is cancelled outright."""

log = logging.getLogger(__name__)


class IncompleteResponseError(Exception):
    """The app ended before its response did; `__cause__` is what it raised, if anything."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request; `headers` are lower-case names with their values."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def scope(self) -> dict[str, Any]:
        """Return the ASGI scope. Version 2.3 makes Starlette listen for the disconnect while it streams."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query.encode(),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": {},
        }


class Response:
    """The app's answer. The status and headers are there from the start; the body is read as it comes."""

    def __init__(self, request: Request) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._request_body: bytes | None = request.body
        self._buffer = bytearray()
        self._complete = False
        self._readable = asyncio.Event()
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._gone = asyncio.Event()

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self, linger: float = 0.0) -> bytes:
        """Return what has come since the last call, waiting for a first byte; `b""` is the end.

        With `linger`, wait up to that many seconds first, less when the body ends, so that more is there.

        Raises:
            IncompleteResponseError: the app ended before its response.
        """
        if linger > 0 and not self._ended.is_set():
            try:
                async with asyncio.timeout(linger):
                    await self._ended.wait()
            except TimeoutError:
                pass
        await self._readable.wait()
        data = bytes(self._buffer)
        self._buffer.clear()
        if not self._ended.is_set():
            self._readable.clear()
        if not data and not self._complete:
            raise IncompleteResponseError("the app ended before its response")
        return data

    async def read_all(self) -> bytes:
        """Return the whole body."""
        await self._ended.wait()
        return await self.read()

    # The app's side.

    async def receive(self) -> Message:
        """Give the app the request's body once, then the disconnect when there is one."""
        if self._request_body is not None:
            body, self._request_body = self._request_body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message from the app; a client that is gone is an `OSError`, as from a socket."""
        if self._gone.is_set():
            raise OSError("the client is gone")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]
            }
            self._started.set()
        elif message["type"] == "http.response.body":
            self._buffer += message.get("body", b"")
            self._complete = not message.get("more_body", False)
            if self._complete:
                self._end()
            elif self._buffer:
                self._readable.set()

    def _end(self) -> None:
        self._started.set()
        self._ended.set()
        self._readable.set()

    async def opened(self, task: asyncio.Task[None]) -> None:
        """Wait for the status; an app that ended without one is an error."""
        task.add_done_callback(lambda _: self._end())
        await self._started.wait()
        if not self.status:
            cause = None if task.cancelled() else task.exception()
            raise IncompleteResponseError("the app gave no response") from cause

    def disconnect(self) -> None:
        """Be gone, from the app's point of view."""
        self._gone.set()


@asynccontextmanager
async def exchange(app: App, request: Request) -> AsyncIterator[Response]:
    """Send `request` to `app`; at the end of the block the app has stopped working on it.

    Raises:
        IncompleteResponseError: the app ended without a response.
    """
    response = Response(request)
    task = asyncio.create_task(_run(app, request, response))
    try:
        await response.opened(task)
        yield response
    finally:
        response.disconnect()
        if not task.done():
            await asyncio.wait({task}, timeout=DISCONNECT_SECONDS)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _run(app: App, request: Request, response: Response) -> None:
    try:
        await app(request.scope(), response.receive, response.send)
    except OSError as error:
        log.debug("the app stopped: %s", error)
