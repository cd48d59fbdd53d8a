"""Errors about media: each names the part of the request, such as `messages[0].content[1]`, and what to change."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import GracefulHTTPError, VLLMError

from worker.errors import MediaError
from worker.media import parts
from worker.media.checks import Kind
from worker.request.asgi import App, Message, Receive, Send
from worker.telemetry.usage import current_usage

_TOO_MANY = re.compile(r"At most (\d+) (image|video|audio)")

_body: ContextVar[Sequence[bytes]] = ContextVar("body", default=())
"""The body of the current request, in pieces: vLLM raises errors where it no longer knows the request."""


class RejectedMediaError(GracefulHTTPError, ValueError):
    """A `MediaError` as an exception that all of vLLM's routes turn into a response with its status."""

    def __init__(self, error: MediaError) -> None:
        super().__init__(str(error), HTTPStatus(error.status))
        self.error = error


def keep_bodies(app: App) -> App:
    """Return `app` with the body of each request kept for error messages."""

    async def keeping(scope: Message, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                pieces.append(message.get("body", b""))
            return message

        _body.set(pieces)
        await app(scope, receive_and_keep, send)

    return keeping


def rejected(error: MediaError, url: str, kind: Kind) -> RejectedMediaError:
    """Complete an error about the media behind `url` with its part of the request. Parses the body: use a thread."""
    path = parts.path_of(b"".join(_body.get()), url)
    message = f"{path or 'The request'}, {'a' if kind == 'video' else 'an'} {kind}: {error}."
    return RejectedMediaError(_counted(type(error)(message, param=path)))


def add_handlers(app: Starlette) -> None:
    """Have vLLM's app answer errors about media in the worker's words."""
    for error_class in (VLLMError, ValueError):
        app.add_exception_handler(error_class, _handler(app.exception_handlers[error_class]))
    # Starlette builds the stack again at the next request, with the new handlers.
    app.middleware_stack = None


def _handler(default: Any) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        if (media_error := await asyncio.to_thread(_from_vllm, error)) is not None:
            return JSONResponse(media_error.body(), media_error.status)
        response: Response = await default(request, error)
        return response

    return handle


def _from_vllm(error: Exception) -> MediaError | None:
    """Return the worker's error for one that vLLM's routes have raised, or None if it is not about media."""
    if isinstance(error, RejectedMediaError):
        return error.error
    if str(error).endswith("is not a multimodal model"):
        return _about_part(0, tuple(parts.KEYS), "the model takes text only, no images, videos or sounds")
    if match := _TOO_MANY.match(str(error)):
        limit, kind = int(match[1]), cast("Kind", match[2])
        reason = f"a request may have at most {limit} parts of kind {kind}; a higher {kind.upper()}_LIMIT allows more"
        return _about_part(limit, (kind,), reason if limit else f"the model, or its settings, allow no {kind}")
    return None


def _about_part(index: int, kinds: Iterable[Kind], reason: str) -> MediaError:
    """Return an error about the part at `index` among the parts of these kinds."""
    body = b"".join(_body.get())
    paths = [path for kind in kinds for path in parts.paths_of(body, kind)]
    path = paths[index] if index < len(paths) else None
    return _counted(MediaError(f"{path or 'The request'}: {reason}.", param=path))


def _counted(error: MediaError) -> MediaError:
    """Add an error to the usage of the job, and return it."""
    if (usage := current_usage.get()) is not None:
        usage.rejections.append(error.reason)
    return error
