"""A child process that decodes untrusted media: `python -m worker.media.decoder SOCKET MEMORY MODULES`.

`pool.py` starts it. If a file makes a decoder crash, hang or use too much memory, only this process ends. It has no
secrets in its environment, and can open neither files nor sockets.

SOCKET and MEMORY are file descriptors. SOCKET carries requests `[operation, arguments…]` and replies, one JSON message
each. A reply is `[null, result]`, or `[class of the error, message]`. MEMORY is shared memory: it holds the file to
decode first, then the pixels or samples. MODULES are the libraries to import, separated by commas.
"""

import ctypes
import io
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
import warnings
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any

from PIL import AvifImagePlugin, Image, ImageOps

from worker.errors import MediaError, MediaTooLargeError
from worker.media import structure
from worker.media.arrow import copy_rgbx
from worker.media.formats import DEMUXERS, PILLOW_FORMATS, media_type
from worker.media.structure import PIXEL_BYTES

DAMAGED = "it cannot be decoded: the file is truncated or damaged, or larger than its header says"
IMAGE_BYTES = 128 << 20
"""What decoding an image may need besides its pixels, in bytes of address space."""
STREAM_BYTES = 768 << 20
"""What decoding a video or a sound may need besides its frames, in bytes of address space."""
FRAME_BYTES = 64
"""What decoding a video may need for each pixel of a frame, in bytes of address space."""
THREADS = min(8, len(os.sched_getaffinity(0)))
"""For one video. Each thread keeps frames of its own."""
PARENT_POLL_SECONDS = 1.0
PR_SET_NO_NEW_PRIVS = 38
PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")
"""Pillow's modes whose images consist of their pixels alone, without a palette."""


class Decoder:
    """The operations. Each gets its file from the start of the shared memory, and leaves its result there."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._statistics = os.open("/proc/self/statm", os.O_RDONLY)
        self._capture: Any = None

    def run(self, operation: str, *arguments: Any) -> Any:
        """Run an operation; raise `MediaError` if the media cannot be decoded."""
        return getattr(self, operation)(*arguments)

    def ready(self) -> bool:
        """Answer that the process has started."""
        return True

    def _file(self, size: int) -> bytes:
        return self._memory[:size]

    def _limit(self, size: int) -> None:
        """Let this process have `size` more bytes of address space than now."""
        pages = int(os.pread(self._statistics, 100, 0).split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + size, resource.RLIM_INFINITY))

    # ---- Images

    def decode_image(
        self, size: int, allowed: int, mode: str | None, background: Sequence[int], pixels: int | None
    ) -> tuple[tuple[int, int], tuple[str, str, int, tuple[int, int], bool] | None]:
        """Decode a file, turn the image upright, and convert it to `mode` and to at most `pixels` pixels.

        Return the width and height that the file claims, and the result: its mode, the order and number of its bytes in
        the shared memory, its size, and whether the mode was converted. There is no result if the file claims more than
        `allowed` pixels.
        """
        data = self._file(size)
        detected = media_type(data)
        canvas = 0
        if detected == "image/jpeg":
            structure.check_jpeg(data)
        elif detected == "image/webp":
            # Pillow's decoder allocates two canvases when it opens the file.
            width, height = structure.webp_size(data)
            if (canvas := width * height) > allowed:
                return (width, height), None
        self._limit(2 * size + 8 * canvas + IMAGE_BYTES)
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS.get(str(detected), ())) as image:
            claimed = image.size
            if detected == "image/tiff":
                structure.check_tiles(dict(getattr(image, "tag_v2", {})), *claimed)
            if claimed[0] * claimed[1] > allowed:
                return claimed, None
            self._limit(PIXEL_BYTES * claimed[0] * claimed[1] + IMAGE_BYTES)
            image.load()
            if image.size != claimed:
                raise MediaTooLargeError("its pixels are not those that its header claims")
            with suppress(Exception):  # As in vLLM: a wrong orientation is better than no image.
                ImageOps.exif_transpose(image, in_place=True)
            converted = _converted(image, mode, tuple(background))
            is_converted = converted is not image
        if pixels is not None and converted.width * converted.height > pixels:
            scale = (pixels / (converted.width * converted.height)) ** 0.5
            smaller = (_scaled(converted.width, scale, pixels), _scaled(converted.height, scale, pixels))
            converted = converted.resize(smaller, Image.Resampling.LANCZOS)
        return claimed, (*self._share(converted), converted.size, is_converted)

    def _share(self, image: Image.Image) -> tuple[str, str, int]:
        """Copy the pixels into the shared memory; return the mode, the order of the bytes, and their number."""
        if image.mode == "RGB" and 4 * image.width * image.height <= len(self._memory):
            with suppress(ValueError):
                return "RGB", "RGBX", copy_rgbx(image, self._address)
        pixels = image.tobytes()
        self._memory[: len(pixels)] = pixels
        return image.mode, image.mode, len(pixels)

    # ---- Sounds and videos

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

    # ---- Videos: the part of the interface of `cv2.VideoCapture` that vLLM uses

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


def _scaled(length: int, scale: float, most: int) -> int:
    return min(max(1, int(length * scale)), most)


def _converted(image: Image.Image, mode: str | None, background: tuple[int, ...]) -> Image.Image:
    """Convert an image as vLLM does: what is transparent takes the background's colour. None keeps the mode."""
    if mode is None:
        if image.mode in PLAIN_MODES:
            return image
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == mode:
        return image
    if mode != "RGB" or not image.has_transparency_data:
        return image.convert(mode)
    layered = image if image.mode == "RGBA" else image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(layered, mask=layered.getchannel("A"))
    return flat


@contextmanager
def translated() -> Iterator[None]:
    """Raise `MediaError` in place of the errors of the libraries, which are of any type for damaged files."""
    try:
        yield
    except MediaError:
        raise
    except MemoryError:
        raise MediaTooLargeError("decoding it needs more memory than its header justifies") from None
    except Exception:  # noqa: BLE001
        raise MediaError(DAMAGED) from None


def main(socket: int, memory: int, modules: str) -> None:
    """Answer requests until the other end closes the socket (EOFError)."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    for module in filter(None, modules.split(",")):
        import_module(module)
    _decode_small_images()
    # Nobody reads warnings, and a file may cause any number.
    warnings.simplefilter("ignore")
    # The size of an image is checked by the parent process.
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection: Connection[Any, Any] = Connection(socket)
    decoder = Decoder(mmap.mmap(memory, 0))
    if "av" in modules:
        _decode_silence()
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # From here on no file and no socket can be opened, even if FFmpeg takes a video for a list of them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    while True:
        reply: list[Any]
        operation = json.loads(connection.recv_bytes())
        try:
            with translated():
                reply = [None, decoder.run(*operation)]
        except MediaError as error:
            reply = [type(error).__name__, str(error)]
        connection.send_bytes(json.dumps(reply).encode())


def _decode_small_images() -> None:
    """Decode an image in each format: Pillow imports its modules when they are first needed."""
    for (name,) in PILLOW_FORMATS.values():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).quantize(2).convert("P" if name in ("PNG", "GIF") else "RGB").save(file, name)
        with Image.open(file, formats=(name,)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            _converted(image, "RGB", (0, 0, 0)).resize((4, 4)).tobytes()


def _decode_silence() -> None:
    """Decode a short sound: PyAV imports some of its modules at the first one."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(320))
    # Not in the shared memory, which may have a file already.
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(file.getvalue())
    Decoder(memory).decode_sound(memory.tell(), None, None, None)


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent process ends, even while something is being decoded."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    with suppress(EOFError):
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
