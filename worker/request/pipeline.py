"""The way of every request to the engine: small ASGI layers, the same for the queue and for HTTP.

Recorder → ErrorBoundary → TimeLimit → BodyBudget → engine. Each layer does one thing, and works around any ASGI app.
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from worker import race
from worker.errors import InternalError, JobError, JobTimeoutError, status_of
from worker.lifecycle import Lifecycle
from worker.memory import Budget, container_memory, current_account
from worker.request import sse
from worker.request.asgi import (
    DISCONNECT_SECONDS,
    App,
    ClientDisconnectedError,
    Message,
    Receive,
    Send,
    header,
    with_headers,
)
from worker.request.routes import label_of
from worker.request.shape import check_shape
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry
from worker.telemetry.logs import frames

FORMS = (b"multipart/form-data", b"application/x-www-form-urlencoded")
"""The content types of bodies that are not JSON. Some routes of vLLM parse all others, whatever their type."""
TRACE_HEADERS = (b"traceparent", b"tracestate")
KEY_NAME = "worker.key_name"
"""The name of the caller's API key in the state of a request's scope."""
IS_LINE = "worker.is_line"
"""In the state of a request's scope: whether it is a line of a batch."""

log = logging.getLogger(__name__)


class Pipeline:
    """The layers around an app. The memory of requests is shared by all apps of one pipeline."""

    def __init__(self, settings: Settings, lifecycle: Lifecycle, telemetry: Telemetry) -> None:
        self._seconds = settings.request_timeout
        self.lifecycle = lifecycle
        self._telemetry = telemetry
        self.memory = Budget(settings.max_total_request_bytes or container_memory() // 4)

    def around(self, app: App) -> App:
        """Return `app` inside all layers."""
        app = TimeLimit(BodyBudget(app, self.memory), self.lifecycle, self._seconds)
        return Recorder(ErrorBoundary(app, self.lifecycle), self._telemetry)


class Recorder:
    """Keeps a record of each request: one log line, metrics and a span."""

    def __init__(self, app: App, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        request_id = header(scope, b"x-request-id").decode("latin-1")
        trace = {name.decode(): header(scope, name).decode("latin-1") for name in TRACE_HEADERS}
        key, is_line = scope["state"].get(KEY_NAME, ""), scope["state"].get(IS_LINE, False)
        with self._telemetry.job(request_id, label_of(scope["path"]), trace, key, is_line) as record:
            status, has_left = 0, False

            async def receive_noting() -> Message:
                nonlocal has_left
                message = await receive()
                has_left = has_left or message["type"] == "http.disconnect"
                if message["type"] == "http.request" and not message.get("more_body", False):
                    record.arrived()
                return message

            async def send_noting(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status, record.stream = message["status"], _is_event_stream(message)
                elif record.stream:
                    status = sse.error_status(message.get("body", b"")) or status
                elif status < 400:
                    status = _error_in_body(message.get("body", b"")) or status
                await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body", False) and not has_left:
                    record.ended_with(status)

            await self._app(with_headers(scope, record.trace_headers), receive_noting, send_noting)


class ErrorBoundary:
    """Turns exceptions into responses: OpenAI's error body, or the last event of a stream that has begun.

    The client gets a fixed sentence for an unforeseen exception, and a sentence that it can act on for the engine's
    errors after its death.
    """

    def __init__(self, app: App, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        response = _Response(send, self._lifecycle)
        try:
            with only_job_errors(header(scope, b"x-request-id").decode("latin-1")):
                await self._app(scope, receive, response.send)
        except JobError as error:
            is_caused_by_death = error.status >= 500 and self._lifecycle.state == "dead"
            await response.fail(self._lifecycle.error() if is_caused_by_death else error)


class _Response:
    """A response that can be ended with an error at any time."""

    def __init__(self, send: Send, lifecycle: Lifecycle) -> None:
        self._send = send
        self._lifecycle = lifecycle
        self._is_started = False
        self._streams = False
        self._is_complete = False

    async def send(self, message: Message) -> None:
        """Pass on a message of the app, unless the response is complete already."""
        if self._is_complete:
            return
        if self._is_server_error(message) and self._lifecycle.state == "dead":
            await self.fail(self._lifecycle.error())
            return
        if message["type"] == "http.response.start":
            self._is_started, self._streams = True, _is_event_stream(message)
        else:
            self._is_complete = not message.get("more_body", False)
        await self._send(message)

    def _is_server_error(self, message: Message) -> bool:
        if message["type"] == "http.response.start":
            return int(message["status"]) >= 500
        return self._streams and (sse.error_status(message.get("body", b"")) or 0) >= 500

    async def fail(self, error: JobError) -> None:
        """End the response with an error."""
        if self._is_complete:
            return
        self._is_complete = True
        if not self._is_started:
            await send_error(self._send, error)
        elif self._streams:
            await self._send({"type": "http.response.body", "body": sse.event(error.body()) + sse.DONE})


class TimeLimit:
    """Ends a request `seconds` after its body is complete, or when the worker's life is over.

    This works also while nothing waits for the app or the client: the limit is a task of its own.
    """

    def __init__(self, app: App, lifecycle: Lifecycle, seconds: float | None) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._seconds = seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if self._lifecycle.over.is_set():
            raise self._lifecycle.error()
        complete = asyncio.Event()
        end = asyncio.ensure_future(self._end(complete))

        async def receive_until_end() -> Message:
            winner = await race.first(end, receive())
            # Apps stop their work for a client that disconnects. A cancelled app may leave it running.
            message: Message = {"type": "http.disconnect"} if winner is end else winner.result()
            if not message.get("more_body", False):
                complete.set()
            return message

        async def send_until_end(message: Message) -> None:
            if not end.done():
                await send(message)

        working = asyncio.ensure_future(self._app(scope, receive_until_end, send_until_end))
        try:
            await race.first(working, end)
            if not end.done():
                return working.result()
            raise end.result()
        finally:
            await race.end(working, grace=DISCONNECT_SECONDS if end.done() else 0)
            await race.end(end)

    async def _end(self, complete: asyncio.Event) -> JobError:
        """Wait for the end, and return the error that the request ends with."""
        over, seconds = self._lifecycle.over, self._seconds
        if seconds is None:
            await over.wait()
        else:
            await race.first(complete.wait(), over.wait())
            try:
                async with self._lifecycle.resumes.timeout(seconds):
                    await over.wait()
            except TimeoutError:
                return JobTimeoutError(seconds)
        return self._lifecycle.error()


class BodyBudget:
    """Reads the request's body, and counts the memory of the request from its first byte until it ends."""

    def __init__(self, app: App, memory: Budget) -> None:
        self._app = app
        self._memory = memory

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []
        account = self._memory.account(is_line=scope["state"].get(IS_LINE, False))
        current_account.set(account)
        try:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                piece = message.get("body", b"")
                await account.take(len(piece))
                pieces.append(piece)
                more = message.get("more_body", False)
            pieces = [b"".join(pieces)]
            if not header(scope, b"content-type").lower().startswith(FORMS):
                check_shape(pieces[0])

            async def receive_body_first() -> Message:
                if not pieces:
                    return await receive()
                body = pieces.pop()
                return {"type": "http.request", "body": body, "more_body": False}

            await self._app(scope, receive_body_first, send)
        finally:
            account.close()


@contextmanager
def only_job_errors(request_id: str) -> Iterator[None]:
    """Log every exception that is not meant for callers, and raise `InternalError` in its place."""
    try:
        yield
    except (JobError, ClientDisconnectedError):
        raise
    except Exception as error:  # noqa: BLE001 - the boundary of every request
        log.error("Request %s failed:\n%s", request_id, frames(error))
        raise InternalError(request_id) from None


async def send_error(send: Send, error: JobError) -> None:
    """Send an error as the whole response."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"]
    )


def _error_in_body(body: bytes) -> int | None:
    """Return the status of an error in a JSON body that was sent with status 200, as `/v1/responses` does."""
    # Within a JSON string the quotes would be escaped.
    if b'"error":{' not in body and b'"error": {' not in body:
        return None
    try:
        return status_of(json.loads(body))
    except ValueError:
        return None
