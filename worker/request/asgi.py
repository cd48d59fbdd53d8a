"""ASGI types, and calls of an ASGI app in this process: no socket and no HTTP parsing.

`exchange()` sends one request and returns a `Response` whose body can be read while the app produces it. Leaving the
block early looks like a client disconnect to the app, and Starlette and vLLM then stop their work for it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from worker import race

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

DISCONNECT_SECONDS = 0.1
"""How long an app gets to notice a disconnect before it is cancelled."""


class IncompleteResponseError(Exception):
    """The app ended without completing its response. `__cause__` is the app's exception, if there was one."""


class ClientDisconnectedError(OSError):
    """Nobody takes the response any more. Starlette takes an OSError from `send` for a disconnect."""


def header(scope: Message, name: bytes) -> bytes:
    """Return the value of a request header; `b""` without it."""
    return next((value for key, value in scope["headers"] if key == name), b"")


def with_headers(scope: Message, headers: dict[str, str]) -> Message:
    """Return the scope with these request headers, which replace those of the same names."""
    added = {name.encode(): value.encode("latin-1", "replace") for name, value in headers.items()}
    kept = [pair for pair in scope["headers"] if pair[0] not in added]
    return {**scope, "headers": [*kept, *added.items()]}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. Header names are in lower case."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    state: dict[str, Any] = field(default_factory=dict)

    def scope(self) -> dict[str, Any]:
        """Return the ASGI scope. With version 2.3 Starlette listens for a disconnect while it streams."""
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
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": dict(self.state),
        }


class Response:
    """The app's response: status and headers from the start, the body as it is produced."""

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
        """Whether the body consists of server-sent events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def read(self) -> bytes:
        """Return the bytes that have arrived since the last call, at least one; `b""` at the end.

        Raises:
            IncompleteResponseError: the app ended before its response was complete.
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
        """Return the rest of the body.

        Raises:
            IncompleteResponseError: the app ended before its response was complete.
        """
        await self._ended.wait()
        self._check_complete()
        return await self.read()

    def _check_complete(self) -> None:
        if not self._complete:
            raise IncompleteResponseError("the app did not complete its response") from self._failure

    # The app calls the following methods.

    async def receive(self) -> Message:
        """Return the request's body first, then wait for the disconnect."""
        if self._request_body is not None:
            body, self._request_body = self._request_body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message from the app. After a disconnect it is dropped, as uvicorn does."""
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
        """Note the app's end. An exception after a complete response does not matter to the client."""
        self._failure = None if task.cancelled() else task.exception()
        self._end()

    async def opened(self) -> None:
        """Wait for the status; raise `IncompleteResponseError` if the app ends without one."""
        await self._started.wait()
        if not self.status:
            raise IncompleteResponseError("the app sent no response") from self._failure

    def disconnect(self) -> None:
        """Report a disconnect to the app."""
        self._gone.set()


@asynccontextmanager
async def exchange(app: App, request: Request, grace: float = DISCONNECT_SECONDS) -> AsyncIterator[Response]:
    """Send `request` to `app`. When the block ends, the app has stopped working on it.

    An app that does not stop within `grace` seconds after the disconnect is cancelled.

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
        await race.end(task, grace=grace)
