"""What media may be like. Checked before a decoder, let alone the model, works on it."""

import io
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from worker.errors import MediaError, MediaTooLargeError, RefusedLinkError
from worker.media.formats import fits, leads_elsewhere, media_type
from worker.settings.settings import Settings

Kind = Literal["image", "video", "audio"]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMATS: Mapping[Kind, str] = MappingProxyType(
    {
        "image": "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF",
        "video": "MP4, MOV, WebM, MKV, AVI, GIF, and lists of JPEG frames",
        "audio": "WAV, MP3, FLAC, OGG, AAC, M4A, and the sound of MP4, MOV and WebM",
    }
)


class Limit(NamedTuple):
    """A bound, and the setting that says it."""

    setting: str
    value: float

    def __str__(self) -> str:
        return f"{self.setting}={self.value:.15g}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of what is taken."""

    bytes: Mapping[Kind, Limit]
    """Of a file, by its kind."""
    image_pixels: Limit
    """Of an image, or of one frame of a video."""
    video_pixels: Limit
    """Of all frames that are taken of a video."""
    video_seconds: Limit
    decode_seconds: Limit
    """For decoding one video."""
    downscale_pixels: int | None
    """To how many pixels a larger image is scaled down."""

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Return what the settings say."""

        def limit(setting: str) -> Limit:
            return Limit(setting, getattr(settings, setting.lower()))

        return cls(
            bytes={
                "image": limit("MAX_IMAGE_BYTES"),
                "video": limit("MAX_VIDEO_BYTES"),
                "audio": limit("MAX_AUDIO_BYTES"),
            },
            image_pixels=limit("MAX_IMAGE_PIXELS"),
            video_pixels=limit("MAX_VIDEO_PIXELS"),
            video_seconds=limit("MAX_VIDEO_SECONDS"),
            decode_seconds=limit("MEDIA_DECODE_TIMEOUT"),
            downscale_pixels=settings.image_downscale_pixels,
        )


def check_size(size: int, limit: Limit) -> None:
    """Refuse so many bytes if they are too many.

    Raises:
        MediaTooLargeError: they are.
    """
    if size > limit.value:
        raise MediaTooLargeError(f"it has more bytes than {limit} allows")


def check_pixels(width: int, height: int, limit: Limit) -> None:
    """Refuse a picture of this size if it is too large.

    Raises:
        MediaTooLargeError: it is.
    """
    if width * height > limit.value:
        raise MediaTooLargeError(f"it is {width} x {height} pixels large, which is more than {limit} allows")


def check_kind(data: bytes, kind: Kind) -> None:
    """Refuse a file whose bytes are not those of a `kind`. A decoder sees nothing else, whatever it would make of it.

    Raises:
        MediaError: it is something else.
    """
    if not data:
        raise MediaError("it is empty: 0 bytes")
    found = media_type(data)
    if found is None or (kind != "image" and leads_elsewhere(data)):
        raise MediaError(f"its bytes are those of no known {kind} format; accepted are {FORMATS[kind]}")
    if found == "image/heic":
        raise MediaError(f"HEIC images cannot be decoded; accepted are {FORMATS['image']}")
    if not fits(found, kind):
        raise MediaError(f"its bytes are {found}, which is no {kind}; accepted are {FORMATS[kind]}")


def check_image(data: bytes, limits: Limits) -> int:
    """Look at an image's header: its format and its size; return how many pixels it has.

    Raises:
        MediaError: it is not to be decoded.
    """
    check_size(len(data), limits.bytes["image"])
    check_kind(data, "image")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLargeError(f"it has more pixels than {limits.image_pixels} allows") from None
    except Exception:  # noqa: BLE001 - Pillow's readers raise whatever they stumble over
        raise MediaError("it cannot be decoded: it is cut off or damaged") from None
    check_pixels(width, height, limits.image_pixels)
    return width * height


def check_frames(pixels: int, limits: Limits) -> None:
    """Refuse frames of a video that have so many pixels together if they are too many.

    Raises:
        MediaTooLargeError: they are.
    """
    if pixels > limits.video_pixels.value:
        raise MediaTooLargeError(
            f"its frames have together more pixels than {limits.video_pixels} allows; "
            "VIDEO_MAX_FRAMES may have fewer of them taken"
        )


def downscaled(image: Image.Image, pixels: int | None) -> Image.Image:
    """Return an image of at most so many pixels, with its proportions."""
    if pixels is None or image.width * image.height <= pixels:
        return image
    scale = math.sqrt(pixels / (image.width * image.height))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def read_file(link: str, folder: Path | None, limit: Limit) -> bytes:
    """Return what is in the file of a `file:` link, which must be within `folder`, wherever symbolic links lead.

    Raises:
        RefusedLinkError: it is not.
        MediaError: there is no such file, or it is too large.
    """
    if folder is None:
        raise RefusedLinkError("file: links are not read; ALLOWED_LOCAL_MEDIA_PATH may name a folder for them")
    try:
        parts = urlsplit(link)
        path = Path(url2pathname(parts.path)).resolve()
    except (OSError, RuntimeError, ValueError):
        raise MediaError("the file: link is malformed") from None
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(folder):
        raise RefusedLinkError(f"a file: link must lead into ALLOWED_LOCAL_MEDIA_PATH={folder}")
    try:
        # A pipe or a device is opened without waiting for its other end, and then not read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return _read(descriptor, folder, limit)
        finally:
            os.close(descriptor)
    except OSError:
        raise MediaError("the file: link leads to no file that can be read") from None


def _read(descriptor: int, folder: Path, limit: Limit) -> bytes:
    """Read what has been opened, if it is a file, and still in the folder: things may have been moved meanwhile."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(folder):
        raise MediaError("the file: link leads to no file")
    check_size(status.st_size, limit)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(status.st_size)
