"""Requests and replies on plain ASGI. No framework, because the worker sends one request per batch of tokens."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from .behaviour import NO_FAULT, Fault
from .jobs import Json

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
T = TypeVar("T")

RESET_EXTENSION = "standin.reset"
TOO_LARGE = 413


class DisconnectedError(Exception):
    """The client has closed the connection."""


class HttpError(Exception):
    """The request is answered with an error: an HTTP status and a message."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Request:
    """One HTTP request. `path` is the part after the verb, `fault` the fault to inject."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, path: str) -> None:
        self.scope = scope
        self.path = path
        self.method: str = scope["method"]
        self.client: tuple[str, int] = scope["client"]
        """Address and port of the client, which identify the connection."""
        self.fault: Fault = NO_FAULT
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1"), keep_blank_values=True))

    def header(self, name: bytes) -> str:
        values: list[bytes] = [value for key, value in self.scope["headers"] if key == name]
        return values[0].decode("latin-1") if values else ""

    async def body(self) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise DisconnectedError
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json_if_any(self, limit: int | None = None) -> dict[str, Json] | None:
        """The body as a JSON object, or None if empty. Content-Type is ignored: the SDK labels JSON as form data."""
        body = await self.body()
        if not body:
            return None
        if limit is not None and len(body) > limit:
            raise HttpError(TOO_LARGE, f"The body has {len(body)} bytes. The limit is {limit} bytes.")
        try:
            value = json.loads(body)
        except ValueError as error:
            raise HttpError(400, f"The body is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise HttpError(400, "The body must be a JSON object.")
        return value

    async def json(self, limit: int | None = None) -> dict[str, Json]:
        value = await self.json_if_any(limit)
        if value is None:
            raise HttpError(400, "The body is empty. Send a JSON object.")
        return value

    async def disconnected(self) -> None:
        """Wait until the client closes the connection. Read the body first."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def unless_disconnected(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, or cancel it and raise `DisconnectedError` if the client disconnects first."""
        task, disconnect = asyncio.ensure_future(work), asyncio.ensure_future(self.disconnected())
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise DisconnectedError
            return task.result()
        finally:
            task.cancel()
            disconnect.cancel()

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` if the client disconnects before the reply is complete."""

        async def watch() -> None:
            await self.disconnected()
            callback()

        self._watcher = asyncio.create_task(watch())

    async def reset(self) -> NoReturn:
        """Reset the connection and end the request. Read the body first."""
        self.scope["extensions"][RESET_EXTENSION]["reset"]()
        await self.disconnected()
        raise DisconnectedError

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()


class Reply(Protocol):
    """A reply that writes itself to the connection."""

    async def send(self, send: Send) -> None: ...


@dataclass(frozen=True, slots=True)
class PlainReply:
    """A complete reply."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers besides Content-Type and Content-Length."""

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type)]
        headers += [(name.encode(), value.encode()) for name, value in self.headers.items()]
        if self.status != 204:
            headers.append((b"content-length", b"%d" % len(self.body)))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@dataclass(frozen=True, slots=True)
class CutReply:
    """A reply of which half the body is sent before the connection is reset."""

    reply: Reply
    request: Request

    async def send(self, send: Send) -> None:
        async def send_half(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                return
            body = message.get("body", b"")
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            await self.request.reset()

        await self.reply.send(send_half)


@dataclass(frozen=True, slots=True)
class LateReply:
    """A reply whose status and headers are sent at once, and its body `delay` seconds later."""

    reply: Reply
    delay: float

    async def send(self, send: Send) -> None:
        async def send_late(message: Message) -> None:
            if message.get("body"):
                # The server cancels replies when it closes. What was announced in the head must still follow.
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(self.delay)
            await send(message)

        await self.reply.send(send_late)


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events. Each part is sent as soon as it is available."""

    parts: AsyncIterator[bytes]

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


def json_reply(value: Json, status: int = 200) -> PlainReply:
    return PlainReply(status, json.dumps(value, ensure_ascii=False).encode())
