"""Calls an ASGI app in this process: no socket, no HTTP parsing, and the app sees an ordinary client.

`exchange()` sends one request and gives a `Response` whose body is read as it is produced. Leaving the block early
is the client's disconnect, by which Starlette and vLLM end what they were doing for it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

DISCONNECT_SECONDS = 0.1
"""How long an app may take to notice by itself that its client is gone."""


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
            "headers": [(name.encode("latin-1"), value.encode()) for name, value in self.headers.items()],
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
        self._failure: BaseException | None = None
        self._readable = asyncio.Event()
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._gone = asyncio.Event()

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self) -> bytes:
        """Return what has come since the last call, waiting for a first byte; `b""` is the end.

        Raises:
            IncompleteResponseError: the app ended before its response.
        """
        await self._readable.wait()
        data = bytes(self._buffer)
        self._buffer.clear()
        if not self._ended.is_set():
            self._readable.clear()
        if not data:
            self._check_complete()
        return data

    async def read_all(self) -> bytes:
        """Return the whole body.

        Raises:
            IncompleteResponseError: the app ended before its response.
        """
        await self._ended.wait()
        self._check_complete()
        return await self.read()

    def _check_complete(self) -> None:
        if not self._complete:
            raise IncompleteResponseError("the app ended before its response") from self._failure

    # The app's side.

    async def receive(self) -> Message:
        """Give the app the request's body once, then the disconnect when there is one."""
        if self._request_body is not None:
            body, self._request_body = self._request_body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message from the app; drop it when the client is gone, as uvicorn does."""
        if self._gone.is_set():
            return
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

    def app_ended(self, task: asyncio.Future[None]) -> None:
        """Note that no more will come. What a complete response's app raised afterwards has been answered by it."""
        self._failure = None if task.cancelled() else task.exception()
        self._end()

    async def opened(self) -> None:
        """Wait for the status; an app that ended without one is an error."""
        await self._started.wait()
        if not self.status:
            raise IncompleteResponseError("the app gave no response") from self._failure

    def disconnect(self) -> None:
        """Be gone, from the app's point of view."""
        self._gone.set()


@asynccontextmanager
async def exchange(app: App, request: Request, grace: float = DISCONNECT_SECONDS) -> AsyncIterator[Response]:
    """Send `request` to `app`; at the end of the block the app has stopped working on it.

    An app that does not stop by itself within `grace` seconds is cancelled.

    Raises:
        IncompleteResponseError: the app ended without a response.
    """
    response = Response(request)
    task = asyncio.ensure_future(app(request.scope(), response.receive, response.send))
    task.add_done_callback(response.app_ended)
    try:
        await response.opened()
        yield response
    finally:
        response.disconnect()
        try:
            await asyncio.wait({task}, timeout=grace)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
