"""Limits for media, and the checks that run before anything is decoded."""

import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from worker.errors import MediaError, MediaTooLargeError, RefusedLinkError
from worker.media.formats import fits, has_external_references, media_type
from worker.settings.settings import Settings

Kind = Literal["image", "video", "audio", "document"]

MAX_PROCESSES = 8
"""The most processes, unless the settings say more."""

FORMATS: Mapping[Kind, str] = {
    "image": "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF",
    "video": "MP4, MOV, WebM, MKV, AVI, GIF, and lists of JPEG frames",
    "audio": "WAV, MP3, FLAC, OGG, AAC, M4A, and the audio tracks of MP4, MOV and WebM",
    "document": "PDF",
}


class Limit(NamedTuple):
    """A limit and the setting that defines it."""

    setting: str
    value: float

    def __str__(self) -> str:
        return f"{self.setting}={self.value:.15g}"


class Limits:
    """The limits for all media, from the settings."""

    def __init__(self, settings: Settings) -> None:
        def limit(setting: str) -> Limit:
            return Limit(setting, getattr(settings, setting.lower()))

        self.bytes: Mapping[Kind, Limit] = {kind: limit(f"MAX_{kind.upper()}_BYTES") for kind in FORMATS}
        """The size of a file, by kind."""
        self.image_pixels = limit("MAX_IMAGE_PIXELS")
        """The pixels of an image, or of one frame of a video."""
        self.video_pixels = limit("MAX_VIDEO_PIXELS")
        """The pixels of all sampled frames of a video together."""
        self.video_seconds = limit("MAX_VIDEO_SECONDS")
        self.decode_seconds = limit("MEDIA_DECODE_TIMEOUT")
        """The time for decoding one video or sound."""
        self.image_seconds = limit("IMAGE_DECODE_TIMEOUT")
        """The time for decoding one image."""
        self.document_pages = limit("MAX_DOCUMENT_PAGES")
        """The pages of one document."""
        self.document_seconds = limit("DOCUMENT_DECODE_TIMEOUT")
        """The time for the pages of one document together."""
        self.page_pixels = min(settings.document_page_pixels, settings.image_downscale_pixels or sys.maxsize)
        """A page is drawn with at most this many pixels."""
        self.processes = settings.media_processes or min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        """How many processes decode the media, or draw the documents, of one request at once."""
        self.downscale_pixels = settings.image_downscale_pixels
        """Larger images are scaled down to this many pixels; None leaves them as they are."""


def check_size(size: int, limit: Limit) -> None:
    """Raise `MediaTooLargeError` if a file of `size` bytes is too large."""
    if size > limit.value:
        raise MediaTooLargeError(f"it has more bytes than {limit} allows")


def check_pixels(width: int, height: int, limit: Limit) -> None:
    """Raise `MediaTooLargeError` if an image or a frame has too many pixels."""
    if width * height > limit.value:
        raise MediaTooLargeError(f"it is {width} x {height} pixels large, which is more than {limit} allows")


def check_kind(data: bytes, kind: Kind) -> None:
    """Raise `MediaError` unless a file's content is of this kind: decoders get only formats that they are meant for."""
    if not data:
        raise MediaError("it is empty")
    detected = media_type(data)
    if detected is None or (kind in ("video", "audio") and has_external_references(data)):
        raise MediaError(f"its content matches no known {kind} format; accepted are {FORMATS[kind]}")
    if detected == "image/heic":
        raise MediaError(f"HEIC images cannot be decoded; accepted are {FORMATS['image']}")
    if not fits(detected, kind):
        raise MediaError(f"its content is {detected} where {kind} data is expected; accepted are {FORMATS[kind]}")


def check_frames(pixels: int, limits: Limits) -> None:
    """Raise `MediaTooLargeError` if the frames of a video have too many pixels together."""
    if pixels > limits.video_pixels.value:
        raise MediaTooLargeError(
            f"its frames together have more pixels than {limits.video_pixels} allows; "
            "a lower VIDEO_MAX_FRAMES samples fewer frames"
        )


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
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            status, real_path = os.fstat(file.fileno()), Path(f"/proc/self/fd/{file.fileno()}").resolve()
            # The folder is checked again, because the path may have changed before it was opened.
            if not stat.S_ISREG(status.st_mode) or not real_path.is_relative_to(folder):
                raise MediaError("the file: link does not point to a regular file in ALLOWED_LOCAL_MEDIA_PATH")
            check_size(status.st_size, limit)
            return file.read(status.st_size)
    except OSError:
        raise MediaError("the file: link points to a file that does not exist or cannot be read") from None
