"""vLLM's media connector, through which all of its routes load media, with the worker's own fetches and decoders."""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy.typing as npt
import pybase64
from PIL import Image
from vllm import envs
from vllm.multimodal.media import AudioMediaIO, ImageMediaIO, MediaConnector, MediaIO, MediaWithBytes, VideoMediaIO

from worker.engine.media_errors import RejectedMediaError, rejection
from worker.errors import MediaBusyError, MediaError, MediaTooLargeError, MemoryBusyError, MemoryExceededError
from worker.media import checks
from worker.media.checks import Kind, Limit, Limits
from worker.media.decoders import Decoders, Look, SoundForm
from worker.media.documents import Documents, Page, located
from worker.media.fetch import Fetcher, Policy
from worker.media.pool import DAMAGED
from worker.media.video import Capture
from worker.memory import Account, Budget, current_account
from worker.settings import Settings
from worker.telemetry.usage import Fetch, current_usage

_KINDS: dict[type[MediaIO[Any]], Kind] = {ImageMediaIO: "image", VideoMediaIO: "video", AudioMediaIO: "audio"}
OPENCV = "opencv"
FRAMES = "data:video/jpeg;"
MAX_FRAMES = 10_000
"""Frames in a video that is a list of JPEG images."""
FETCHES = 8
"""How many links of one request are fetched at once."""
_VLLM_LIMIT = re.compile(r"VLLM_MAX_\w+")

_capture: ContextVar[Capture | None] = ContextVar("capture", default=None)
"""The capture for the video that the current thread loads."""

log = logging.getLogger(__name__)


class Guard:
    """What all connectors share: the limits, the connections for links, and the processes that decode media.

    Create it in the event loop that serves. `memory` is the budget of all requests, and `policy` says which
    links may be fetched; file: links may lead into `folder`. Only videos of a `video_backend` other than OpenCV are
    decoded in this process.
    """

    def __init__(
        self,
        settings: Settings,
        memory: Budget,
        policy: Policy | None = None,
        video_backend: str = OPENCV,
        modules: Iterable[str] = ("cv2", "av"),
        folder: Path | None = None,
    ) -> None:
        if settings.media_allow_private_networks:
            log.warning("MEDIA_ALLOW_PRIVATE_NETWORKS is set: links may lead to anything that this machine can reach")
        self.limits = Limits(settings)
        if 0 < envs.VLLM_MAX_IMAGE_PIXELS < self.limits.image_pixels.value:
            self.limits.image_pixels = Limit("VLLM_MAX_IMAGE_PIXELS", envs.VLLM_MAX_IMAGE_PIXELS)
        self.video_backend = video_backend
        self.decoders = Decoders(self.limits, modules)
        self.documents = Documents(self.limits)
        self.loop, self.thread = asyncio.get_running_loop(), threading.get_ident()
        self._folder = folder.resolve() if folder else None
        self._memory = memory
        self._fetcher = Fetcher(policy or Policy.of(settings))
        self._fetches: dict[tuple[Account, str, Limit], asyncio.Task[bytes]] = {}
        self._slots: WeakKeyDictionary[Account, asyncio.Semaphore] = WeakKeyDictionary()

    @contextmanager
    def account(self) -> Iterator[Account]:
        """Return the account of the current request. A load outside of any request gets one of its own."""
        if (account := current_account.get()) is not None:
            yield account
            return
        account = self._memory.account()
        try:
            yield account
        finally:
            account.close()

    async def file(self, url: str, kind: Kind, account: Account) -> bytes:
        """Return the file behind a link (http:, https:, data: or file:), or raise `MediaError`."""
        limit, in_thread = self.limits.bytes[kind], self.decoders.pool.in_thread
        scheme = url[:5].lower()
        if scheme == "data:":
            await account.take_media(len(url) * 3 // 4)
            return await in_thread(_decode_url, url, limit)
        if scheme == "file:":
            data: bytes = await in_thread(checks.read_file, url, self._folder, limit)
            await account.take_media(len(data))
            return data
        return await self.fetch(url, limit, account)

    async def fetch(self, url: str, limit: Limit, account: Account) -> bytes:
        """Return the file at a link, or raise `MediaError`. Loads of one request that overlap share a fetch."""
        key = (account, url.partition("#")[0], limit)
        if (task := self._fetches.get(key)) is None:
            task = self._fetches[key] = asyncio.create_task(self._fetch(url, limit, account))
            task.add_done_callback(lambda _: self._fetches.pop(key))
        return await task

    async def _fetch(self, url: str, limit: Limit, account: Account) -> bytes:
        reserved = 0

        async def reserve(size: int) -> None:
            nonlocal reserved
            await account.take_media(size)
            reserved += size

        async with self._slots.setdefault(account, asyncio.Semaphore(FETCHES)):
            began = time.monotonic()
            try:
                data = await self._fetcher.get(url, limit, reserve)
            except BaseException:
                account.give_back_media(reserved)
                raise
        if (usage := current_usage.get()) is not None:
            usage.fetches.append(Fetch(time.monotonic() - began, len(data)))
        return data

    def open_capture(self, data: bytes) -> Capture:
        """Open a video in the process that the current load has; raise `MediaError` if it fails or exceeds a limit."""
        if (capture := _capture.get()) is None:
            raise MediaError("videos are decoded for requests only")
        capture.open(data)
        return capture

    async def decode_sound(self, data: bytes, account: Account) -> tuple[npt.NDArray[Any], float]:
        """Decode a sound at its own rate, with vLLM's limits."""
        megabytes = envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB
        if len(data) > megabytes << 20:
            raise MediaTooLargeError(f"it is larger than VLLM_MAX_AUDIO_CLIP_FILESIZE_MB={megabytes} allows")
        seconds, size = envs.VLLM_MAX_AUDIO_DECODE_DURATION_S, envs.VLLM_MAX_AUDIO_DECODE_BYTES
        return await self.decoders.sound(data, SoundForm(None, seconds, size), account)

    async def aclose(self) -> None:
        """Close the connections and end the processes."""
        await self._fetcher.aclose()
        self.decoders.close()
        self.documents.close()


class Connector(MediaConnector):
    """Loads media through a guard. vLLM creates one for each request."""

    def __init__(self, guard: Guard, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guard = guard
        self._limits = guard.limits

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        """Return the media behind a link (http:, https:, data: or file:), as vLLM's own connector does.

        Raises:
            RejectedMediaError: the media cannot be used; the message says why, and which part of the request it is.
        """
        kind = _KINDS[type(media_io)]
        page = self._guard.documents.page(url)
        try:
            with self._guard.account() as account, as_media_errors():
                if page is not None and isinstance(media_io, ImageMediaIO):
                    return await self._page(page, media_io.image_mode, account)
                if isinstance(media_io, VideoMediaIO) and url[: len(FRAMES)].lower() == FRAMES:
                    return await self._frames(url, media_io, account)
                data = await self._guard.file(url, kind, account)
                if isinstance(media_io, ImageMediaIO):
                    return await self._image(data, media_io, account)
                if isinstance(media_io, VideoMediaIO):
                    return await self._video(data, media_io, account)
                return await self._guard.decode_sound(data, account)
        except MediaError as error:
            if page is not None:
                raise RejectedMediaError(located(error, page.document.path)) from None
            raise await rejection(error, url, kind) from None

    def load_from_url(self, url: str, media_io: MediaIO[Any], **_: Any) -> Any:
        """Do the same from another thread than the event loop's, as the routes of pooling models do."""
        if threading.get_ident() == self._guard.thread:
            raise RuntimeError("vLLM loads media in the event loop, which would wait for itself")
        return asyncio.run_coroutine_threadsafe(self.load_from_url_async(url, media_io), self._guard.loop).result()

    async def _page(self, page: Page, mode: str | None, account: Account) -> MediaWithBytes[Image.Image]:
        """Draw a page of a document. vLLM caches the image under a key, in place of the bytes of a file."""
        image = await self._guard.documents.draw(page, mode, account)
        return MediaWithBytes(image, f"{page.key} {image.mode} {image.size}".encode())

    async def _image(
        self, data: bytes, media_io: ImageMediaIO, account: Account, count: int = 1
    ) -> MediaWithBytes[Image.Image]:
        """Decode an image, one of `count` of the same size."""
        look = Look(media_io.image_mode, media_io.rgba_background_color)
        picture = await self._guard.decoders.image(data, look, account, count)
        # vLLM caches the image under a key of its bytes and this.
        config: dict[str, Any] = {}
        if picture.is_converted:
            config = {"image_mode": look.mode, "rgba_background_color": look.background}
        if (pixels := self._limits.downscale_pixels) is not None:
            config["downscale_pixels"] = pixels
        return MediaWithBytes(picture.image, data, config or None)

    async def _frames(self, url: str, media_io: VideoMediaIO, account: Account) -> Any:
        """Load a video in the form of JPEG frames, each in base64, separated by commas."""
        text = url.partition(",")[2]
        checks.check_size(len(text) * 3 // 4, self._limits.bytes["video"])
        most, count = media_io.num_frames, text.count(",") + 1
        if not isinstance(most, int):
            raise MediaError("media_io_kwargs.video.num_frames must be a number")
        if 0 < most < count:
            raise MediaError(f"it has {count} frames, more than VIDEO_MAX_FRAMES={most} allows")
        if count > MAX_FRAMES:
            raise MediaError(f"it has {count} frames; at most {MAX_FRAMES} are accepted")
        images: list[Image.Image] = []
        for frame in text.split(","):
            data = await self._guard.decoders.pool.in_thread(_decode_base64, frame)
            await account.take_media(len(data))
            # Frames of different sizes fail later.
            images.append((await self._image(data, media_io.image_io, account, count)).media)
        media_io.image_io = cast(ImageMediaIO, _Decoded(images))
        return await self._guard.decoders.pool.in_thread(_load, media_io.load_base64, "video/jpeg", text)

    async def _video(self, data: bytes, media_io: VideoMediaIO, account: Account) -> Any:
        checks.check_size(len(data), self._limits.bytes["video"])
        checks.check_kind(data, "video")
        backend = media_io.kwargs.get("backend", self._guard.video_backend)
        if backend not in (OPENCV, self._guard.video_backend):
            raise MediaError(
                f"media_io_kwargs must not set the backend to {backend!r}: the worker's settings choose it"
            )
        decoders = self._guard.decoders
        async with decoders.capture(account) as capture:
            _capture.set(capture)
            video = await decoders.pool.in_thread(_load, media_io.load_bytes, data)
        if not len(video.media[0]):
            raise MediaError(DAMAGED)
        return video


class _Decoded:
    """Gives vLLM images that are decoded already, in their order."""

    def __init__(self, images: Iterable[Image.Image]) -> None:
        self._images = iter(images)

    def load_base64(self, _media_type: str, _data: str) -> Image.Image:
        return next(self._images)


@contextmanager
def as_media_errors() -> Iterator[None]:
    """Raise errors about the budget of memory as errors about media."""
    try:
        yield
    except MemoryExceededError as error:
        raise MediaTooLargeError(f"there is no memory for it. {error}".rstrip(".")) from None
    except MemoryBusyError as error:
        raise MediaBusyError(f"there is no memory for it now. {error}".rstrip(".")) from None


def _load(load: Callable[..., Any], *arguments: Any) -> Any:
    """Call one of vLLM's loaders, and translate its errors."""
    try:
        return load(*arguments)
    except (MediaError, ImportError):
        raise
    except MemoryError:
        raise MediaTooLargeError("there is not enough memory to decode it") from None
    except Exception as error:  # noqa: BLE001 - decoders raise errors of any type for damaged files
        if limit := _VLLM_LIMIT.search(str(error)):
            raise MediaTooLargeError(f"it is larger than {limit[0]} allows") from None
        raise MediaError(DAMAGED) from None


def _decode_url(url: str, limit: Limit) -> bytes:
    spec, comma, text = url[5:].partition(",")
    if not comma or "base64" not in spec.lower().split(";")[1:]:
        raise MediaError("a data: URL must be data:<media type>;base64,<data>")
    checks.check_size(len(text) * 3 // 4 - 2, limit)
    return _decode_base64(text)


def _decode_base64(text: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        raise MediaError("its data is not valid base64") from None
