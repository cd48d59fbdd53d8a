"""A process of its own that reads strangers' videos: `python -m worker.decoder FD`, which `worker/video.py` starts.

What makes OpenCV crash, hang or use up memory ends this process alone, and it holds no secret. It is asked through the
socket `FD`, where each message is a JSON list, but for the video, which is bytes, and a frame, which follows its shape.
"""

import io
import json
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

MEMORY_BYTES = 8 << 30
ORPHAN_SECONDS = 1.0


def main(descriptor: int) -> None:
    """Answer until the other side is gone."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(descriptor)
    capture: cv2.VideoCapture | None = None
    while True:
        name, *arguments = json.loads(connection.recv_bytes())
        if name == "open":
            # `release()` of the one before would crash this version of OpenCV.
            capture = cv2.VideoCapture(io.BytesIO(connection.recv_bytes()), cv2.CAP_FFMPEG, [])  # type: ignore[call-overload]
            reply(connection, capture.isOpened())
        elif capture is not None and name == "retrieve":
            _, frame = capture.retrieve()
            reply(connection, None if frame is None else frame.shape)
            if frame is not None:
                connection.send_bytes(frame.tobytes())
        elif capture is not None:
            reply(connection, getattr(capture, name)(*arguments))


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
        main(int(sys.argv[1]))
