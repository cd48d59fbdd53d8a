"""What a person types as an image or a video, a URL or bare base64, becomes a URL that the engine takes. Pure."""

import base64
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\x00", "image/tiff"),
    (0, b"MM\x00*", "image/tiff"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftyphei", "image/heic"),
    (4, b"ftypmif1", "image/heic"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1a\x45\xdf\xa3", "video/webm"),
    (8, b"AVI ", "video/x-msvideo"),
)
"""Offset, bytes there, media type; the first that fits counts."""


def from_text(text: str, kind: str) -> str:
    """Return `text` if it is a URL, else a `data:` URL of the base64 that it holds.

    `kind` is "image" or "video"; a GIF may be either.

    Raises:
        ValueError: neither; the message reads on after the name of the field.
    """
    if _SCHEME.match(text):
        return text
    encoded = "".join(text.split())
    media_type = _media_type(encoded)
    if media_type is None:
        raise ValueError(
            f"is neither a URL (https:, http:, data:) nor the base64 of a {kind} file: "
            "its first bytes are those of no known format."
        )
    if not media_type.startswith(kind) and media_type != "image/gif":
        raise ValueError(f"holds {media_type}, which is no {kind}.")
    return f"data:{media_type};base64,{encoded}"


def _media_type(encoded: str) -> str | None:
    """Tell the media type from the first bytes of some base64; None if it is none or of no known format."""
    try:
        head = base64.b64decode(encoded[:32], validate=True)
    except ValueError:
        return None
    return next((name for offset, magic, name in _SIGNATURES if head[offset:].startswith(magic)), None)
