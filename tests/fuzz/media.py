"""Properties of the checks and decoders of media, for any file. A target raises AssertionError if one does not hold.

The decoders run in this process and without limits for memory, so that a debugger and the coverage see them. In the
worker they run in child processes.
"""

import asyncio
import io
import json
import mmap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import process_time
from typing import Any

from PIL import Image

from worker import settings
from worker.errors import MediaError
from worker.media import formats, structure
from worker.media.checks import Limits
from worker.media.decoder import Decoder, translated
from worker.media.decoders import Decoders, Look, SoundForm
from worker.media.pool import Process
from worker.memory import Budget

CPU_SECONDS = 20.0
"""For one file of at most a few megabytes. Honest ones take milliseconds."""
MAX_PIXELS = 1 << 18
MAX_BYTES = 4 * MAX_PIXELS
"""The size of a file, and of the shared memory: as small as the largest result."""
MAX_SECONDS = 10.0
"""The duration of a sound."""
KINDS = ("image", "video", "audio", "document")

LOOKS = (Look(), Look(None), *(Look(mode, (0, 0, 0)) for mode in ("RGBA", "L", "1", "F", "CMYK")))
FORMS = tuple(SoundForm(rate, MAX_SECONDS, MAX_BYTES) for rate in (None, 16_000))


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
    for check in (structure.check_jpeg, structure.check_mp4):
        with bounded_time(), suppress(MediaError):
            check(data)


class Decoding:
    """Decodes one file after the other, as the worker does, but in this process. Use it as a context manager."""

    def __init__(self, downscale_pixels: int | None = None) -> None:
        environ = {"MAX_IMAGE_PIXELS": str(MAX_PIXELS), "MEDIA_PROCESSES": "1"}
        environ |= {f"MAX_{kind.upper()}_BYTES": str(MAX_BYTES) for kind in KINDS}
        if downscale_pixels is not None:
            environ["IMAGE_DOWNSCALE_PIXELS"] = str(downscale_pixels)
        self._most_pixels = downscale_pixels
        self._decoders = _HereDecoders(Limits(settings.read(environ)))
        self._budget = Budget(1 << 30)
        self._runner = asyncio.Runner()

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()
        self._runner.close()

    def image(self, data: bytes, look: Look = LOOKS[0]) -> bool:
        """Decode a file as an image. Return whether it was decoded; its pixels are those that it claims."""
        account = self._budget.account()
        try:
            with _as_in_worker():
                image = self._runner.run(self._decoders.image(data, look, account)).image
        except MediaError:
            image = None
        self._check_budget(0 if image is None else image.width * image.height * 4)
        account.close()
        if image is None:
            return False
        image.load()
        if look.mode not in (None, image.mode):
            raise AssertionError(f"the mode is {image.mode} instead of {look.mode}")
        with _as_in_worker(), Image.open(io.BytesIO(data)) as opened:
            claimed = opened.size
        # A file may state that it must be turned.
        if self._most_pixels is None and image.size not in (claimed, claimed[::-1]):
            raise AssertionError(f"an image that claims {claimed} has {image.size} pixels")
        # A line of pixels is not made shorter than its width allows.
        most = max(self._most_pixels, *image.size) if self._most_pixels else MAX_PIXELS
        if image.width * image.height > most:
            raise AssertionError(f"{image.size} are too many pixels")
        return True

    def sound(self, data: bytes, form: SoundForm = FORMS[0]) -> bool:
        """Decode a file as a sound. Return whether it was decoded; it is as long as it may be."""
        account = self._budget.account()
        try:
            with _as_in_worker():
                samples, rate = self._runner.run(self._decoders.sound(data, form, account))
        except MediaError:
            self._check_budget(0)
            return False
        self._check_budget(samples.nbytes)
        account.close()
        if form.rate not in (None, rate) or rate < 1:
            raise AssertionError(f"the rate is {rate} Hz instead of {form.rate}")
        if samples.ndim != 1 or not 0 < samples.shape[-1] <= MAX_SECONDS * rate:
            raise AssertionError(f"{samples.shape} samples at {rate} Hz")
        return True

    def _check_budget(self, size: int) -> None:
        if self._budget.held != size:
            raise AssertionError(f"{self._budget.held} bytes are counted instead of {size}")


class _HereDecoder(Decoder):
    def _limit(self, size: int) -> None:
        """Leave the limits of this process as they are."""
        if size < 0:
            raise AssertionError(f"a limit of {size} bytes")


class _HereProcess(Process):
    """A decoder in this process. Requests and replies become JSON, as between processes."""

    is_alive = is_usable = True

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, MAX_BYTES)
        self._decoder = _HereDecoder(self.memory)
        self._limit = None
        self._used = 0

    def request(self, operation: str, *arguments: object) -> Any:
        with translated():
            return json.loads(json.dumps(self._decoder.run(operation, *json.loads(json.dumps(arguments)))))

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


class _HereDecoders(Decoders):
    def _start(self) -> Process:
        return _HereProcess()


@contextmanager
def _as_in_worker() -> Iterator[None]:
    """Ignore warnings, as the decoder processes do, and bound the time."""
    with warnings.catch_warnings(), bounded_time():
        warnings.simplefilter("ignore")
        yield
