"""Decodes videos in child processes, because damaged videos can crash or hang OpenCV."""

import json
import mmap
import os
import queue
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from worker import processes
from worker.errors import MediaError, MediaTooLargeError
from worker.media.checks import Limits, check_frames, check_pixels

DAMAGED = "it cannot be decoded: the file is truncated or damaged"
START_SECONDS = 30.0
MAX_MISSES = 1000
"""How many frames in a row may be missing. A container may claim billions."""
MAX_DEFERRED = 100
MAX_IDLE = 2
"""How many idle processes are kept for the next videos."""

Frame = npt.NDArray[np.uint8]


class _Process:
    """One decoder process and the memory that it shares with this one, large enough for a frame of `frame_bytes`."""

    def __init__(self, frame_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("frames")
        os.ftruncate(memory, frame_bytes)
        self.frames: Frame = np.frombuffer(mmap.mmap(memory, 0, prot=mmap.PROT_READ), np.uint8)
        descriptors = (theirs.fileno(), memory)
        with theirs, os.fdopen(memory):
            # The worker's own environment is not passed on: it contains secrets.
            self.popen = processes.start(
                "worker.media.decoder",
                *map(str, descriptors),
                environ={"OPENCV_LOG_LEVEL": "OFF"},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.connection.close()


class Decoders:
    """A pool of decoder processes. It starts a new one when none is idle."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._closed = False

    def prepare(self) -> None:
        """Start a process now, so that the first video does not wait for it."""
        self._idle.put(self._start())

    def capture(self) -> "Capture":
        """Return a capture for one video. It uses a process until it is closed."""
        return Capture(self._take(), self._limits, self._give_back)

    def _take(self) -> _Process:
        with suppress(queue.Empty):
            while (process := self._idle.get_nowait()).popen.poll() is not None:
                process.close()
            return process
        return self._start()

    def _give_back(self, process: _Process) -> None:
        if self._closed or self._idle.qsize() >= MAX_IDLE:
            process.close()
        else:
            self._idle.put(process)

    def _start(self) -> _Process:
        return _Process(3 * int(self._limits.image_pixels.value))

    def close(self) -> None:
        """End the idle processes. A busy one ends when its capture is closed."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


class Capture:
    """The part of the interface of `cv2.VideoCapture` that vLLM uses, with limits.

    Every method raises `MediaError` once the video turns out to be damaged, too large or too slow to decode.
    """

    def __init__(self, process: _Process, limits: Limits, give_back: Callable[[_Process], None]) -> None:
        self._process: _Process | None = process
        self._frames = process.frames
        self._limits = limits
        self._give_back = give_back
        self._deadline = time.monotonic() + START_SECONDS + limits.decode_seconds.value
        self._skipping = False
        self._deferred = 0
        self._misses = 0
        self._pixels = 0

    def open(self, data: bytes) -> None:
        """Open a video, and compare its container's metadata with the limits before any frame is decoded."""
        if not self._request("open", video=data):
            raise MediaError(DAMAGED)
        width, height = int(self.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self.get(cv2.CAP_PROP_FRAME_HEIGHT))
        frames, rate = self.get(cv2.CAP_PROP_FRAME_COUNT), self.get(cv2.CAP_PROP_FPS)
        longest = self._limits.video_seconds
        if width < 1 or height < 1:
            raise MediaError(DAMAGED)
        check_pixels(width, height, self._limits.image_pixels)
        if not (frames >= 1 and rate > 0):
            raise MediaError("its container does not state its duration; remux the video")
        if frames / rate > longest.value:
            raise MediaTooLargeError(f"it is {frames / rate:.0f} s long, which is more than {longest} allows")
        self._deadline = time.monotonic() + self._limits.decode_seconds.value

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
        grabbed: list[bool] = self._request("grab", times)
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
        return True, self._frames[: height * width * channels].reshape(height, width, channels)

    def read(self) -> tuple[bool, Frame | None]:
        """Go to the next frame and return it as `retrieve` does."""
        return self.retrieve() if self.grab() else (False, None)

    def abort(self) -> None:
        """Make the call that another thread is waiting for fail at once."""
        if process := self._process:
            process.popen.kill()

    def close(self) -> None:
        """Return the process to the pool if it still works."""
        if self._process is None:
            return
        self._deadline = time.monotonic() + START_SECONDS
        with suppress(MediaError):
            self._request("close")
            process, self._process = self._process, None
            self._give_back(process)

    def _request_after_grabs(self, name: str, *arguments: object) -> Any:
        self._send_grabs()
        self._skipping = False
        return self._request(name, *arguments)

    def _request(self, name: str, *arguments: object, video: bytes | None = None) -> Any:
        """Send a request and return the reply. Without a reply, end the process, whose state is then unknown."""
        if self._process is None:
            raise MediaError(DAMAGED)
        connection, is_late = self._process.connection, False
        with suppress(OSError, EOFError, ValueError):
            connection.send_bytes(json.dumps([name, *arguments]).encode())
            if video is not None:
                connection.send_bytes(video)
            if connection.poll(max(0.0, self._deadline - time.monotonic())):
                return json.loads(connection.recv_bytes())
            is_late = True
        self._process.close()
        self._process = None
        if is_late:
            raise MediaTooLargeError(f"it takes longer to decode than {self._limits.decode_seconds} s allows")
        raise MediaError(DAMAGED)
