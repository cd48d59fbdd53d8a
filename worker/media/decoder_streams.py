"""Sounds and videos: operations of the decoder processes."""

import io
import mmap
import os
import wave
from itertools import chain
from typing import Any

from worker.errors import MediaError, MediaTooLargeError
from worker.media import structure
from worker.media.formats import DEMUXERS, media_type
from worker.media.workspace import Workspace

STREAM_BYTES = 768 << 20
"""What decoding a video or a sound may need besides its frames, in bytes of address space."""
FRAME_BYTES = 64
"""What decoding a video may need for each pixel of a frame, in bytes of address space."""
THREADS = min(8, len(os.sched_getaffinity(0)))
"""For one video. Each thread keeps frames of its own."""


class StreamDecoder(Workspace):
    """Decodes sounds, and videos by the part of the interface of `cv2.VideoCapture` that vLLM uses."""

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(memory)
        self._capture: Any = None

    def _stream(self, size: int) -> tuple[bytes, str | None]:
        """Check the structure of a sound or video file; return it and FFmpeg's demuxer for its format."""
        data = self._file(size)
        demuxer = DEMUXERS.get(str(media_type(data)))
        if demuxer == "mov":
            structure.check_mp4(data)
        self._limit(2 * size + STREAM_BYTES)
        return data, demuxer

    def decode_sound(
        self, size: int, rate: int | None, seconds: float | None, most_bytes: int | None
    ) -> tuple[int, int]:
        """Decode a sound at `rate` in Hz, or at its own. Return its number of samples and its rate.

        The samples are 32-bit floats, the mean of all channels.
        """
        import av
        import numpy as np

        data, demuxer = self._stream(size)
        sound = np.frombuffer(self._memory, np.float32, len(self._memory) // 4)
        most = sound.size if most_bytes is None else min(sound.size, most_bytes // 4)
        samples = 0
        with av.open(io.BytesIO(data), "r", format=demuxer, metadata_errors="replace") as container:
            if not container.streams.audio:
                raise MediaError("it has no audio track")
            stream = container.streams.audio[0]
            rate = rate or stream.rate
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
            for frame in chain(container.decode(stream), (None,)):
                for resampled in resampler.resample(frame):
                    piece = resampled.to_ndarray().mean(axis=0, dtype=np.float32)
                    if samples + piece.size > most:
                        raise MediaTooLargeError("its samples take more bytes than VLLM_MAX_AUDIO_DECODE_BYTES allows")
                    sound[samples : samples + piece.size] = piece
                    samples += piece.size
                if seconds is not None and samples > seconds * rate:
                    raise MediaTooLargeError(f"it is longer than VLLM_MAX_AUDIO_DECODE_DURATION_S={seconds:g} allows")
        if not samples:
            raise MediaError("it has no samples")
        return samples, rate

    def open_video(self, size: int) -> bool:
        """Open a video; return whether it can be opened."""
        import cv2

        data, _ = self._stream(size)
        # A new capture each time: calling `release()` crashes this version of OpenCV.
        options = [cv2.CAP_PROP_N_THREADS, THREADS]
        self._capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, options)  # type: ignore[call-overload]
        width, height = self.get(cv2.CAP_PROP_FRAME_WIDTH), self.get(cv2.CAP_PROP_FRAME_HEIGHT)
        self._limit(STREAM_BYTES + FRAME_BYTES * int(width * height))
        return bool(self._capture.isOpened())

    def get(self, prop: int) -> float:
        """Return a property, one of `cv2.CAP_PROP_…`."""
        return float(self._capture.get(prop))

    def set(self, prop: int, value: float) -> bool:
        """Set a property; return whether OpenCV accepted the value."""
        return bool(self._capture.set(prop, value))

    def grab(self, times: int) -> list[bool]:
        """Go forward by some frames; return whether each exists."""
        return [bool(self._capture.grab()) for _ in range(times)]

    def retrieve(self) -> tuple[int, ...] | None:
        """Leave the current frame in the shared memory and return its shape; None if there is no frame."""
        import numpy as np

        _, frame = self._capture.retrieve()
        if frame is None:
            return None
        # A frame that is too large is not copied. The parent process rejects it by its shape.
        if frame.nbytes <= len(self._memory):
            np.frombuffer(self._memory, np.uint8, frame.nbytes)[:] = frame.reshape(-1)
        return tuple(map(int, frame.shape))

    def close_video(self) -> None:
        """Free the video's memory."""
        self._capture = None


def decode_silence() -> None:
    """Decode a short sound: PyAV imports some of its modules at the first one."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(320))
    # Not in the shared memory, which may have a file already.
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(file.getvalue())
    StreamDecoder(memory).decode_sound(memory.tell(), None, None, None)
