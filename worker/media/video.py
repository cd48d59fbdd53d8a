"""Reads frames of a video from a decoder process, because damaged videos can crash or hang OpenCV."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from worker.errors import MediaError, MediaTooLargeError
from worker.media.checks import Limits, check_frames, check_pixels
from worker.media.pool import DAMAGED, Process
from worker.media.structure import check_frame_rate

MAX_MISSES = 1000
"""How many frames in a row may be missing. A container may claim billions."""
MAX_DEFERRED = 100
DECODER_PIXEL_BYTES = 32
"""What FFmpeg keeps for each pixel of a frame: the frames that others refer to."""
RESERVED_BYTES = 32 << 20
LARGE_PIXELS = 4 << 20

Frame = npt.NDArray[np.uint8]


class Capture:
    """The part of the interface of `cv2.VideoCapture` that vLLM uses, with limits.

    Every method raises `MediaError` once the video turns out to be damaged, too large or too slow to decode.
    """

    def __init__(self, process: Process, limits: Limits, reserve: Callable[[int], None]) -> None:
        self._process = process
        self._limits = limits
        self._reserve = reserve
        """Counts bytes for the request, and waits until there is memory for them."""
        self._skipping = False
        self._deferred = 0
        self._misses = 0
        self._pixels = 0
        self._frame_pixels = 0
        self._reserved = 0
        """Bytes that are reserved for the next frames."""

    def open(self, data: bytes) -> None:
        """Open a video, and compare its container's metadata with the limits before any frame is decoded."""
        self._process.begin(data, self._limits.decode_seconds)
        if not self._process.request("open_video", len(data)):
            raise MediaError(DAMAGED)
        width, height = int(self.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self.get(cv2.CAP_PROP_FRAME_HEIGHT))
        frames, rate = self.get(cv2.CAP_PROP_FRAME_COUNT), self.get(cv2.CAP_PROP_FPS)
        longest = self._limits.video_seconds
        if width < 1 or height < 1:
            raise MediaError(DAMAGED)
        check_pixels(width, height, self._limits.image_pixels)
        check_frame_rate(frames, rate, longest.value)
        if frames / rate > longest.value:
            raise MediaTooLargeError(f"it is {frames / rate:.0f} s long, which is more than {longest} allows")
        self._frame_pixels = width * height
        self._reserve(DECODER_PIXEL_BYTES * width * height)

    def get(self, prop: int) -> float:
        """Return a property, one of `cv2.CAP_PROP_…`."""
        return float(self._request_after_grabs("get", prop))

    def set(self, prop: int, value: float) -> bool:
        """Set a property; return whether OpenCV accepted the value."""
        return bool(self._request_after_grabs("set", prop, value))

    def grab(self) -> bool:
        """Go to the next frame; return whether there is one.

        vLLM skips frames by several grabs in a row. Grabs after the first are deferred and sent together later. They
        return True before it is known whether there is a frame.
        """
        if self._skipping and self._deferred < MAX_DEFERRED:
            self._deferred += 1
            return True
        self._skipping = True
        return self._send_grabs(1)

    def _send_grabs(self, more: int = 0) -> bool:
        """Send the deferred grabs and `more`; return whether the last frame exists, or True if there was no grab."""
        times, self._deferred = self._deferred + more, 0
        if not times:
            return True
        grabbed: list[bool] = self._process.request("grab", times)
        self._misses = 0 if any(grabbed) else self._misses + times
        if self._misses > MAX_MISSES:
            raise MediaError(DAMAGED)
        return grabbed[-1]

    def retrieve(self) -> tuple[bool, Frame | None]:
        """Return whether the current frame could be decoded, and the frame: (height, width, 3) in BGR order.

        The next call overwrites the frame.
        """
        if not self._send_grabs():
            return False, None
        shape = self._request_after_grabs("retrieve")
        if shape is None:
            return False, None
        height, width, channels = shape
        check_pixels(width, height, self._limits.image_pixels)
        self._pixels += height * width
        check_frames(self._pixels, self._limits)
        size = height * width * channels
        if self._reserved < size:
            # For several frames at once, because it takes as long as decoding a small frame.
            more = max(size, min(8 * size, RESERVED_BYTES))
            self._reserve(more)
            self._reserved += more
        self._reserved -= size
        return True, np.frombuffer(self._process.result(size), np.uint8).reshape(height, width, channels)

    def read(self) -> tuple[bool, Frame | None]:
        """Go to the next frame and return it as `retrieve` does."""
        return self.retrieve() if self.grab() else (False, None)

    def close(self) -> None:
        """Free the video's memory in the process. After large frames only its end frees all of it."""
        if self._frame_pixels > LARGE_PIXELS:
            self._process.kill()
        elif self._process.is_alive:
            self._process.request("close_video")

    def _request_after_grabs(self, name: str, *arguments: object) -> Any:
        self._send_grabs()
        self._skipping = False
        return self._process.request(name, *arguments)
