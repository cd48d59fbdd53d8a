"""What a file is, told by its bytes and by nothing else. Pure.

Strict on purpose: what passes is given to decoders that would make more of it than an image, a video or a sound, such
as a list of other files to open, or of addresses to listen at.
"""

import re

HEAD_BYTES = 64
"""How many bytes tell the format, but for what hides behind an ID3 tag."""

_ATOM = rb"\0[\s\S]{3}"
_RIFF = rb"RIFF[\s\S]{4}"
_EBML = rb"\x1a\x45\xdf\xa3[\s\S]{0,48}?\x42\x82[\s\S]{1,8}?"
_MPEG = rb"\xff[\xe2-\xff][\x00-\xef]"

# The first that fits counts.
_FORMATS: tuple[tuple[bytes, str], ...] = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (_RIFF + rb"WEBP", "image/webp"),
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
_COMPILED = tuple((re.compile(pattern), name) for pattern, name in _FORMATS)

_ID3 = re.compile(rb"ID3[\x02-\x04][\s\S]{2}([\0-\x7f]{4})")
# What FFmpeg would follow to other files and addresses, wherever in its first megabyte it stands.
_LEADS_ELSEWHERE = re.compile(rb"c=IN IP|#EXTM3U|ffconcat version|dash:profile|<CompositionPlaylist", re.IGNORECASE)
_PROBED_BYTES = 1 << 20


def media_type(data: bytes) -> str | None:
    """Return the media type of a file, of which the beginning is enough; None for one of no known format."""
    if tag := _ID3.match(data):
        sound = data[10 + _syncsafe(tag[1]) :][:HEAD_BYTES]
        # Of a file that is not there as a whole, its tag has to do.
        return "audio/mpeg" if not sound or re.match(_MPEG, sound) else None
    return next((name for pattern, name in _COMPILED if pattern.match(data)), None)


def fits(found: str, kind: str) -> bool:
    """Tell whether a media type is one of an "image", a "video" or an "audio"; a GIF may be either of the first two."""
    if kind == "audio":
        return found.startswith(("audio/", "video/"))
    return found.startswith(kind) or found == "image/gif"


def leads_elsewhere(data: bytes) -> bool:
    """Tell whether a decoder might take a video or a sound for a list of other files or addresses."""
    return _LEADS_ELSEWHERE.search(data[:_PROBED_BYTES]) is not None


def _syncsafe(size: bytes) -> int:
    return sum(byte << (7 * place) for place, byte in enumerate(reversed(size)))
