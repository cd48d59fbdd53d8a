"""Decodes images and sounds, and opens videos, in the processes of a pool. The budget of the request counts the result.

An image is first only opened, so that the memory for its pixels can be reserved before any of them is decoded.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from worker.errors import MediaError
from worker.media.checks import Limits, check_frames, check_kind, check_pixels, check_size
from worker.media.pool import Pool, Process
from worker.media.video import Capture
from worker.memory import Account

PIXEL_BYTES = 20
"""What decoding a pixel needs at most: the decoder's buffers, and conversions from a palette with transparency."""
KEPT_PIXEL_BYTES = 4
"""What Pillow needs for a pixel of the result."""
MAX_PROCESSES = 8
IMAGE_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")


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
    """How a sound is returned, and its limits."""

    rate: int | None = None
    """In Hz; None keeps the file's."""
    mono: bool = True
    """Whether to return the mean of the channels."""
    seconds: float | None = None
    """The longest duration."""
    size: int | None = None
    """The most bytes of samples."""


class Decoders:
    """Decodes media in child processes. `modules` are those that the processes need besides Pillow: `cv2`, `av`."""

    def __init__(self, limits: Limits, modules: Iterable[str] = ("cv2", "av")) -> None:
        self._limits = limits
        self._modules = tuple(modules)
        each = limits.processes or min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        self.pool = Pool(each, self._start)

    def _start(self) -> Process:
        pixels = KEPT_PIXEL_BYTES * int(self._limits.image_pixels.value)
        return Process(max(pixels, *(int(limit.value) for limit in self._limits.bytes.values())), self._modules)

    async def image(self, data: bytes, look: Look, account: Account, count: int = 1) -> Picture:
        """Decode an image file, upright, and scaled down if the settings say so. It is one of `count` of a video.

        Raises:
            MediaError: the file is no image, is damaged, or exceeds a limit.
            MemoryExceededError: the request has no memory left for its pixels.
            MemoryBusyError: the other requests leave no memory.
        """
        if look.mode not in (None, *IMAGE_MODES):
            raise MediaError(f"image_mode is {look.mode!r}; accepted are {', '.join(IMAGE_MODES)}")
        check_size(len(data), self._limits.bytes["image"])
        check_kind(data, "image")
        async with self.pool.process(account) as process:
            needed = await self.pool.in_thread(self._open_image, process, data, count)
            if account.fits(needed):
                await account.take_media(needed)
                return await self._load(process, look, needed, account)
        # While it waits for memory, others may use the process.
        await account.take_media(needed)
        async with self.pool.process(account) as process:
            await self.pool.in_thread(self._open_image, process, data, count)
            return await self._load(process, look, needed, account)

    def _open_image(self, process: Process, data: bytes, count: int) -> int:
        """Open an image, check its size, and return the bytes that decoding it needs."""
        process.begin(data, self._limits.image_seconds)
        width, height = map(int, process.request("open_image", len(data)))
        check_pixels(width, height, self._limits.image_pixels)
        if count > 1:
            check_frames(count * width * height, self._limits)
        return PIXEL_BYTES * width * height

    async def _load(self, process: Process, look: Look, needed: int, account: Account) -> Picture:
        kept = 0
        try:
            picture = await self.pool.in_thread(self._load_image, process, look, needed)
            kept = KEPT_PIXEL_BYTES * picture.image.width * picture.image.height
        finally:
            account.give_back_media(needed - kept)
        return picture

    def _load_image(self, process: Process, look: Look, needed: int) -> Picture:
        mode, size, used, is_converted = process.request("load_image", *look, self._limits.downscale_pixels, needed)
        raw = "RGBX" if mode == "RGB" else mode
        return Picture(Image.frombytes(mode, tuple(size), process.result(used), "raw", raw), is_converted)

    async def sound(self, data: bytes, form: SoundForm, account: Account) -> tuple[npt.NDArray[np.float32], int]:
        """Decode a sound. Return its samples, (samples,) with `mono`, else (channels, samples), and its rate in Hz.

        Raises:
            MediaError: the file is no sound, is damaged, or exceeds a limit.
            MemoryExceededError: the request has no memory left for its samples.
            MemoryBusyError: the other requests leave no memory.
        """
        check_size(len(data), self._limits.bytes["audio"])
        check_kind(data, "audio")
        async with self.pool.process(account, is_long=True) as process:
            channels, samples, rate = await self.pool.in_thread(self._decode_sound, process, data, form)
            await account.take_media(4 * channels * samples)
            sound: npt.NDArray[np.float32] = np.frombuffer(process.result(4 * channels * samples), np.float32).copy()
        return sound if form.mono else sound.reshape(channels, samples), rate

    def _decode_sound(self, process: Process, data: bytes, form: SoundForm) -> tuple[int, int, int]:
        process.begin(data, self._limits.decode_seconds)
        channels, samples, rate = process.request("decode_sound", len(data), *form)
        return int(channels), int(samples), int(rate)

    @asynccontextmanager
    async def capture(self, account: Account) -> AsyncIterator[Capture]:
        """Lend a process for one video. Use the capture in threads of the pool, not in the event loop."""
        loop = asyncio.get_running_loop()

        def reserve(size: int) -> None:
            asyncio.run_coroutine_threadsafe(account.take_media(size), loop).result()

        async with self.pool.process(account, is_long=True) as process:
            yield Capture(process, self._limits, reserve)

    def close(self) -> None:
        """End the processes."""
        self.pool.close()
