"""Errors about media: each names the part of the request, such as `messages[0].content[1]`, and what to change."""

import re
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar
from http import HTTPStatus
from itertools import chain, islice
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import GracefulHTTPError, VLLMError

from worker import threads
from worker.errors import MediaError
from worker.media.checks import Kind
from worker.media.parts import KEYS, Parts
from worker.request.asgi import App, Message, Receive, Send
from worker.telemetry.usage import rejected
from worker.threads import Result

NOUNS: Mapping[Kind, str] = {"image": "an image", "video": "a video", "audio": "a sound", "document": "a document"}
_TOO_MANY = re.compile(r"At most (\d+) (image|video|audio)")

THREADS = 2
"""How many threads search and validate large bodies. More would not be faster: they share Python's lock."""


class RequestBody:
    """The body of one request. It is parsed at most once, and only if an error must name a part of it."""

    def __init__(self, executor: Executor) -> None:
        self.pieces: list[bytes] = []
        self._executor = executor
        self._lock = threading.Lock()
        self._parts: Parts | None = None

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return sum(map(len, self.pieces))

    def parts(self) -> Parts:
        """Return its media parts. Takes up to a second at the first call: use a thread."""
        with self._lock:
            if self._parts is None:
                self._parts = Parts(b"".join(self.pieces))
            return self._parts

    async def in_thread(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Call `work` in a thread for large bodies, with the caller's context."""
        return await threads.call(self._executor, work, *arguments)


current_body: ContextVar[RequestBody | None] = ContextVar("current_body", default=None)
"""The body of the current request: vLLM raises errors where it no longer knows the request."""


class RejectedMediaError(GracefulHTTPError, ValueError):
    """A `MediaError` as an exception that all of vLLM's routes turn into a response with its status."""

    def __init__(self, error: MediaError) -> None:
        super().__init__(str(error), HTTPStatus(error.status))
        self.error = error


def keep_bodies(app: App) -> App:
    """Return `app` with the body of each request kept for error messages."""
    executor = ThreadPoolExecutor(THREADS, "bodies")

    async def keeping(scope: Message, receive: Receive, send: Send) -> None:
        body = RequestBody(executor)

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.pieces.append(message.get("body", b""))
            return message

        current_body.set(body)
        await app(scope, receive_and_keep, send)

    return keeping


async def rejection(error: MediaError, url: str, kind: Kind) -> RejectedMediaError:
    """Complete an error about the media behind `url` with its part of the request."""
    if (body := current_body.get()) is None:
        return _rejected(error, url, kind)
    return await body.in_thread(_rejected, error, url, kind)


def _rejected(error: MediaError, url: str, kind: Kind) -> RejectedMediaError:
    """Complete an error. May parse the body: use a thread."""
    body = current_body.get()
    path = body.parts().path_of(url) if body else None
    message = f"{path or 'The request'}, {NOUNS[kind]}: {error}."
    return RejectedMediaError(rejected(type(error)(message, param=path)))


def add_handlers(app: Starlette) -> None:
    """Have vLLM's app answer errors about media in the worker's words."""
    for error_class in (VLLMError, ValueError):
        app.add_exception_handler(error_class, _handler(app.exception_handlers[error_class]))
    # Starlette builds the stack again at the next request, with the new handlers.
    app.middleware_stack = None


def _handler(default: Any) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        if (media_error := await _from_vllm(error)) is not None:
            return JSONResponse(media_error.body(), media_error.status)
        response: Response = await default(request, error)
        return response

    return handle


async def _from_vllm(error: Exception) -> MediaError | None:
    """Return the worker's error for one that vLLM's routes have raised, or None if it is not about media."""
    if isinstance(error, RejectedMediaError):
        return error.error
    if str(error).endswith("is not a multimodal model"):
        return await _about_part(0, tuple(KEYS), "the model takes text only, no images, videos or sounds")
    if match := _TOO_MANY.match(str(error)):
        limit, kind = int(match[1]), cast("Kind", match[2])
        reason = f"a request may have at most {limit} parts of kind {kind}; a higher {kind.upper()}_LIMIT allows more"
        return await _about_part(limit, (kind,), reason if limit else f"the model, or its settings, allow no {kind}")
    return None


async def _about_part(index: int, kinds: Iterable[Kind], reason: str) -> MediaError:
    """Return an error about the part at `index` among the parts of these kinds."""
    body = current_body.get()
    parts = await body.in_thread(body.parts) if body else Parts(b"")
    path = next(islice(chain.from_iterable(map(parts.paths_of, kinds)), index, None), None)
    return rejected(MediaError(f"{path or 'The request'}: {reason}.", param=path))
