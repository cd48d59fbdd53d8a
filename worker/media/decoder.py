"""A process of its own that reads strangers' videos: `python -m worker.media.decoder FD FD`, started by `video.py`.

What makes OpenCV crash, hang or use up memory ends this process alone, and its environment holds no secret. It is asked
through the first file descriptor, a socket, where each message is JSON but for the video, which is bytes. Frames go
into the second, which is shared memory.
"""

import io
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

MEMORY_BYTES = 8 << 30
ORPHAN_SECONDS = 1.0


def main(socket: int, memory: int) -> None:
    """Answer until the other side is gone."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(socket)
    frames = np.frombuffer(mmap.mmap(memory, 0), np.uint8)
    # Whatever FFmpeg takes a video for: no file and no address is opened from here on.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    capture: cv2.VideoCapture | None = None
    while True:
        name, *arguments = json.loads(connection.recv_bytes())
        if name == "close":
            capture = None
            reply(connection, value=True)
        elif name == "open":
            # `release()` of the one before would crash this version of OpenCV.
            capture = cv2.VideoCapture(io.BytesIO(connection.recv_bytes()), cv2.CAP_FFMPEG, [])  # type: ignore[call-overload]
            reply(connection, capture.isOpened())
        elif capture is not None and name == "grab":
            (times,) = arguments
            reply(connection, [capture.grab() for _ in range(times)])
        elif capture is not None and name == "retrieve":
            reply(connection, retrieve(capture, frames))
        elif capture is not None:
            reply(connection, getattr(capture, name)(*arguments))


def retrieve(capture: cv2.VideoCapture, frames: npt.NDArray[np.uint8]) -> tuple[int, ...] | None:
    """Put a frame into the memory; return its shape, or None if there is none."""
    _, frame = capture.retrieve()
    if frame is None:
        return None
    # One that does not fit is not copied; the other side tells so by its shape.
    if frame.size <= frames.size:
        frames[: frame.size] = frame.reshape(-1)
    return tuple(map(int, frame.shape))


def leave_with(parent: int) -> None:
    """End this process soon after its parent has, even in the middle of a video."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def reply(connection: "Connection[Any, Any]", value: object) -> None:
    """Send a value as JSON."""
    connection.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    with suppress(EOFError):
        main(*map(int, sys.argv[1:]))
