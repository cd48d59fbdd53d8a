"""Malformed and malicious files that the worker must reject without crashing or using much memory."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from tests.support import media

FOLDER = Path(__file__).parent.parent / "files"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", *extra: bytes) -> bytes:
    """Return a PNG file with one bit per pixel. `width` and `height` need not match `pixels`."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(pixels)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """Return a GIF file whose frames claim a size but contain hardly any data."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02D\x01\0"
    return screen + frame * frames + b";"


def jpeg(width: int, height: int) -> bytes:
    """Return a JPEG file whose header claims a size."""
    data = bytearray(media.picture("red", kind="JPEG"))
    offset = data.index(b"\xff\xc0") + 5
    data[offset : offset + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    """Return a BMP file that consists of a header."""
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def tiff(width: int, height: int, next_directory: int = 0) -> bytes:
    """Return a TIFF file that consists of a directory."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 1)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_directory)


def webp(width: int, height: int) -> bytes:
    """Return a WebP file that consists of a canvas header."""
    canvas = (
        b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas


SESSION = b"v=0\nc=IN IP4 127.0.0.1\nm=video 41000 RTP/AVP 33\n"
"""An SDP session description. FFmpeg would listen at the port that it contains."""


def images() -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each hostile image."""
    whole = {kind: media.picture("red", (300, 300), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF")}
    yield "an empty file", b""
    yield "one byte", b"\x89"
    yield "text", b"this is not an image"
    yield "an HTML page", b"<!DOCTYPE html><html><body>Not found</body></html>"
    yield "JSON", b'{"error": "not found"}'
    yield "an SVG image", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield (
        "an SVG image with an external entity",
        b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>',
    )
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield "a PDF document", b"%PDF-1.7\n1 0 obj\n"
    yield "a Windows metafile", b"\xd7\xcd\xc6\x9a" + bytes(40)
    yield "a ZIP archive", b"PK\x03\x04" + bytes(40)
    yield "a compressed file", zlib.compress(bytes(1_000_000))
    yield "an executable", b"\x7fELF" + bytes(60)
    yield "a shell script", b"#!/bin/sh\necho\n"
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."
    yield "a NumPy array", b"\x93NUMPY\x01\0v\0{'descr': '|O', 'shape': (1,)}"
    yield "an icon", b"\0\0\x01\0\x01\0\0\0\0\0\x01\0\x20\0" + struct.pack("<II", 40, 22)
    yield "a HEIC image", b"\0\0\0\x18ftypheic" + bytes(60)
    yield "a playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    yield "a video", media.film("red", "blue")
    for kind, data in whole.items():
        yield f"half a {kind}", data[: len(data) // 2]
        yield f"the first 30 bytes of a {kind}", data[:30]
    yield "a PNG signature", b"\x89PNG\r\n\x1a\n"
    yield "a PNG without width", png(0, 10)
    yield "a PNG without data", png(64, 64)
    yield "a PNG that decompresses to 100 MP", png(10_000, 10_000, bytes(1251 * 10_000))
    yield "a PNG that claims 10 GP", png(100_000, 100_000)
    yield "a PNG with the largest size", png(2**31 - 1, 2**31 - 1)
    yield (
        "a PNG whose comment is a decompression bomb",
        png(64, 64, b"", png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(90_000_000)))),
    )
    yield "a JPEG that claims 4 GP", jpeg(65_500, 65_500)
    yield "a JPEG without size", jpeg(0, 0)
    yield "a GIF that claims 4 GP", gif(65_535, 65_535)
    yield "a GIF with 1000 frames of 900 MP", gif(30_000, 30_000, 1000)
    yield "a BMP that claims 900 MP", bmp(30_000, 30_000)
    yield "a BMP of negative size", bmp(-5, -5)
    yield "a TIFF that claims 3 GP", tiff(60_000, 60_000)
    yield "a TIFF whose directory points to itself", tiff(64, 64, 8)
    yield "a WebP that claims 268 MP", webp(16_383, 16_383)
    yield "a GIF that is also JavaScript", b"GIF89a/*" + bytes(30) + b"*/=1;alert(1)"
    yield "a PNG signature before a ZIP archive", b"\x89PNG\r\n\x1a\nPK\x03\x04" + bytes(60)
    yield "a JPEG that contains PHP", b"\xff\xd8\xff\xe0<?php system($_GET[0]); ?>"


def videos() -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each hostile video."""
    whole = media.film("red", "blue")
    yield "an empty file", b""
    yield "text", b"this is not a video"
    yield "an image", media.picture("red")
    yield "a playlist", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    yield "a list of files for FFmpeg", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield "a DASH manifest", b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011"></MPD>'
    yield "an MP4 signature", whole[:28]
    yield "an MP4 without its index", whole[: whole.index(b"moov") - 4]
    yield "half an MP4", whole[: len(whole) // 2]
    yield "an MP4 that contains a playlist", whole[:28] + b"#EXTM3U\nfile:///etc/passwd\n"
    yield "a WebM signature", b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01" + bytes(60)
    yield "an AVI of noise", b"RIFF\xff\xff\xff\xffAVI LIST" + bytes(range(256)) * 4
    yield "a session description that contains AVI", b"#\n\nAVI \n" + SESSION
    yield "a playlist that contains AVI LIST", b"#EXTM3U\nAVI LIST\nfile:///etc/passwd\n"
    yield "a WebM that contains a session description", b"\x1a\x45\xdf\xa3\x42\x82\x84webm\n" + SESSION
    yield "a session description that contains moov", b"\n\n\n\nmoov\n" + SESSION
    yield "a GIF that claims 4 GP", gif(65_535, 65_535, 10)
    yield "a GIF of 1000 frames of 64 MP", gif(8_001, 8_000, 1000)
    yield "a video of an hour", media.film("red", "blue", frames=40, rate=0.01)
    for file in sorted(FOLDER.glob("crash.*")):
        # Each of these crashes OpenCV 5.0.0.
        yield file.name, file.read_bytes()


def frames() -> Iterator[tuple[str, str]]:
    """Yield the name and text of each hostile list of base64 frames."""
    good, larger = (media.encoded(media.picture("red", size, "JPEG")) for size in ((64, 64), (80, 64)))
    yield "a frame that is not an image", f"{good},{media.encoded(b'not an image')}"
    yield "a frame that is not base64", f"{good},!"
    yield "frames of different sizes", f"{good},{larger}"
    yield "too many frames", ",".join([good] * 33)
    yield "a frame that claims 4 GP", f"{good},{media.encoded(jpeg(65_500, 65_500))}"
    yield "no frame", ""
    large = media.encoded(png(7900, 8000, bytes(988 * 8000)))
    yield "frames with 2 GP in total", ",".join([large] * 32)


def sounds() -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each hostile audio file."""
    yield "an empty file", b""
    yield "text", b"this is not audio"
    yield "a playlist", b"#EXTM3U\nfile:///etc/passwd\n"
    yield "a WAV signature", b"RIFF\0\0\0\0WAVE"
    yield "a FLAC of noise", b"fLaC" + bytes(range(256))
    yield "an MP3 that contains a session description", b"\xff\xfb\n" + SESSION
    yield "an ID3 tag that contains a session description", b"ID3\x04\0\0\0\0\0\0" + SESSION
    yield "a session description that starts with ID3", b"ID3\n" + SESSION
    yield "a session description that contains WAVE", b"v=0\no=- WAVE\n" + SESSION
    yield "half an OGG", b"OggS" + bytes(20)
