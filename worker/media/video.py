"""Videos, decoded in processes of their own: a damaged one has been seen to crash OpenCV, or to hold it up for good."""

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

from worker import processes as program
from worker.errors import MediaError, MediaTooLargeError
from worker.media.checks import Limits, check_frames, check_pixels

DAMAGED = "it cannot be decoded: it is cut off or damaged"
START_SECONDS = 30.0
MAX_MISSES = 1000
"""Frames in a row that may be missing: a container may claim billions."""
MAX_DEFERRED = 100
MAX_IDLE = 2
"""Processes that are kept for the next videos."""

Frame = npt.NDArray[np.uint8]


class _Process:
    """One decoder, and the memory in which it puts frames of so many bytes at most."""

    def __init__(self, frame_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("frames")
        os.ftruncate(memory, frame_bytes)
        self.frames: Frame = np.frombuffer(mmap.mmap(memory, 0, prot=mmap.PROT_READ), np.uint8)
        descriptors = (theirs.fileno(), memory)
        with theirs, os.fdopen(memory):
            # Without the worker's environment, which holds its keys.
            self._process = program.start(
                "worker.media.decoder",
                *map(str, descriptors),
                environ={"OPENCV_LOG_LEVEL": "OFF"},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self.kill()
        self._process.wait()
        self.connection.close()


class Decoders:
    """The processes that are there; one is started when all are busy."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._closed = False

    def prepare(self) -> None:
        """Start one now, so that the first video need not wait for it."""
        self._idle.put(self._start())

    def capture(self) -> "Capture":
        """Return what a video can be opened with."""
        return Capture(self._take(), self._limits, self._give_back)

    def _give_back(self, process: _Process) -> None:
        if self._closed or self._idle.qsize() >= MAX_IDLE:
            process.close()
        else:
            self._idle.put(process)

    def _take(self) -> _Process:
        with suppress(queue.Empty):
            while True:
                process = self._idle.get_nowait()
                if process.is_alive:
                    return process
                process.close()
        return self._start()

    def _start(self) -> _Process:
        return _Process(3 * int(self._limits.image_pixels.value))

    def close(self) -> None:
        """End the processes; those that are busy end when they are given back."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


class Capture:
    """What `cv2.VideoCapture` is, as far as vLLM makes use of it, within limits.

    Every method raises a `MediaError` once the video turns out to be damaged, too large or too slow.
    """

    def __init__(self, process: _Process, limits: Limits, give_back: Callable[[_Process], None]) -> None:
        self._process: _Process | None = process
        self._limits = limits
        self._give_back = give_back
        self._ends_at = time.monotonic() + START_SECONDS + limits.decode_seconds.value
        self._passing = False
        self._deferred = 0
        self._misses = 0
        self._pixels = 0

    def open(self, data: bytes) -> None:
        """Open a video.

        Raises:
            MediaError: it cannot be opened, or must not.
        """
        if not self._ask("open", then=data):
            raise MediaError(DAMAGED)
        self._check()
        self._ends_at = time.monotonic() + self._limits.decode_seconds.value

    def _check(self) -> None:
        """Compare what the container says with the limits, before a frame is decoded."""
        width, height = int(self.get(cv2.CAP_PROP_FRAME_WIDTH)), int(self.get(cv2.CAP_PROP_FRAME_HEIGHT))
        frames, rate = self.get(cv2.CAP_PROP_FRAME_COUNT), self.get(cv2.CAP_PROP_FPS)
        longest = self._limits.video_seconds
        if width < 1 or height < 1:
            raise MediaError(DAMAGED)
        check_pixels(width, height, self._limits.image_pixels)
        if not (frames >= 1 and rate > 0):
            raise MediaError("its container does not tell how long it is; remux it")
        if frames / rate > longest.value:
            raise MediaTooLargeError(f"it is {frames / rate:.0f} s long, which is more than {longest} allows")

    def get(self, prop: int) -> float:
        """Return a property."""
        return float(self._question("get", prop))

    def set(self, prop: int, value: float) -> bool:
        """Set a property; tell whether that was possible."""
        return bool(self._question("set", prop, value))

    def grab(self) -> bool:
        """Go to the next frame; tell whether there is one, as far as that is known yet.

        Of several grabs in a row, which pass over frames that are not wanted, those after the first are made together,
        later.
        """
        if self._passing and self._deferred < MAX_DEFERRED:
            self._deferred += 1
            return True
        self._catch_up()
        self._passing = True
        return self._grabbed(1)

    def _catch_up(self) -> bool:
        deferred, self._deferred = self._deferred, 0
        return self._grabbed(deferred) if deferred else True

    def _grabbed(self, times: int) -> bool:
        found: list[bool] = self._ask("grab", times)
        self._misses = 0 if any(found) else self._misses + times
        if self._misses > MAX_MISSES:
            raise MediaError(DAMAGED)
        return found[-1]

    def retrieve(self) -> tuple[bool, Frame | None]:
        """Return whether the frame could be decoded, and the frame, until the next: (height, width, 3), blue first."""
        if not self._catch_up():
            return False, None
        shape = self._question("retrieve")
        if shape is None:
            return False, None
        height, width, channels = shape
        check_pixels(width, height, self._limits.image_pixels)
        self._pixels += height * width
        check_frames(self._pixels, self._limits)
        return True, self._live().frames[: height * width * channels].reshape(height, width, channels)

    def read(self) -> tuple[bool, Frame | None]:
        """Go to the next frame and return it, as `grab` and `retrieve` do."""
        return self.retrieve() if self.grab() else (False, None)

    def abort(self) -> None:
        """Have whatever is being asked, in another thread, fail at once."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """Give the process back, if it is still good."""
        if self._process is None:
            return
        self._ends_at = time.monotonic() + START_SECONDS
        with suppress(MediaError):
            self._ask("close")
            process, self._process = self._process, None
            self._give_back(process)

    def _question(self, *question: object) -> Any:
        """Ask something that comes after the grabs so far."""
        self._catch_up()
        self._passing = False
        return self._ask(*question)

    def _ask(self, *question: object, then: bytes | None = None) -> Any:
        connection = self._live().connection
        try:
            connection.send_bytes(json.dumps(question).encode())
            if then is not None:
                connection.send_bytes(then)
            if connection.poll(max(0.0, self._ends_at - time.monotonic())):
                return json.loads(connection.recv_bytes())
        except (OSError, EOFError, ValueError):
            raise self._broken(MediaError(DAMAGED)) from None
        raise self._broken(MediaTooLargeError(f"it takes longer to decode than {self._limits.decode_seconds} s"))

    def _live(self) -> _Process:
        if self._process is None:
            raise MediaError(DAMAGED)
        return self._process

    def _broken(self, error: MediaError) -> MediaError:
        """Return `error`, having ended the process, which nobody knows the state of."""
        if self._process is not None:
            self._process.close()
            self._process = None
        return error
