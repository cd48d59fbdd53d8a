"""Properties of the checks and decoders of media, for any file. A target raises AssertionError if one does not hold.

The decoders run in this process and without limits for memory, so that a debugger and the coverage see them. In the
worker they run in child processes.
"""

import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from time import process_time
from typing import NamedTuple

import numpy as np
from PIL import Image

from worker.errors import MediaError
from worker.media import formats, structure
from worker.media.decoder import Decoder, translated

CPU_SECONDS = 20.0
"""For one file of at most a few megabytes. Honest ones take milliseconds."""
PIXELS = 1 << 18
"""The most pixels of an image. The shared memory has four bytes for each."""
MEMORY_BYTES = 4 * PIXELS
SOUND_SECONDS = 10.0
KINDS = ("image", "video", "audio")


class Look(NamedTuple):
    """How an image is returned, as `Decoder.decode_image` takes it."""

    mode: str | None = "RGB"
    background: tuple[int, int, int] = (255, 255, 255)
    pixels: int | None = None


LOOKS = (Look(), Look(None), Look("RGBA"), Look("L", pixels=100), Look("1"), Look("F"))


class HereDecoder(Decoder):
    """A decoder that leaves the limits of this process as they are."""

    def _limit(self, size: int) -> None:
        if size < 0:
            raise AssertionError(f"a limit of {size} bytes")


@cache
def shared_memory() -> mmap.mmap:
    """Return the memory for files and results, as small as the largest result."""
    return mmap.mmap(-1, MEMORY_BYTES)


@cache
def decoder() -> Decoder:
    """Return the one decoder. It keeps a file open, and serves one file after the other, as in the worker."""
    return HereDecoder(shared_memory())


def _put(data: bytes, kind: str) -> bool:
    """Copy a file into the shared memory; return False if it is too large, or not of this kind."""
    is_accepted = len(data) <= MEMORY_BYTES and formats.fits(formats.media_type(data) or "", kind)
    if is_accepted:
        shared_memory()[: len(data)] = data
    return is_accepted


@contextmanager
def bounded_time() -> Iterator[None]:
    """Raise `AssertionError` if the work takes long, measured in CPU time."""
    start = process_time()
    try:
        yield
    finally:
        if (seconds := process_time() - start) > CPU_SECONDS:
            raise AssertionError(f"it takes {seconds:.0f} s")


def gates(data: bytes) -> None:
    """Detect the format, and check the structure as every format. Only `MediaError` may be raised."""
    with bounded_time():
        detected = formats.media_type(data)
        formats.has_external_references(data)
    if detected is not None and not any(formats.fits(detected, kind) for kind in KINDS):
        raise AssertionError(f"{detected} can be used as nothing")
    with bounded_time(), suppress(MediaError):
        structure.check_jpeg(data)
    with bounded_time(), suppress(MediaError):
        structure.check_mp4(data)


def image(data: bytes, look: Look = Look()) -> bool:  # noqa: B008
    """Decode a file as an image if it is one. Return whether it was decoded; its pixels are those that it claims."""
    if not _put(data, "image"):
        return False
    try:
        with _as_in_worker(), translated():
            claimed, result = decoder().run("decode_image", len(data), PIXELS, *look)
    except MediaError:
        return False
    if result is None:
        if claimed[0] * claimed[1] <= PIXELS:
            raise AssertionError(f"an image of {claimed} pixels is not decoded")
        return False
    mode, size, used, _ = result
    _check_image(look, mode, size, used)
    # A file may state that it must be turned.
    if look.pixels is None and size not in (claimed, claimed[::-1]):
        raise AssertionError(f"an image that claims {claimed} has {size} pixels")
    return True


def _check_image(look: Look, mode: str, size: tuple[int, int], used: int) -> None:
    """Check a decoded image as the parent process will read it."""
    if look.mode not in (None, mode):
        raise AssertionError(f"the mode is {mode} instead of {look.mode}")
    if look.pixels is not None and size[0] * size[1] > max(look.pixels, *size):
        raise AssertionError(f"{size} has more than {look.pixels} pixels")
    if used > MEMORY_BYTES:
        raise AssertionError(f"{used} bytes do not fit into the shared memory")
    # Pillow raises ValueError if there are too few or too many bytes.
    Image.frombytes(mode, size, shared_memory()[:used])


def sound(data: bytes, rate: int | None = None, mono: bool = True) -> bool:
    """Decode a file as a sound if it may be one. Return whether it was decoded; it is as long as it may be."""
    if not _put(data, "audio"):
        return False
    call = ("decode_sound", len(data), rate, mono, SOUND_SECONDS, None)
    try:
        with _as_in_worker(), translated():
            channels, samples, final_rate = decoder().run(*call)
    except MediaError:
        return False
    if rate not in (None, final_rate) or final_rate < 1:
        raise AssertionError(f"the rate is {final_rate} Hz instead of {rate}")
    if channels < 1 or (mono and channels != 1):
        raise AssertionError(f"{channels} channels")
    if not 0 < samples <= SOUND_SECONDS * final_rate or 4 * channels * samples > MEMORY_BYTES:
        raise AssertionError(f"{samples} samples at {final_rate} Hz")
    np.frombuffer(shared_memory()[: 4 * channels * samples], np.float32).reshape(channels, samples)
    return True


@contextmanager
def _as_in_worker() -> Iterator[None]:
    """Ignore warnings, as the decoder processes do, and bound the time."""
    with warnings.catch_warnings(), bounded_time():
        warnings.simplefilter("ignore")
        yield
