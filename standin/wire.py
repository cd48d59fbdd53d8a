"""The little of HTTP that the stand-in needs, straight on ASGI: a request per token batch has to stay cheap."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
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


class ClientGoneError(Exception):
    """The other side has closed the connection; there is nobody left to answer."""


class RefusedError(Exception):
    """The request is answered with this status and a sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Request:
    """One HTTP request; `fault` is what the app decided shall go wrong with it, and `path` what follows the verb."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, path: str) -> None:
        self.scope = scope
        self.path = path
        self.method: str = scope["method"]
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
                raise ClientGoneError
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def json_if_any(self, limit: int | None = None) -> dict[str, Json] | None:
        """The body as a JSON object, whatever Content-Type says: the SDK posts JSON as form data. None if empty."""
        body = await self.body()
        if not body:
            return None
        if limit is not None and len(body) > limit:
            raise RefusedError(413, f"the body has {len(body)} bytes and the limit is {limit}")
        try:
            value = json.loads(body)
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RefusedError(400, "the body is not a JSON object")
        return value

    async def json(self, limit: int | None = None) -> dict[str, Json]:
        value = await self.json_if_any(limit)
        if value is None:
            raise RefusedError(400, "the body is empty")
        return value

    async def gone(self) -> None:
        """Wait until the client closes the connection. The body must have been read before."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client leaves before there is one."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self.gone())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGoneError
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Call `callback` should the client leave before the reply is complete."""

        async def watch() -> None:
            await self.gone()
            callback()

        self._watcher = asyncio.create_task(watch())

    async def reset(self) -> NoReturn:
        """Reset the connection under the client, and end the request. The body must have been read before."""
        self.scope["extensions"][RESET_EXTENSION]["reset"]()
        await self.gone()
        raise ClientGoneError

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()


class Reply(Protocol):
    """An answer that can write itself."""

    async def send(self, send: Send) -> None: ...


@dataclass(frozen=True, slots=True)
class Plain:
    """An answer that is known as a whole."""

    status: int = 200
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    """What is sent besides the type and the length."""

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", self.content_type)]
        headers += [(name.encode(), value.encode()) for name, value in self.headers.items()]
        if self.status != 204:
            headers.append((b"content-length", b"%d" % len(self.body)))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@dataclass(frozen=True, slots=True)
class Cut:
    """An answer whose connection is reset after half of its body."""

    reply: Reply
    request: Request

    async def send(self, send: Send) -> None:
        async def half(message: Message) -> None:
            if message["type"] == "http.response.start":
                await send(message)
                return
            body = message.get("body", b"")
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            await self.request.reset()

        await self.reply.send(half)


@dataclass(frozen=True, slots=True)
class EventStream:
    """Server-sent events, each part written out as soon as it is there."""

    parts: AsyncIterator[bytes]

    async def send(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})


def json_reply(value: Json, status: int = 200) -> Plain:
    return Plain(status, json.dumps(value, ensure_ascii=False).encode())
