"""vLLM's media connector, the one door through which every route loads media, with the worker's guard at it."""

import asyncio
import logging
import os
import re
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar, cast

import pybase64
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from vllm.exceptions import GracefulHTTPError, VLLMError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaWithBytes
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.base import MediaIO
from vllm.multimodal.media.connector import global_thread_pool
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from worker.errors import MediaError, MediaTooLargeError
from worker.media import checks, parts
from worker.media.checks import Kind, Limit, Limits
from worker.media.fetch import Fetcher, Policy
from worker.media.video import DAMAGED, Capture, Decoders
from worker.request.asgi import App, Message, Receive, Send
from worker.settings.settings import Settings
from worker.telemetry.usage import Fetch, Meter, metered

NAME = "worker"
"""What `VLLM_MEDIA_CONNECTOR` has to be for vLLM to use the connector."""

_KINDS: dict[type[MediaIO[Any]], Kind] = {ImageMediaIO: "image", VideoMediaIO: "video", AudioMediaIO: "audio"}
_TOO_MANY = re.compile(r"At most (\d+) (image|video|audio)")
_LIMIT_OF_VLLM = re.compile(r"VLLM_MAX_\w+")
_TEXT_ONLY = "is not a multimodal model"

_body: ContextVar[list[bytes] | None] = ContextVar("body", default=None)
_captures: ContextVar[list[Capture] | None] = ContextVar("captures", default=None)

T = TypeVar("T")

log = logging.getLogger(__name__)


class _RefusalError(GracefulHTTPError, ValueError):
    """A `MediaError` in the form that all of vLLM's routes pass on, status and all."""

    def __init__(self, error: MediaError) -> None:
        super().__init__(str(error), HTTPStatus(error.status))
        self.error = error


@dataclass(frozen=True, slots=True)
class Guard:
    """What media have to pass."""

    fetcher: Fetcher
    limits: Limits
    decoders: Decoders

    async def aclose(self) -> None:
        """End connections and processes."""
        await self.fetcher.aclose()
        self.decoders.close()


class Connector(MediaConnector):
    """Loads media by way of a guard, which `install` provides."""

    guard: Guard
    loop: asyncio.AbstractEventLoop
    _fetching: dict[tuple[Meter, str, Limit], asyncio.Task[bytes]]

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None) -> Any:
        """Return the media behind a link of any sort, decoded by vLLM.

        Raises:
            GracefulHTTPError: it is not taken; the message says which part of the request it is, and why.
        """
        del fetch_timeout
        try:
            return await self._load(url, media_io)
        except MediaError as error:
            located = await asyncio.to_thread(_located, error, url, _KINDS[type(media_io)])
            raise _RefusalError(_noted(located)) from None

    def load_from_url(self, url: str, media_io: MediaIO[Any], *, fetch_timeout: int | None = None) -> Any:
        """Do the same from another thread than the loop's, as the routes of pooling models want it."""
        loading = self.load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        return asyncio.run_coroutine_threadsafe(loading, self.loop).result()

    async def _load(self, url: str, media_io: MediaIO[Any]) -> Any:
        kind = _KINDS[type(media_io)]
        limit = self.guard.limits.bytes[kind]
        scheme = url[:5].lower()
        if scheme == "data:":
            return await self._in_thread(self._decode_url, url, media_io)
        if scheme == "file:":
            data = await self._in_thread(checks.read_file, url, self.allowed_local_media_path, limit)
        else:
            data = await self._fetch_once(url, limit)
        return await self._in_thread(self._decode, data, media_io)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do something that takes time; what it has begun to decode is given up when nobody waits for it any more."""
        captures: list[Capture] = []
        context = copy_context()
        context.run(_captures.set, captures)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(global_thread_pool, partial(context.run, work, *arguments))
        except asyncio.CancelledError:
            for capture in captures:
                capture.abort()
            raise

    async def _fetch_once(self, url: str, limit: Limit) -> bytes:
        """Fetch a link, together with whoever else needs it for the same job."""
        if (meter := metered.get()) is None:
            return await self._fetch(url, limit)
        key = (meter, url.partition("#")[0], limit)
        if (task := self._fetching.get(key)) is None:
            task = self._fetching[key] = asyncio.create_task(self._fetch(url, limit))
            task.add_done_callback(lambda _: self._fetching.pop(key))
        return await task

    async def _fetch(self, url: str, limit: Limit) -> bytes:
        began = time.monotonic()
        data = await self.guard.fetcher.get(url, limit)
        if (meter := metered.get()) is not None:
            meter.fetches.append(Fetch(time.monotonic() - began, len(data)))
        return data

    def _decode_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        spec, comma, text = url[5:].partition(",")
        media_type, *parameters = spec.lower().split(";")
        if not comma or "base64" not in parameters:
            raise MediaError("a data: URL must be data:<media type>;base64,<data>")
        if isinstance(media_io, VideoMediaIO) and media_type == "video/jpeg":
            self._check_frames(text, media_io)
            return self._guarded(media_io, lambda: media_io.load_base64(media_type, text))
        checks.check_size(len(text) * 3 // 4 - 2, self.guard.limits.bytes[_KINDS[type(media_io)]])
        return self._decode(_unpacked(text), media_io)

    def _check_frames(self, text: str, media_io: VideoMediaIO) -> None:
        limits = self.guard.limits
        checks.check_size(len(text) * 3 // 4, limits.bytes["video"])
        frames = text.split(",")
        if 0 < media_io.num_frames < len(frames):
            raise MediaError(f"it has {len(frames)} frames; at most VIDEO_MAX_FRAMES={media_io.num_frames} are taken")
        checks.check_frames(sum(checks.check_image(_unpacked(frame), limits) for frame in frames), limits)

    def _decode(self, data: bytes, media_io: MediaIO[Any]) -> Any:
        kind, limits = _KINDS[type(media_io)], self.guard.limits
        if kind == "image":
            checks.check_image(data, limits)
        else:
            checks.check_size(len(data), limits.bytes[kind])
            checks.check_kind(data, kind)
        return self._guarded(media_io, lambda: media_io.load_bytes(data))

    def _guarded(self, media_io: MediaIO[Any], decode: Callable[[], Any]) -> Any:
        try:
            decoded = decode()
        except (MediaError, ImportError):
            raise
        except MemoryError:
            raise MediaTooLargeError("there is no memory for decoding it") from None
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they stumble over
            if limit := _LIMIT_OF_VLLM.search(str(error)):
                raise MediaTooLargeError(f"it is larger than {limit[0]} allows") from None
            raise MediaError(DAMAGED) from None
        finally:
            for capture in _captures.get() or ():
                capture.close()
        if isinstance(media_io, ImageMediaIO):
            return self._downscaled(decoded)
        if isinstance(media_io, VideoMediaIO) and not len(decoded.media[0]):
            raise MediaError(DAMAGED)
        return decoded

    def _downscaled(self, image: MediaWithBytes[Image.Image]) -> MediaWithBytes[Image.Image]:
        pixels = self.guard.limits.downscale_pixels
        if (smaller := checks.downscaled(image.media, pixels)) is image.media:
            return image
        return MediaWithBytes(smaller, image.original_bytes, {**(image.io_config or {}), "downscale_pixels": pixels})


def _unpacked(text: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise MediaError("its data is no valid base64") from None


def _located(error: MediaError, url: str, kind: Kind) -> MediaError:
    """Return the error with the part of the request that it is about, as far as that can be told."""
    where = parts.path_of(b"".join(_body.get() or ()), url)
    return type(error)(f"{where or 'The request'}, {'a' if kind == 'video' else 'an'} {kind}: {error}.", param=where)


def guard(settings: Settings, domains: Iterable[str] | None) -> Guard:
    """Return the guard that the settings, and vLLM's own `--allowed-media-domains`, ask for."""
    if settings.media_allow_private_networks:
        log.warning("MEDIA_ALLOW_PRIVATE_NETWORKS is set: links may lead to anything that this machine can reach")
    policy = Policy(
        seconds=settings.media_fetch_timeout,
        domains=tuple(filter(None, (settings.media_allowed_domains, tuple(domains or ())))),
        ports=settings.media_allowed_ports,
        private_networks=settings.media_allow_private_networks,
    )
    limits = Limits.of(settings)
    return Guard(Fetcher(policy), limits, Decoders(limits))


def install(guard: Guard) -> None:
    """Have vLLM load media through `guard`."""

    def open_video_capture(data: bytes) -> Capture:
        capture = guard.decoders.capture()
        # So that who waits for it can abort it, even while it is being opened.
        captures = _captures.get()
        if captures is not None:
            captures.append(capture)
        capture.open(data)
        return capture

    Connector.guard, Connector._fetching = guard, {}
    MEDIA_CONNECTOR_REGISTRY.register(NAME)(Connector)
    os.environ["VLLM_MEDIA_CONNECTOR"] = NAME
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(int(guard.limits.image_pixels.value))
    os.environ["VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"] = str(-(-guard.limits.bytes["audio"].value // (1 << 20)))
    # vLLM has no other place at which a program could say how videos are opened.
    setattr(OpenCVVideoBackendMixin, "open_video_capture", staticmethod(open_video_capture))  # noqa: B010 - to mypy
    Image.MAX_IMAGE_PIXELS = int(guard.limits.image_pixels.value)
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def watched(app: App) -> App:
    """Return an app that remembers the body of its request, so that errors can name the part that they are about."""

    async def watching(scope: Message, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []

        async def kept() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                pieces.append(message.get("body", b""))
            return message

        _body.set(pieces)
        await app(scope, kept, send)

    return watching


def explain(app: Starlette) -> None:
    """Have an app answer what is wrong with media in the worker's words, where its routes let errors through."""
    for kind in (VLLMError, ValueError):
        app.add_exception_handler(kind, _explaining(app.exception_handlers[kind]))
    # One has been built already, with the handlers that there were.
    app.middleware_stack = None


def _explaining(otherwise: Any) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        if (explained := await asyncio.to_thread(_explained, error)) is not None:
            return JSONResponse(explained.body(), explained.http_status)
        answered: Response = await otherwise(request, error)
        return answered

    return answer


def _explained(error: Exception) -> MediaError | None:
    if isinstance(error, _RefusalError):
        return error.error
    if str(error).endswith(_TEXT_ONLY):
        return _refused(0, tuple(parts.KEYS), "the model takes text only, no images, videos or sounds")
    if found := _TOO_MANY.match(str(error)):
        limit, kind = int(found[1]), cast("Kind", found[2])
        why = f"at most {limit} of kind {kind} may be in one request; {kind.upper()}_LIMIT allows more"
        return _refused(limit, (kind,), why if limit else f"the model, or its settings, takes no {kind}")
    return None


def _refused(place: int, kinds: Iterable[Kind], why: str) -> MediaError:
    """Return the error for the part that is in such a place among those of some kinds."""
    body = b"".join(_body.get() or ())
    paths = [path for kind in kinds for path in parts.paths_of(body, kind)]
    where = paths[place] if place < len(paths) else None
    return _noted(MediaError(f"{where or 'The request'}: {why}.", param=where))


def _noted(error: MediaError) -> MediaError:
    """Return the error, having entered it in the meter of the job."""
    if (meter := metered.get()) is not None:
        meter.rejections.append(error.reason)
    return error
