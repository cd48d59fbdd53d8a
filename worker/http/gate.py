"""The entrance of HTTP mode: checks key, route, method, size and load, and passes requests on to the pipeline."""

import asyncio
import hmac
import re
import uuid
from collections.abc import Callable
from contextlib import suppress

from starlette.middleware.cors import CORSMiddleware

from worker.errors import (
    LOADING,
    BodyTooLargeError,
    BodyTooSlowError,
    BusyError,
    HostNotAllowedError,
    JobError,
    MethodNotAllowedError,
    NotHeadError,
    RouteNotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from worker.http import batch_routes, cors, hosts, playground
from worker.http.own_routes import OwnRoutes
from worker.http.protocol import REFUSED
from worker.lifecycle import Lifecycle
from worker.request.asgi import App, Message, Receive, Send, header, with_headers
from worker.request.pipeline import KEY_NAME, Pipeline, send_error
from worker.request.routes import OWN_ROUTES, ROUTES, method_of
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry

BODY_SECONDS = 60.0
"""How long a client may take to send its body."""
PREFLIGHT_HEADERS = {b"origin", b"access-control-request-method"}
UNPROTECTED = ("/ping", "/health")
HEADS = {("HEAD", path) for path in UNPROTECTED}
"""Health checks of some load balancers ask for the status alone."""

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
        batches: App = batch_routes.off,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._own_routes = own_routes
        self._lifecycle = lifecycle
        self._telemetry = telemetry
        self._settings = settings
        self._pipeline = pipeline
        self._batches = batches
        self._body_seconds = body_seconds
        self._serves_engine = settings.mode == "http"
        self._keys = [(key.encode(), name) for key, name in settings.api_keys.items()]
        # The page needs no key, because it holds no secret. Its requests do.
        self._playground = playground.app("v1") if self._serves_engine and settings.playground else None
        self._hosts = hosts.allowed(settings)
        self._cors = cors.middleware(_not_open, settings)
        self._answer: App = _not_open
        # Answers what browsers ask before a request; from `open` on, vLLM's own CORS middleware does.
        self._preflight: App = self._cors
        self._capacity = 0
        self.running = 0
        """The number of requests that the engine has."""

    def open(self, engine: App, concurrency: int) -> None:
        """Pass requests on to `engine`, which runs `concurrency` at once."""
        waiting = self._settings.max_queue
        self._preflight, self._answer = engine, self._pipeline.around(engine)
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
        scope = with_headers(scope, {"x-request-id": request_id})
        send = _adding_headers(request_id, scope, self._cors, send)
        try:
            app = self._app_for(scope)
        except JobError as error:
            self._telemetry.refused.labels(str(error.status)).inc()
            return await send_error(send, error)
        if app is not self._answer:
            return await app(scope, receive, send)
        upload = _Upload(receive, self._settings.max_request_bytes, self._body_seconds, self._admit)
        try:
            await app(scope, upload.receive, send)
        finally:
            self.running -= upload.is_complete
        return None

    def _app_for(self, scope: Message) -> App:
        """Return the app that answers a request; raise a `JobError` if the request is refused."""
        if (error := scope["state"].get(REFUSED)) is not None:
            raise error
        method, path = scope["method"], scope["path"]
        # Also for `/ping` and `/health`: these tell a web page that a worker runs here, and its model.
        if self._hosts and hosts.name(header(scope, b"host").decode("latin-1")) not in self._hosts:
            raise HostNotAllowedError
        if self._playground is not None and (method, path) == ("GET", "/"):
            return self._playground
        if method == "OPTIONS" and {name for name, _ in scope["headers"]} >= PREFLIGHT_HEADERS:
            return self._cors if path in OWN_ROUTES else self._preflight
        if path not in UNPROTECTED:
            self._check_key(scope)
        if path in (*OWN_ROUTES, "/openapi.json"):
            _check_method("GET" if (method, path) in HEADS else method, "GET", path)
            return self._own_routes.app
        if self._lifecycle.state == "refused":
            raise self._lifecycle.error()
        if (role := self._settings.role) is not None and role.is_follower:
            raise NotHeadError(str(role), role.head)
        if self._serves_engine and batch_routes.is_batch_route(path):
            # These need no engine. They limit their bodies themselves.
            return self._batches
        self._check_route(method, path)
        self._check_open()
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
        found = [
            (index, name)
            for index, (key, name) in enumerate(self._keys)
            for candidate in given
            if hmac.compare_digest(key, candidate)
        ]
        if not found:
            raise UnauthorizedError
        scope["state"][batch_routes.KEY_INDEX], scope["state"][KEY_NAME] = found[0]

    def _check_route(self, method: str, path: str) -> None:
        if not self._serves_engine:
            raise RouteNotFoundError(path, OWN_ROUTES)
        if self._settings.allow_control_routes:
            return
        if (expected := method_of(path)) is None:
            raise RouteNotFoundError(path, ROUTES)
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


def _adding_headers(request_id: str, scope: Message, middleware: CORSMiddleware, send: Send) -> Send:
    """Return a `send` that adds the request's id and CORS headers to the response."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] != "http.response.start":
            return await send(message)
        headers = [(name.lower(), value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
        headers.append((b"x-request-id", request_id.encode("latin-1")))
        return await cors.send_start(middleware, scope, {**message, "headers": headers}, send)

    return send_with_headers


class _Upload:
    """A request's body while it is received, with limits of size and time."""

    def __init__(self, receive: Receive, limit: int, seconds: float, completed: Callable[[], None]) -> None:
        self._receive = receive
        self._limit = limit
        self._seconds = seconds
        self._left = seconds
        self._completed = completed
        self._size = 0
        self.is_complete = False

    async def receive(self) -> Message:
        """Receive a part of the body, or raise a `JobError`; after its end, wait for the client's disconnect."""
        if self.is_complete:
            return await self._receive()
        time = asyncio.get_running_loop().time
        began = time()
        try:
            async with asyncio.timeout(self._left):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlowError(self._seconds) from None
        # Not the time between two parts: there the request may wait for memory.
        self._left -= time() - began
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise BodyTooLargeError(self._limit)
            if not message.get("more_body", False):
                self._completed()
                self.is_complete = True
        return message
