"""Decodes images and sounds, and opens videos, in the processes of a pool. The account of the request pays for them.

A large image is first only opened, so that the memory for its pixels is reserved before any of them is decoded.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from worker.errors import MediaError
from worker.media.checks import Limits, check_frames, check_kind, check_pixels, check_size
from worker.media.pool import Pool, Process
from worker.media.structure import PIXEL_BYTES
from worker.media.video import Capture
from worker.memory import Account

QUICK_PIXELS = 4 << 20
"""Images of up to this size are decoded at once if there is memory for them."""
KEPT_PIXEL_BYTES = 4
"""What Pillow needs for a pixel of the result."""
SOUND_BYTES = 268_435_456
"""vLLM's default for the samples of a sound."""
IMAGE_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")


def check_mode(mode: str | None) -> None:
    """Raise `MediaError` unless a mode is one of Pillow's, or None."""
    if mode not in (None, *IMAGE_MODES):
        raise MediaError(f"image_mode is {mode!r}; accepted are {', '.join(IMAGE_MODES)}")


class Look(NamedTuple):
    """How an image is returned."""

    mode: str | None = "RGB"
    """One of Pillow's modes; None keeps the file's."""
    background: tuple[int, int, int] = (255, 255, 255)
    """The colour behind transparent pixels."""


class Picture(NamedTuple):
    """A decoded image."""

    image: Image.Image
    is_converted: bool
    """Whether its mode is another than the file's."""


class SoundForm(NamedTuple):
    """The rate at which a sound is returned, and its limits."""

    rate: int | None = None
    """In Hz; None keeps the file's."""
    seconds: float | None = None
    """The longest duration."""
    size: int | None = None
    """The most bytes of samples."""


class Decoders:
    """Decodes media in child processes. `modules` are those that the processes need besides Pillow: `cv2`, `av`."""

    def __init__(self, limits: Limits, modules: Iterable[str] = ("cv2", "av")) -> None:
        self._limits = limits
        self._modules = tuple(modules)
        self.pool = Pool(limits.processes, self._start)

    def _start(self) -> Process:
        pixels = KEPT_PIXEL_BYTES * int(self._limits.image_pixels.value)
        sounds = SOUND_BYTES if "av" in self._modules else 0
        files = (int(limit.value) for limit in self._limits.bytes.values())
        return Process(max(pixels, sounds, *files), self._modules)

    async def image(self, data: bytes, look: Look, account: Account, count: int = 1) -> Picture:
        """Decode an image file, upright, and scaled down if the settings say so. It is one of `count` of a video.

        Raises:
            MediaError: the file is no image, is damaged, or exceeds a limit.
            MemoryExceededError: the request has no memory left for its pixels.
            MemoryBusyError: the other requests leave no memory.
        """
        check_mode(look.mode)
        check_size(len(data), self._limits.bytes["image"])
        check_kind(data, "image")
        allowed = 0
        async with self.pool.process(account) as process:
            # Most images fit into this, so that their memory is known before they are opened.
            if account.has_room(PIXEL_BYTES * QUICK_PIXELS):
                allowed = QUICK_PIXELS
                await account.take_media(PIXEL_BYTES * allowed, is_brief=True)
            decoded = await self._decode(process, data, look, account, count, allowed)
            if not isinstance(decoded, Picture) and account.has_room(PIXEL_BYTES * decoded):
                await account.take_media(PIXEL_BYTES * decoded, is_brief=True)
                decoded = await self._decode(process, data, look, account, count, decoded)
        if isinstance(decoded, Picture):
            return decoded
        # While it waits for memory, others may use the process.
        await account.take_media(PIXEL_BYTES * decoded, is_brief=True)
        async with self.pool.process(account) as process:
            decoded = await self._decode(process, data, look, account, count, decoded)
        assert isinstance(decoded, Picture)
        return decoded

    async def _decode(
        self, process: Process, data: bytes, look: Look, account: Account, count: int, allowed: int
    ) -> Picture | int:
        """Decode an image of at most `allowed` pixels, whose memory is reserved; else return its number of pixels."""
        kept = 0
        try:
            decoded = await self.pool.in_thread(self._request, process, data, look, count, allowed)
            if isinstance(decoded, Picture):
                kept = KEPT_PIXEL_BYTES * decoded.image.width * decoded.image.height
        finally:
            account.keep_media(PIXEL_BYTES * allowed, kept)
        return decoded

    def _request(self, process: Process, data: bytes, look: Look, count: int, allowed: int) -> Picture | int:
        process.begin(data, self._limits.image_seconds)
        allowed = min(allowed, int(self._limits.image_pixels.value))
        (width, height), result = process.request(
            "decode_image", len(data), allowed, *look, self._limits.downscale_pixels
        )
        check_pixels(width, height, self._limits.image_pixels)
        if count > 1:
            check_frames(count * width * height, self._limits)
        if result is None:
            return int(width * height)
        mode, order, used, size, is_converted = result
        return Picture(Image.frombytes(mode, tuple(size), process.result(used), "raw", order), is_converted)

    async def sound(self, data: bytes, form: SoundForm, account: Account) -> tuple[npt.NDArray[np.float32], int]:
        """Decode a sound. Return its samples, with the shape (samples,), the mean of all channels, and its rate in Hz.

        Raises:
            MediaError: the file is no sound, is damaged, or exceeds a limit.
            MemoryExceededError: the request has no memory left for its samples.
            MemoryBusyError: the other requests leave no memory.
        """
        check_size(len(data), self._limits.bytes["audio"])
        check_kind(data, "audio")
        async with self.pool.process(account, is_long=True) as process:
            samples, rate = await self.pool.in_thread(self._decode_sound, process, data, form)
            await account.take_media(4 * samples)
            return np.frombuffer(process.result(4 * samples), np.float32).copy(), rate

    def _decode_sound(self, process: Process, data: bytes, form: SoundForm) -> tuple[int, int]:
        process.begin(data, self._limits.decode_seconds)
        samples, rate = process.request("decode_sound", len(data), *form)
        return int(samples), int(rate)

    @asynccontextmanager
    async def capture(self, account: Account) -> AsyncIterator[Capture]:
        """Lend a process for one video. Use the capture in threads of the pool, not in the event loop."""
        loop = asyncio.get_running_loop()

        def reserve(size: int) -> None:
            asyncio.run_coroutine_threadsafe(account.take_media(size), loop).result()

        async with self.pool.process(account, is_long=True) as process:
            capture = Capture(process, self._limits, reserve)
            try:
                yield capture
                await self.pool.in_thread(capture.close)
            except BaseException:
                # The video would keep its memory in the process.
                process.kill()
                raise

    def close(self) -> None:
        """End the processes."""
        self.pool.close()
