"""vLLM's media connector, through which all of its routes load media, with the worker's own fetches and checks."""

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import pybase64
from PIL import Image
from vllm.multimodal.media import AudioMediaIO, ImageMediaIO, MediaConnector, MediaIO, MediaWithBytes, VideoMediaIO
from vllm.multimodal.media.connector import global_thread_pool

from worker.engine.media_errors import rejected
from worker.errors import MediaError, MediaTooLargeError
from worker.media import checks
from worker.media.checks import Kind, Limit, Limits
from worker.media.fetch import Fetcher, Policy
from worker.media.video import DAMAGED, Capture, Decoders
from worker.settings import Settings
from worker.telemetry.usage import Fetch, current_usage

_KINDS: dict[type[MediaIO[Any]], Kind] = {ImageMediaIO: "image", VideoMediaIO: "video", AudioMediaIO: "audio"}
_VLLM_LIMIT = re.compile(r"VLLM_MAX_\w+")

_captures: ContextVar[list[Capture] | None] = ContextVar("captures", default=None)
"""The videos that the current load has opened."""

log = logging.getLogger(__name__)


class Guard:
    """What all connectors share: the limits, the connections for links, and the processes that decode videos.

    Create it in the event loop that serves. `domains` is vLLM's own list of allowed hosts.
    """

    def __init__(self, settings: Settings, domains: Iterable[str] | None) -> None:
        if settings.media_allow_private_networks:
            log.warning("MEDIA_ALLOW_PRIVATE_NETWORKS is set: links may lead to anything that this machine can reach")
        policy = Policy(
            seconds=settings.media_fetch_timeout,
            domains=tuple(filter(None, (settings.media_allowed_domains, tuple(domains or ())))),
            ports=settings.media_allowed_ports,
            private_networks=settings.media_allow_private_networks,
        )
        self.limits = Limits(settings)
        self.decoders = Decoders(self.limits)
        self.loop = asyncio.get_running_loop()
        self._fetcher = Fetcher(policy)
        self._fetches: dict[tuple[object, str, Limit], asyncio.Task[bytes]] = {}

    async def fetch(self, url: str, limit: Limit) -> bytes:
        """Return the file at a link, or raise `MediaError`. Loads of one job that overlap share a fetch."""
        # Loads that belong to no job share no fetch.
        key = (current_usage.get() or object(), url.partition("#")[0], limit)
        if (task := self._fetches.get(key)) is None:
            task = self._fetches[key] = asyncio.create_task(self._fetch(url, limit))
            task.add_done_callback(lambda _: self._fetches.pop(key))
        return await task

    async def _fetch(self, url: str, limit: Limit) -> bytes:
        began = time.monotonic()
        data = await self._fetcher.get(url, limit)
        if (usage := current_usage.get()) is not None:
            usage.fetches.append(Fetch(time.monotonic() - began, len(data)))
        return data

    def open_capture(self, data: bytes) -> Capture:
        """Open a video in a decoder process; raise `MediaError` if that fails, or if it exceeds a limit."""
        capture = self.decoders.capture()
        # Added before it is opened, so that a load that is cancelled while the video is being opened aborts it, too.
        if (captures := _captures.get()) is not None:
            captures.append(capture)
        capture.open(data)
        return capture

    async def aclose(self) -> None:
        """Close the connections and end the processes."""
        await self._fetcher.aclose()
        self.decoders.close()


class Connector(MediaConnector):
    """Loads media through a guard. vLLM creates one for each request."""

    def __init__(self, guard: Guard, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self._limits = guard.limits

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        """Return the media behind a link (http:, https:, data: or file:), decoded by vLLM.

        Raises:
            RejectedMediaError: the media cannot be used; the message says why, and which part of the request it is.
        """
        kind = _KINDS[type(media_io)]
        try:
            return await self._load(url, kind, media_io)
        except MediaError as error:
            raise await asyncio.to_thread(rejected, error, url, kind) from None

    def load_from_url(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        """Do the same from another thread than the event loop's, as the routes of pooling models do."""
        return asyncio.run_coroutine_threadsafe(self.load_from_url_async(url, media_io), self._guard.loop).result()

    async def _load(self, url: str, kind: Kind, media_io: MediaIO[Any]) -> Any:
        limit = self._limits.bytes[kind]
        scheme = url[:5].lower()
        if scheme == "data:":
            return await _in_thread(self._decode_url, url, kind, media_io)
        if scheme == "file:":
            data = await _in_thread(checks.read_file, url, self.allowed_local_media_path, limit)
        else:
            data = await self._guard.fetch(url, limit)
        return await _in_thread(self._decode_file, data, kind, media_io)

    def _decode_url(self, url: str, kind: Kind, media_io: MediaIO[Any]) -> Any:
        spec, comma, text = url[5:].partition(",")
        media_type, *parameters = spec.lower().split(";")
        if not comma or "base64" not in parameters:
            raise MediaError("a data: URL must be data:<media type>;base64,<data>")
        if isinstance(media_io, VideoMediaIO) and media_type == "video/jpeg":
            self._check_frames(text, media_io)
            return self._decode(media_io, lambda: media_io.load_base64(media_type, text))
        checks.check_size(len(text) * 3 // 4 - 2, self._limits.bytes[kind])
        return self._decode_file(_decode_base64(text), kind, media_io)

    def _check_frames(self, text: str, media_io: VideoMediaIO) -> None:
        """Check a video in the form of JPEG frames, each in base64, separated by commas."""
        checks.check_size(len(text) * 3 // 4, self._limits.bytes["video"])
        frames = text.split(",")
        if 0 < media_io.num_frames < len(frames):
            raise MediaError(f"it has {len(frames)} frames, more than VIDEO_MAX_FRAMES={media_io.num_frames} allows")
        pixels = sum(checks.check_image(_decode_base64(frame), self._limits) for frame in frames)
        checks.check_frames(pixels, self._limits)

    def _decode_file(self, data: bytes, kind: Kind, media_io: MediaIO[Any]) -> Any:
        if kind == "image":
            checks.check_image(data, self._limits)
        else:
            checks.check_size(len(data), self._limits.bytes[kind])
            checks.check_kind(data, kind)
        return self._decode(media_io, lambda: media_io.load_bytes(data))

    def _decode(self, media_io: MediaIO[Any], decode: Callable[[], Any]) -> Any:
        """Call one of vLLM's decoders, translate its errors, and check the result."""
        try:
            decoded = decode()
        except (MediaError, ImportError):
            raise
        except MemoryError:
            raise MediaTooLargeError("there is not enough memory to decode it") from None
        except Exception as error:  # noqa: BLE001 - decoders raise errors of any type for damaged files
            if limit := _VLLM_LIMIT.search(str(error)):
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
        pixels, (width, height) = self._limits.downscale_pixels, image.media.size
        if pixels is None or width * height <= pixels:
            return image
        scale = math.sqrt(pixels / (width * height))
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        smaller = image.media.resize(size, Image.Resampling.LANCZOS)
        # vLLM caches the image under a key of its bytes and `io_config`.
        return MediaWithBytes(smaller, image.original_bytes, {**(image.io_config or {}), "downscale_pixels": pixels})


async def _in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in vLLM's thread pool. If the caller is cancelled, videos that it decodes are aborted."""
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


def _decode_base64(text: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise MediaError("its data is not valid base64") from None
