"""Small valid media files in every format, and edits that damage them. Pure."""

import io
import re
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from tests.support import hostile, media

CHUNK = re.compile(rb"\xff[\xc0-\xfe]|[A-Za-z][\w ]{3}")
"""The start of a chunk: a marker of a JPEG, or the name of a chunk or box in other formats."""
PNG = b"\x89PNG\r\n\x1a\n"
NUMBERS = (0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF7, 0xFFFFFFFF)
"""Sizes and counts that programs get wrong."""
SOUNDS = (
    ("wav", "pcm_s16le"), ("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame"), ("adts", "aac"), ("mp4", "aac"),
    ("webm", "libopus"),
)  # fmt: skip
"""Containers and codecs of sounds, by FFmpeg's names."""


class Edit(NamedTuple):
    """One change of a file."""

    kind: str
    """A key of `EDITS`."""
    place: Fraction
    """Where: 0 is the start, 1 the end."""
    value: int
    """How long, how much or which one; 32 bits."""


def truncated(data: bytes, start: int, _value: int) -> bytes:
    return data[:start]


def flipped(data: bytes, start: int, value: int) -> bytes:
    return data[:start] + bytes([data[start] ^ 1 << value % 8]) + data[start + 1 :] if start < len(data) else data


def inserted(data: bytes, start: int, value: int) -> bytes:
    return data[:start] + value.to_bytes(4, "big")[: 1 + value % 4] + data[start:]


def removed(data: bytes, start: int, value: int) -> bytes:
    return data[:start] + data[start + 1 + value % 64 :]


def numbered(data: bytes, start: int, value: int) -> bytes:
    """Overwrite 1, 2 or 4 bytes by a number, in either byte order."""
    number, size = NUMBERS[value % len(NUMBERS)], (1, 2, 4)[value // 16 % 3]
    order = "big" if value // 64 % 2 else "little"
    written = (number % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    return data[:start] + written + data[start + size :]


def repeated(data: bytes, start: int, value: int) -> bytes:
    """Repeat the chunk at `start` up to 20 times."""
    before, chunk, after = _around_chunk(data, start)
    return before + chunk * (2 + value % 19) + after


def without_chunk(data: bytes, start: int, _value: int) -> bytes:
    before, _, after = _around_chunk(data, start)
    return before + after


EDITS = {
    edit.__name__: edit for edit in (truncated, flipped, inserted, removed, numbered, repeated, without_chunk)
}  # fmt: skip


def edited(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Apply the edits. The checksums of a PNG file are corrected, so that its damaged chunks are read."""
    for edit in edits:
        data = EDITS[edit.kind](data, int(edit.place * len(data)), edit.value)
    return with_checksums(data) if data.startswith(PNG) else data


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG file, up to its first chunk of a wrong length."""
    corrected, position = bytearray(data), 8
    while (end := position + 8 + int.from_bytes(data[position : position + 4], "big")) + 4 <= len(data):
        corrected[end : end + 4] = zlib.crc32(data[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(corrected)


def _around_chunk(data: bytes, start: int) -> tuple[bytes, bytes, bytes]:
    """Cut a file at the two next starts of chunks. Boxes and PNG chunks have their length before their name."""
    length = 4 if data.startswith((PNG, b"\0\0")) else 0
    cuts = [match.start() - length for match in CHUNK.finditer(data) if match.start() - length >= start][:2]
    first, second = (*cuts, len(data), len(data))[:2]
    return data[:first], data[first:second], data[second:]


def images() -> dict[str, bytes]:
    """Return images by name: each format, and the variants that decoders treat in a different way."""
    colours = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 50).convert("RGB")
    layered = colours.convert("RGBA")
    layered.putalpha(colours.convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "png": _saved(layered, "PNG"),
        "png-palette": _saved(colours.quantize(16), "PNG", transparency=3),
        "png-16-bits": _saved(colours.convert("I;16"), "PNG"),
        "apng": _saved(colours, "PNG", save_all=True, append_images=[layered.convert("RGB").rotate(90)]),
        "jpeg": _saved(colours, "JPEG", exif=turned, comment=b"comment"),
        "jpeg-progressive": _saved(colours, "JPEG", progressive=True),
        "jpeg-cmyk": _saved(colours.convert("CMYK"), "JPEG"),
        "gif": _saved(colours, "GIF", save_all=True, append_images=[colours.rotate(90)], transparency=1),
        "webp": _saved(layered, "WEBP", exif=turned),
        "webp-lossless": _saved(layered, "WEBP", lossless=True),
        "webp-animated": _saved(layered, "WEBP", save_all=True, append_images=[layered.rotate(90)]),
        "bmp": _saved(colours, "BMP"),
        "bmp-palette": _saved(colours.quantize(16), "BMP"),
        "avif": _saved(layered, "AVIF", exif=turned),
        **{
            f"tiff-{name}": _saved(colours, "TIFF", compression=name)
            for name in ("raw", "tiff_lzw", "jpeg", "packbits")
        },
        "tiff-bilevel": _saved(colours.convert("1"), "TIFF", compression="group4"),
        "tiff-tiled": _tiled(),
    }


def sounds() -> dict[str, bytes]:
    """Return sounds by container, each of 1,024 samples."""
    return {container: _sound(container, codec) for container, codec in SOUNDS}


def films() -> dict[str, bytes]:
    """Return videos by container."""
    films = {kind: media.film("red", "blue", frames=4, size=(32, 32), kind=kind) for kind in media.CODECS}
    return {**films, "animation": media.animation("red", "blue", frames=3)}


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _tiled() -> bytes:
    """Return a TIFF file of 32 x 32 pixels in four tiles, compressed with PackBits."""
    offset, tile = 8 + 2 + 12 * 11 + 4 + 32, b"\x81\x40\x81\x80"
    tags = [(256, 32), (257, 32), (258, 8), (259, 32773), (262, 1), (277, 1), (322, 16), (323, 16)]
    entries = [tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags]
    lists = [(324, offset - 32), (325, offset - 16)]
    entries += [tag.to_bytes(2, "little") + b"\4\0\4\0\0\0" + at.to_bytes(4, "little") for tag, at in lists]
    entries.append(b"\x53\1\3\0\1\0\0\0\1\0\0\0")
    values = [*(offset + 4 * index for index in range(4)), *[len(tile)] * 4]
    directory = len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)
    return b"II*\0\x08\0\0\0" + directory + b"".join(v.to_bytes(4, "little") for v in values) + tile * 4


def _sound(container: str, codec: str) -> bytes:
    wave = (np.sin(np.arange(1024) / 9) * 9000).astype(np.int16)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as target:
        stream = target.add_stream(codec, rate=48_000 if codec == "libopus" else 16_000)
        assert isinstance(stream, av.AudioStream)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = stream.rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            target.mux(packet)
    return file.getvalue()


def claims() -> dict[str, bytes]:
    """Return small files that claim to be large."""
    return {
        "png": hostile.png(60_000, 60_000),
        "gif": hostile.gif(400, 400, 3),
        "tiff": hostile.tiff(60_000, 60_000),
        "webp": hostile.webp(16_383, 16_383),
        "bmp": hostile.bmp(-5, -5),
    }
