"""HTTP mode: vLLM's routes behind a gate, which answers before the model is there.

What the gate lets through goes to vLLM's app as it is, and what comes back is vLLM's own answer.
"""

import asyncio
import hmac
import json
import logging
import re
import uuid
from collections.abc import Awaitable
from contextlib import suppress
from typing import Self

from fastapi.responses import HTMLResponse

from worker.errors import (
    BodyTooLargeError,
    BodyTooSlowError,
    BusyError,
    InternalError,
    JobError,
    JobTimeoutError,
    MethodNotAllowedError,
    RouteNotFoundError,
    StartFailedError,
    UnauthorizedError,
    UnavailableError,
)
from worker.http import playground
from worker.http.own_routes import Monitor
from worker.lifecycle import State, Status
from worker.request import sse
from worker.request.asgi import DISCONNECT_SECONDS, App, Message, Receive, Send
from worker.request.routes import OWN_ROUTES, method_of
from worker.settings.settings import Settings
from worker.telemetry.jobs import Record, Telemetry
from worker.telemetry.logs import frames

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")

log = logging.getLogger(__name__)

Headers = dict[bytes, bytes]

BODY_SECONDS = 60.0
BODIES_BYTES = 1 << 30
"""What the bodies that are being read may come to together."""
SEND_SECONDS = 60.0
"""How long a client may take to read what it is sent before it counts as gone."""

TRACE_HEADERS = (b"traceparent", b"tracestate")
PREFLIGHT_HEADERS = {b"origin", b"access-control-request-method"}
UNPROTECTED = ("/ping", "/health")
WHY_NOT: dict[State, str] = {
    "loading": "The worker is loading its model. Try again in a few seconds.",
    "draining": "The worker is leaving. Try again: another one will answer.",
    "dead": "The worker's engine has died. Try again: another one will answer.",
}


class _ClientGoneError(Exception):
    """Nobody is there to be answered."""


class Gate:
    """Checks a request before the engine sees it, and keeps its record. An ASGI app."""

    def __init__(
        self,
        monitor: Monitor,
        status: Status,
        telemetry: Telemetry,
        settings: Settings,
        *,
        offers_engine: bool = True,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._monitor = monitor
        self._status = status
        self._telemetry = telemetry
        self._settings = settings
        self._offers_engine = offers_engine
        self._body_seconds = body_seconds
        self._keys = [key.encode() for key in settings.worker_api_key]
        # The page holds nothing that a key would have to protect; whoever uses it is asked for one.
        self._playground = _playground() if offers_engine and settings.playground else None
        self._engine: App | None = None
        self._capacity = 0
        self._reading = 0
        self._ended = asyncio.Event()
        self._why = ""
        self.running = 0
        """Requests that the engine has now."""

    def open(self, engine: App, concurrency: int) -> None:
        """Let requests through to the engine, which runs so many at once; some more may wait."""
        waiting = self._settings.max_queue
        self._engine = engine
        self._capacity = concurrency + (4 * concurrency if waiting is None else waiting)

    def end(self, why: str) -> None:
        """End what the engine still works on, with an error."""
        self._why = why
        self._ended.set()

    async def drained(self, seconds: float) -> None:
        """Wait until the engine has no more requests, but not for longer than so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.running:  # noqa: ASYNC110 - it ends the worker, once
                    await asyncio.sleep(0.05)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # A websocket that is closed before it is accepted is answered with 403.
            return await send({"type": "websocket.close"})
        headers: Headers = dict(scope["headers"])
        named = headers.get(b"x-request-id", b"")
        reply = _Reply(send, named.decode() if _REQUEST_ID.fullmatch(named) else uuid.uuid4().hex)
        try:
            await self._answer(scope, headers, receive, reply)
        except JobError as error:
            if not reply.is_recorded:
                self._telemetry.refused.labels(str(error.http_status)).inc()
            with suppress(_ClientGoneError):
                await reply.fail(error)
        except _ClientGoneError:
            return None

    async def _answer(self, scope: Message, headers: Headers, receive: Receive, reply: "_Reply") -> None:
        method, path = scope["method"], scope["path"]
        if self._playground is not None and (method, path) == ("GET", "/"):
            return await self._playground(scope, receive, reply.send)
        preflight = method == "OPTIONS" and headers.keys() >= PREFLIGHT_HEADERS
        if path not in UNPROTECTED and not preflight:
            self._authorize(headers)
        if path in (*OWN_ROUTES, "/openapi.json"):
            _check_method(method, "GET", path)
            return await self._monitor(scope, receive, reply.send)
        if self._status.failure is not None:
            raise StartFailedError(self._status.failure)
        self._check_route(method, path, preflight)
        engine = self._ready_engine()
        if preflight:
            # What browsers ask beforehand; vLLM's CORS middleware answers it without going further.
            return await engine(scope, receive, reply.send)
        body = await self._read(receive, headers)
        # Much may have happened meanwhile.
        engine = self._ready_engine()
        caller = {name.decode(): value.decode("latin-1") for name, value in headers.items() if name in TRACE_HEADERS}
        with self._telemetry.job(reply.request_id, path, caller) as record:
            self.running += 1
            named = {"x-request-id": reply.request_id, **record.trace_headers}
            try:
                await self._ask(engine, _with_headers(scope, named), body, receive, reply.kept_in(record))
            except JobError as error:
                record.ended_with(error.http_status)
                raise
            except _ClientGoneError:
                raise
            except Exception as error:  # noqa: BLE001 - the request's boundary
                log.error("Request %s failed:\n%s", reply.request_id, frames(error))
                record.ended_with(InternalError.status)
                raise InternalError(reply.request_id) from None
            finally:
                self.running -= 1
        return None

    async def _ask(self, engine: App, scope: Message, body: bytes, receive: Receive, reply: "_Reply") -> None:
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        expired = asyncio.Event()

        async def received() -> Message:
            if given:
                return given.pop()
            message = await _unless(expired, receive())
            reply.gone = reply.gone or message["type"] == "http.disconnect"
            return message

        seconds = self._settings.request_timeout
        asked = asyncio.ensure_future(engine(scope, received, reply.send))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({asked, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            # To the engine the end of its time is its client's leaving, upon which it stops; being cancelled is not.
            reply.mute()
            expired.set()
            await asyncio.wait({asked}, timeout=DISCONNECT_SECONDS)
            raise UnavailableError(self._why) if self._ended.is_set() or seconds is None else JobTimeoutError(seconds)
        finally:
            ended.cancel()
            if not asked.done():
                asked.cancel()
                await asyncio.wait({asked})

    async def _read(self, receive: Receive, headers: Headers) -> bytes:
        """Return the whole body.

        Raises:
            BodyTooLargeError: it has more bytes than allowed; what is over is not read.
            BodyTooSlowError: it takes too long.
            BusyError: too much is being read already.
        """
        limit, declared = self._settings.max_request_bytes, headers.get(b"content-length", b"")
        expected = int(declared) if declared.isdigit() else limit if b"transfer-encoding" in headers else 0
        if expected > limit:
            raise BodyTooLargeError(limit)
        if self._reading and self._reading + expected > BODIES_BYTES:
            raise BusyError(self.running)
        self._reading += expected
        try:
            async with asyncio.timeout(self._body_seconds):
                return await _body(receive, limit)
        except TimeoutError:
            raise BodyTooSlowError(self._body_seconds) from None
        finally:
            self._reading -= expected

    def _authorize(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        # Anthropic's clients send theirs in a header of its own, as does whoever needs the other one for RunPod's key.
        given = (bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        # No short cut: how long it takes must not tell how much of a key is right.
        if not sum(hmac.compare_digest(key, one) for key in self._keys for one in given):
            raise UnauthorizedError

    def _check_route(self, method: str, path: str, preflight: bool) -> None:
        if not self._offers_engine:
            raise RouteNotFoundError(path, OWN_ROUTES)
        if self._settings.allow_control_routes:
            return
        if (expected := method_of(path)) is None:
            raise RouteNotFoundError(path)
        if not preflight:
            _check_method(method, expected, path)

    def _ready_engine(self) -> App:
        state = self._status.state
        if self._engine is None or state != "ready":
            raise UnavailableError(WHY_NOT.get(state, WHY_NOT["loading"]))
        self._check_capacity()
        return self._engine

    def _check_capacity(self) -> None:
        if self.running >= self._capacity:
            raise BusyError(self.running)


def _playground() -> App:
    """Return an app that answers with the page."""
    body, headers = playground.page("v1")
    return HTMLResponse(body, headers=headers)


def _with_headers(scope: Message, headers: dict[str, str]) -> Message:
    """Return the scope with some headers put in the place of those of the same names."""
    set_ = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    kept = [pair for pair in scope["headers"] if pair[0] not in set_]
    return {**scope, "headers": [*kept, *set_.items()]}


def _check_method(method: str, expected: str, path: str) -> None:
    if method != expected:
        raise MethodNotAllowedError(method, expected, path)


class _Reply:
    """Passes an answer on with the request's id, and keeps in the record how it ended."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self._record: Record | None = None
        self._status: int | None = None
        self._streams = False
        self._complete = False
        self._muted = False
        self.gone = False
        """Whether the client has left."""

    @property
    def is_recorded(self) -> bool:
        """Whether what became of the request is told by its record."""
        return self._record is not None

    def mute(self) -> None:
        """Take no more from the app."""
        self._muted = True

    def kept_in(self, record: Record) -> Self:
        self._record = record
        return self

    async def send(self, message: Message) -> None:
        """Take a message from the app.

        Raises:
            _ClientGoneError: the client does not read.
        """
        if not self._muted:
            await self._pass(message)

    async def _pass(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            self._status = message["status"]
            self._streams = dict(headers).get(b"content-type", b"").startswith(b"text/event-stream")
            headers.append((b"x-request-id", self.request_id.encode("latin-1")))
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            if self._streams:
                self._status = sse.status_of([message.get("body", b"")]) or self._status
            self._complete = not message.get("more_body", False)
            if self._complete:
                self._keep()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except TimeoutError:
            self.gone = True
            raise _ClientGoneError from None

    def _keep(self) -> None:
        if self._record is not None and self._status is not None and not self.gone:
            self._record.stream = self._streams
            self._record.ended_with(self._status)

    async def fail(self, error: JobError) -> None:
        """Answer with an error: as the body, or as the last event of a stream that has begun."""
        if self._status is None:
            body = json.dumps(error.body(), ensure_ascii=False).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
            await self._pass({"type": "http.response.start", "status": error.status, "headers": headers})
            await self._pass({"type": "http.response.body", "body": body})
        elif self._streams and not self._complete:
            await self._pass({"type": "http.response.body", "body": sse.event(error.body()) + sse.DONE})


async def _body(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLargeError(limit)
        if not message.get("more_body", False):
            return bytes(body)


async def _unless(expired: asyncio.Event, receiving: Awaitable[Message]) -> Message:
    """Return the client's next message, or its leaving once its time has expired."""
    message, expiry = asyncio.ensure_future(receiving), asyncio.ensure_future(expired.wait())
    try:
        await asyncio.wait({message, expiry}, return_when=asyncio.FIRST_COMPLETED)
        return message.result() if message.done() else {"type": "http.disconnect"}
    finally:
        message.cancel()
        expiry.cancel()
