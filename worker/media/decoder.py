"""A child process that decodes untrusted videos: `python -m worker.media.decoder SOCKET MEMORY`, started by `video.py`.

If a video makes OpenCV crash, hang or use too much memory, only this process ends. Its environment contains no secrets.

Both arguments are file descriptors. SOCKET carries the requests and replies, one JSON message each; an "open" request
is followed by a message with the bytes of the video. MEMORY is shared memory for the decoded frame.
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
PARENT_POLL_SECONDS = 1.0


def main(socket: int, memory: int) -> None:
    """Answer requests until the other end closes the socket (EOFError)."""
    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(socket)
    frames = np.frombuffer(mmap.mmap(memory, 0), np.uint8)
    # From here on no file and no connection can be opened, even if FFmpeg takes a video for a list of them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    capture: Any = None
    reply: object
    while True:
        name, *arguments = json.loads(connection.recv_bytes())
        if name == "close":
            capture, reply = None, True
        elif name == "open":
            # A new capture each time: calling `release()` crashes this version of OpenCV.
            capture = cv2.VideoCapture(io.BytesIO(connection.recv_bytes()), cv2.CAP_FFMPEG, [])  # type: ignore[call-overload]
            reply = capture.isOpened()
        elif name == "grab":
            reply = [capture.grab() for _ in range(arguments[0])]
        elif name == "retrieve":
            reply = retrieve(capture, frames)
        else:
            reply = getattr(capture, name)(*arguments)
        connection.send_bytes(json.dumps(reply).encode())


def retrieve(capture: cv2.VideoCapture, frames: npt.NDArray[np.uint8]) -> tuple[int, ...] | None:
    """Copy the current frame into shared memory; return its shape, or None if there is no frame."""
    _, frame = capture.retrieve()
    if frame is None:
        return None
    # A frame that is too large is not copied. The parent process rejects it by its shape.
    if frame.size <= frames.size:
        frames[: frame.size] = frame.reshape(-1)
    return tuple(map(int, frame.shape))


def exit_with_parent(parent: int) -> None:
    """Exit soon after the parent process ends, even while a video is being decoded."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    with suppress(EOFError):
        main(*map(int, sys.argv[1:]))
