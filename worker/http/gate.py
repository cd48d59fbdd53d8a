"""The entrance of HTTP mode: checks key, route, method, size and load, and passes requests on to the pipeline."""

import asyncio
import hmac
import re
import uuid
from collections.abc import Callable
from contextlib import suppress

from worker.errors import (
    LOADING,
    BodyTooLargeError,
    BodyTooSlowError,
    BusyError,
    JobError,
    MethodNotAllowedError,
    RouteNotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from worker.http import playground
from worker.http.own_routes import OwnRoutes
from worker.lifecycle import Lifecycle
from worker.request.asgi import App, ClientDisconnectedError, Message, Receive, Send, header, with_headers
from worker.request.pipeline import Pipeline, send_error
from worker.request.routes import OWN_ROUTES, ROUTES, method_of
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry

BODY_SECONDS = 60.0
"""How long a client may take to send its body."""
SEND_SECONDS = 60.0
"""How long a client may take to read a part of the response before it counts as disconnected."""
PREFLIGHT_HEADERS = {b"origin", b"access-control-request-method"}
UNPROTECTED = ("/ping", "/health")

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class Gate:
    """Answers the worker's own routes at once, and passes other requests on when the engine is ready. An ASGI app."""

    def __init__(
        self,
        own_routes: OwnRoutes,
        lifecycle: Lifecycle,
        telemetry: Telemetry,
        settings: Settings,
        pipeline: Pipeline,
        *,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._own_routes = own_routes
        self._lifecycle = lifecycle
        self._telemetry = telemetry
        self._settings = settings
        self._pipeline = pipeline
        self._body_seconds = body_seconds
        self._serves_engine = settings.mode == "http"
        self._keys = [key.encode() for key in settings.worker_api_key]
        # The page needs no key, because it holds no secret. Its requests do.
        self._playground = playground.app("v1") if self._serves_engine and settings.playground else None
        self._engine: App = _not_open
        self._answer: App = _not_open
        self._capacity = 0
        self.running = 0
        """The number of requests that the engine has."""

    def open(self, engine: App, concurrency: int) -> None:
        """Pass requests on to `engine`, which runs `concurrency` at once."""
        waiting = self._settings.max_queue
        self._engine, self._answer = engine, self._pipeline.around(engine)
        self._capacity = concurrency + (4 * concurrency if waiting is None else waiting)

    async def drained(self, seconds: float) -> None:
        """Wait until the engine has no more requests, but at most `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.running:  # noqa: ASYNC110 - once, when the worker ends
                    await asyncio.sleep(0.05)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # A websocket that is closed before it was accepted is answered with 403.
            return await send({"type": "websocket.close"})
        given_id = header(scope, b"x-request-id")
        request_id = given_id.decode() if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        scope, client = with_headers(scope, {"x-request-id": request_id}), _Client(request_id, receive, send)
        with suppress(ClientDisconnectedError):
            try:
                app = self._app_for(scope)
            except JobError as error:
                self._telemetry.refused.labels(str(error.status)).inc()
                return await send_error(client.send, error)
            if app is not self._answer:
                return await app(scope, client.receive, client.send)
            upload = _Upload(client.receive, self._settings.max_request_bytes, self._body_seconds, self._admit)
            try:
                await app(scope, upload.receive, client.send)
            finally:
                self.running -= upload.is_complete
        return None

    def _app_for(self, scope: Message) -> App:
        """Return the app that answers a request; raise a `JobError` if the request is refused."""
        method, path = scope["method"], scope["path"]
        if self._playground is not None and (method, path) == ("GET", "/"):
            return self._playground
        names = {name for name, _ in scope["headers"]}
        is_preflight = method == "OPTIONS" and names >= PREFLIGHT_HEADERS
        if path not in UNPROTECTED and not is_preflight:
            self._check_key(scope)
        if path in (*OWN_ROUTES, "/openapi.json"):
            _check_method(method, "GET", path)
            return self._own_routes.app
        if self._lifecycle.state == "refused":
            raise self._lifecycle.error()
        self._check_route(method, path, is_preflight)
        self._check_open()
        if is_preflight:
            # vLLM's CORS middleware answers what browsers ask before a request.
            return self._engine
        limit, declared = self._settings.max_request_bytes, header(scope, b"content-length")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLargeError(limit)
        return self._answer

    def _check_key(self, scope: Message) -> None:
        if not self._keys:
            return
        scheme, _, bearer = header(scope, b"authorization").partition(b" ")
        # Anthropic's clients send x-api-key, and so do callers who need the other header for RunPod's key.
        given = (bearer.strip() if scheme.lower() == b"bearer" else b"", header(scope, b"x-api-key"))
        # Every pair is compared, so that the time does not reveal how much of a key is right.
        if not sum(hmac.compare_digest(key, candidate) for key in self._keys for candidate in given):
            raise UnauthorizedError

    def _check_route(self, method: str, path: str, is_preflight: bool) -> None:
        if not self._serves_engine:
            raise RouteNotFoundError(path, OWN_ROUTES)
        if self._settings.allow_control_routes:
            return
        if (expected := method_of(path)) is None:
            raise RouteNotFoundError(path, ROUTES)
        if not is_preflight:
            _check_method(method, expected, path)

    def _check_open(self) -> None:
        if self._lifecycle.state != "ready":
            raise self._lifecycle.error()
        if self.running >= self._capacity:
            raise BusyError(
                f"The worker has {self.running} requests, as many as MAX_CONCURRENCY and MAX_QUEUE allow. "
                "Try again in a second."
            )

    def _admit(self) -> None:
        """Count a request whose body is complete. Much may have happened since it began."""
        self._check_open()
        self.running += 1


async def _not_open(_scope: Message, _receive: Receive, _send: Send) -> None:
    raise UnavailableError(LOADING)


def _check_method(method: str, expected: str, path: str) -> None:
    if method != expected:
        raise MethodNotAllowedError(method, expected, path)


class _Client:
    """The connection to one client. Every response gets the request's id."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self._request_id = request_id
        self.receive = receive
        self._send = send

    async def send(self, message: Message) -> None:
        """Send a message; raise `ClientDisconnectedError` if the client does not read."""
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self._request_id.encode("latin-1"))]}
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnectedError from None


class _Upload:
    """A request's body while it is received, with limits of size and time."""

    def __init__(self, receive: Receive, limit: int, seconds: float, completed: Callable[[], None]) -> None:
        self._receive = receive
        self._limit = limit
        self._seconds = seconds
        self._ends_at = asyncio.get_running_loop().time() + seconds
        self._completed = completed
        self._size = 0
        self.is_complete = False

    async def receive(self) -> Message:
        """Receive a part of the body, or raise a `JobError`; after its end, wait for the client's disconnect."""
        if self.is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._ends_at):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlowError(self._seconds) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise BodyTooLargeError(self._limit)
            if not message.get("more_body", False):
                self._completed()
                self.is_complete = True
        return message
