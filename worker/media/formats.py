"""Detects a file's format from its content alone. Pure.

The patterns are strict on purpose. Accepted files go to decoders that also accept playlists of other files and
descriptions of network streams, and would open those files or listen at those addresses.
"""

import re

HEAD_BYTES = 64
"""How many bytes at the start of a file identify its format, unless it starts with an ID3 tag."""

_ATOM = rb"\0[\s\S]{3}"
_RIFF = rb"RIFF[\s\S]{4}"
_EBML = rb"\x1a\x45\xdf\xa3[\s\S]{0,48}?\x42\x82[\s\S]{1,8}?"
_MPEG = rb"\xff[\xe2-\xff][\x00-\xef]"

# The first pattern that matches wins.
_FORMATS: tuple[tuple[bytes, str], ...] = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (_RIFF + rb"WEBP", "image/webp"),
    (rb"(\xef\xbb\xbf)?\s{0,16}%PDF-\d", "application/pdf"),
    (rb"BM", "image/bmp"),
    (rb"II\*\0|MM\0\*", "image/tiff"),
    (_ATOM + rb"ftypavi[fs]", "image/avif"),
    (_ATOM + rb"ftyp(he|mif1|msf1)", "image/heic"),
    (_ATOM + rb"ftypM4[AB]", "audio/mp4"),
    (_ATOM + rb"ftypqt", "video/quicktime"),
    (_ATOM + rb"ftyp", "video/mp4"),
    (_ATOM + rb"(moov|mdat|wide)", "video/quicktime"),
    (_EBML + rb"(webm|matroska)", "video/webm"),
    (_RIFF + rb"AVI LIST", "video/x-msvideo"),
    (_RIFF + rb"WAVE", "audio/wav"),
    (rb"fLaC[\0\x80]\0\0\x22", "audio/flac"),
    (rb"OggS\0", "audio/ogg"),
    (rb"\xff[\xf1\xf9]", "audio/aac"),
    (_MPEG, "audio/mpeg"),
)

PILLOW_FORMATS = {f"image/{name.lower()}": (name,) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")}
"""Pillow's formats of the images that are accepted."""
DEMUXERS = {
    "video/quicktime": "mov",
    "video/mp4": "mov",
    "audio/mp4": "mov",
    "video/webm": "matroska",
    "video/x-msvideo": "avi",
    "audio/wav": "wav",
    "audio/flac": "flac",
    "audio/ogg": "ogg",
    "audio/aac": "aac",
    "audio/mpeg": "mp3",
}
"""FFmpeg's demuxers of the sounds that are accepted."""

_ID3 = re.compile(rb"ID3[\x02-\x04][\s\S]{2}([\0-\x7f]{4})")
# Playlists and session descriptions: FFmpeg finds them anywhere in a file's first megabyte and opens what they list.
_EXTERNAL_REFERENCE = re.compile(rb"c=IN IP|#EXTM3U|ffconcat version|dash:profile|<CompositionPlaylist", re.IGNORECASE)
_PROBED_BYTES = 1 << 20


def media_type(data: bytes) -> str | None:
    """Return the media type of a file from its first bytes, or None if the format is unknown."""
    if tag := _ID3.match(data):
        audio = data[10 + _syncsafe(tag[1]) :][:HEAD_BYTES]
        # If the data ends within the tag, only the tag can identify the format.
        return "audio/mpeg" if not audio or re.match(_MPEG, audio) else None
    return next((mime_type for pattern, mime_type in _FORMATS if re.match(pattern, data)), None)


def fits(mime_type: str, kind: str) -> bool:
    """Tell whether a media type can be used as a kind of media. A GIF is an image and a video."""
    if kind == "document":
        return mime_type == "application/pdf"
    if kind == "audio":
        return mime_type.startswith(("audio/", "video/"))
    return mime_type.startswith(kind) or mime_type == "image/gif"


def has_external_references(data: bytes) -> bool:
    """Tell whether a decoder might read a video or audio file as a list of other files or addresses."""
    return _EXTERNAL_REFERENCE.search(data[:_PROBED_BYTES]) is not None


def _syncsafe(size: bytes) -> int:
    return sum(byte << (7 * place) for place, byte in enumerate(reversed(size)))
