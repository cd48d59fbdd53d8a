"""Limits for media, and the checks that run before anything is decoded."""

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
from worker.media.formats import fits, has_external_references, media_type
from worker.settings.settings import Settings

Kind = Literal["image", "video", "audio"]

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
FORMATS: Mapping[Kind, str] = MappingProxyType(
    {
        "image": "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF",
        "video": "MP4, MOV, WebM, MKV, AVI, GIF, and lists of JPEG frames",
        "audio": "WAV, MP3, FLAC, OGG, AAC, M4A, and the audio tracks of MP4, MOV and WebM",
    }
)


class Limit(NamedTuple):
    """A limit and the setting that defines it."""

    setting: str
    value: float

    def __str__(self) -> str:
        return f"{self.setting}={self.value:.15g}"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for all media."""

    bytes: Mapping[Kind, Limit]
    """The size of a file, by kind."""
    image_pixels: Limit
    """The pixels of an image, or of one frame of a video."""
    video_pixels: Limit
    """The pixels of all sampled frames of a video together."""
    video_seconds: Limit
    decode_seconds: Limit
    """The time for decoding one video."""
    downscale_pixels: int | None
    """Larger images are scaled down to this many pixels; None leaves them as they are."""

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """Return the limits that the settings define."""

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
    """Check the size of a file, in bytes.

    Raises:
        MediaTooLargeError: the file is too large.
    """
    if size > limit.value:
        raise MediaTooLargeError(f"it has more bytes than {limit} allows")


def check_pixels(width: int, height: int, limit: Limit) -> None:
    """Check the size of an image or a frame, in pixels.

    Raises:
        MediaTooLargeError: it is too large.
    """
    if width * height > limit.value:
        raise MediaTooLargeError(f"it is {width} x {height} pixels large, which is more than {limit} allows")


def check_kind(data: bytes, kind: Kind) -> None:
    """Check that a file's content is of a kind, so that decoders get the formats that they are meant for.

    Raises:
        MediaError: the content is of another kind or of an unknown format.
    """
    if not data:
        raise MediaError("it is empty")
    detected = media_type(data)
    if detected is None or (kind != "image" and has_external_references(data)):
        raise MediaError(f"its content matches no known {kind} format; accepted are {FORMATS[kind]}")
    if detected == "image/heic":
        raise MediaError(f"HEIC images cannot be decoded; accepted are {FORMATS['image']}")
    if not fits(detected, kind):
        raise MediaError(f"its content is {detected} where {kind} data is expected; accepted are {FORMATS[kind]}")


def check_image(data: bytes, limits: Limits) -> int:
    """Check an image's size in bytes, its format and the size in its header; return how many pixels it has.

    Raises:
        MediaError: the image must not be decoded.
    """
    check_size(len(data), limits.bytes["image"])
    check_kind(data, "image")
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaTooLargeError(f"it has more pixels than {limits.image_pixels} allows") from None
    except Exception:  # noqa: BLE001 - Pillow raises errors of any type for damaged files
        raise MediaError("its header cannot be read: the file is truncated or damaged") from None
    check_pixels(width, height, limits.image_pixels)
    return width * height


def check_frames(pixels: int, limits: Limits) -> None:
    """Check how many pixels the frames of a video have together.

    Raises:
        MediaTooLargeError: they have too many.
    """
    if pixels > limits.video_pixels.value:
        raise MediaTooLargeError(
            f"its frames together have more pixels than {limits.video_pixels} allows; "
            "a lower VIDEO_MAX_FRAMES samples fewer frames"
        )


def downscaled(image: Image.Image, pixels: int | None) -> Image.Image:
    """Scale an image down to at most `pixels`, keeping its aspect ratio."""
    if pixels is None or image.width * image.height <= pixels:
        return image
    scale = math.sqrt(pixels / (image.width * image.height))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def read_file(link: str, folder: Path | None, limit: Limit) -> bytes:
    """Return the content of the file at a `file:` link. Symbolic links are resolved before the folder is checked.

    Raises:
        RefusedLinkError: the file is not in `folder`, or `folder` is None.
        MediaError: the file does not exist, cannot be read or is too large.
    """
    if folder is None:
        raise RefusedLinkError("file: links are disabled; set ALLOWED_LOCAL_MEDIA_PATH to allow those into a folder")
    try:
        parts = urlsplit(link)
        path = Path(url2pathname(parts.path)).resolve()
    except (OSError, RuntimeError, ValueError):
        raise MediaError("the file: link is malformed") from None
    if parts.netloc not in ("", "localhost") or not path.is_relative_to(folder):
        raise RefusedLinkError(f"a file: link must point into ALLOWED_LOCAL_MEDIA_PATH={folder}")
    try:
        # O_NONBLOCK: opening a pipe or a device must not wait. It is rejected after opening.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return _read_open_file(descriptor, folder, limit)
        finally:
            os.close(descriptor)
    except OSError:
        raise MediaError("the file: link points to a file that does not exist or cannot be read") from None


def _read_open_file(descriptor: int, folder: Path, limit: Limit) -> bytes:
    """Read an open file after checking its type, and its folder again: a path may change before it is opened."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(folder):
        raise MediaError("the file: link does not point to a regular file in ALLOWED_LOCAL_MEDIA_PATH")
    check_size(status.st_size, limit)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(status.st_size)
