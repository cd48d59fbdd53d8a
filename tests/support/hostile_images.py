"""Image files that are small but cost much to decode, or whose headers claim less than they contain."""

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from PIL import Image

from tests.support import media
from tests.support.hostile import bmp, gif, jpeg, png_chunk, webp

SIDE = 8000
"""Width and height of a picture with 64 megapixels, the largest that the worker accepts by default."""


class File(NamedTuple):
    """A hostile file. It must be refused, or, if it `may_pass`, may be decoded at little cost."""

    name: str
    data: bytes
    may_pass: bool = False


# ---- JPEG


@cache
def progressive_jpeg(side: int = SIDE, scans: int = 1000) -> bytes:
    """Return a flat progressive JPEG file whose last scan, a refinement of all blocks, is repeated."""
    file = io.BytesIO()
    Image.new("L", (side, side), 100).save(file, "JPEG", progressive=True, quality=75)
    data = file.getvalue()
    last = data.rindex(b"\xff\xc4")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


@cache
def jpeg_of_empty_segments(count: int = 4_500_000, marker: int = 0xEF) -> bytes:
    """Return a JPEG file with `count` application segments without content, 4 bytes each."""
    data = media.picture("red", kind="JPEG")
    return data[:2] + bytes((0xFF, marker, 0, 2)) * count + data[2:]


def jpeg_of_fill_bytes(count: int) -> bytes:
    """Return a JPEG file with `count` fill bytes before a marker."""
    data = media.picture("red", kind="JPEG")
    return data[:2] + b"\xff" * count + data[2:]


def jpeg_of_restarts(count: int) -> bytes:
    """Return a JPEG file whose pixels are nothing but restart markers."""
    data = media.picture("red", (4096, 4096), "JPEG")
    start = data.index(b"\xff\xda")
    scan = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:start] + b"\xff\xdd\0\x04\0\x01" + data[start:scan] + b"\xff\xd0" * count + b"\xff\xd9"


def jpeg_that_claims_components(components: int) -> bytes:
    """Return a JPEG file whose header claims a number of colour components."""
    data = bytearray(media.picture("red", kind="JPEG"))
    data[data.index(b"\xff\xc0") + 9] = components
    return bytes(data)


def jpeg_with_dnl() -> bytes:
    """Return a JPEG file without a height in its header; a segment after the scan states it."""
    data = bytearray(media.picture("red", kind="JPEG"))
    offset = data.index(b"\xff\xc0") + 5
    data[offset : offset + 2] = b"\0\0"
    return bytes(data[:-2]) + b"\xff\xdc\0\x04\xff\xff\xff\xd9"


# ---- PNG


@cache
def palette_png(side: int = SIDE, number: int = 0) -> bytes:
    """Return a PNG file of 10 kB with one bit per pixel, a palette and transparency. `number` makes it unique."""
    header = struct.pack(">IIBBBBB", side, side, 1, 3, 0, 0, 0)
    palette = png_chunk(b"PLTE", number.to_bytes(3, "big") + b"\xff\xff\xff") + png_chunk(b"tRNS", b"\0\x80")
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    chunks = png_chunk(b"IHDR", header), palette, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_with(*chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """Return a PNG file with more chunks, each a kind and its content, before the pixels or after them."""
    data = media.picture("red")
    place = data.index(b"IEND" if after else b"IDAT") - 4
    return data[:place] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[place:]


def png_of_depth(depth: int, colour: int, side: int, interlaced: bool = False, rows: int = 1 << 20) -> bytes:
    """Return a PNG file with zeros as pixels, whatever its header claims."""
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(bytes(rows), 9)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animated_png(frames: int) -> bytes:
    """Return an animated PNG file that claims and contains `frames` frames."""
    control = [(b"acTL", struct.pack(">II", frames, 0))]
    for number in range(frames):
        control.append((b"fcTL", struct.pack(">IIIIIHHBB", 2 * number, 1, 1, 0, 0, 1, 100, 0, 0)))
        control.append((b"fdAT", struct.pack(">I", 2 * number + 1) + PIXEL))
    return png_with(control[0], *control[1:], after=True)


PIXEL = zlib.compress(b"\0\xff\0\0")
"""One red pixel of a PNG."""


# ---- GIF and WebP


def gif_frame(left: int, top: int, width: int, height: int) -> bytes:
    """Return a frame of a GIF file, with hardly any pixels."""
    return b"," + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02\x02D\x01\0"


def gif_of(width: int, height: int, *frames: bytes, tail: bytes = b";") -> bytes:
    """Return a GIF file with a screen of some size and these frames."""
    return gif(width, height, 0)[:-1] + b"".join(frames) + tail


def webp_of(width: int, height: int, frames: list[tuple[int, int, int, int]]) -> bytes:
    """Return an animated WebP file; each frame has its left, top, width and height, which need not match its pixels."""
    picture = media.picture("red", (8, 8), "WEBP")[12:]
    canvas = webp(width, height)[20:30]
    chunks = [b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02" + canvas[1:] + b"ANIM\x06\0\0\0" + bytes(6)]
    for left, top, frame_width, frame_height in frames:
        numbers = (left // 2, top // 2, frame_width - 1, frame_height - 1, 100)
        head = b"".join(number.to_bytes(3, "little") for number in numbers) + b"\0"
        chunks.append(b"ANMF" + struct.pack("<I", len(head) + len(picture)) + head + picture)
    content = b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


# ---- BMP


def rle_bmp(width: int, height: int, codes: bytes, compression: int = 1, bits: int = 8) -> bytes:
    """Return a BMP file with run lengths as pixels: `codes`, whatever size its header claims."""
    palette = bytes(4 * (1 << bits))
    offset = 54 + len(palette)
    sizes = (offset + len(codes), 0, offset, 40, width, height, 1, bits, compression, len(codes), 0, 0, 1 << bits, 0)
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", *sizes) + palette + codes


def jpegs() -> Iterator[File]:
    yield File("a JPEG with 300 refinement scans of 64 MP", progressive_jpeg(scans=300))
    yield File("a JPEG with 20,000 refinement scans of 64 x 64", progressive_jpeg(64, 20_000), may_pass=True)
    for marker, name in ((0xE0, "JFIF"), (0xE1, "EXIF"), (0xE2, "ICC"), (0xED, "Photoshop"), (0xFE, "comment")):
        yield File(f"a JPEG with 1,000,000 empty {name} segments", jpeg_of_empty_segments(1_000_000, marker))
    yield File("a JPEG with 10 MB of fill bytes", jpeg_of_fill_bytes(10_000_000), may_pass=True)
    yield File("a JPEG of restart markers", jpeg_of_restarts(1_000_000), may_pass=True)
    for components in (0, 2, 5, 255):
        yield File(f"a JPEG with {components} components", jpeg_that_claims_components(components))
    yield File("a JPEG whose height follows its pixels", jpeg_with_dnl())
    yield File("a JPEG of one pixel row that claims 65500", jpeg(1, 65_500), may_pass=True)
    yield File("a JPEG of start markers", b"\xff\xd8" * 1_000_000)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + bytes(60_000)
    data = media.picture("red", kind="JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    yield File("a JPEG whose EXIF data claims 65,535 tags", data[:2] + segment + data[2:], may_pass=True)
    yield File("a JPEG with 300 EXIF segments", data[:2] + segment * 300 + data[2:], may_pass=True)


def pngs() -> Iterator[File]:
    bomb = zlib.compress(bytes(90_000_000), 9)
    yield File(
        "a PNG whose colour profile is a decompression bomb", png_with((b"iCCP", b"a\0\0" + bomb)), may_pass=True
    )
    yield File("a PNG whose iTXt is a decompression bomb", png_with((b"iTXt", b"a\0\x01\0\0\0" + bomb)), may_pass=True)
    yield File("a PNG whose zTXt is a decompression bomb", png_with((b"zTXt", b"a\0\0" + bomb)), may_pass=True)
    small = zlib.compress(bytes(900_000), 9)
    yield File("a PNG with 1,000 compressed comments", png_with(*[(b"zTXt", b"a\0\0" + small)] * 1000), may_pass=True)
    yield File("a PNG with 500,000 comments", png_with(*[(b"tEXt", b"a\0b")] * 500_000), may_pass=True)
    yield File("a PNG with 1,000,000 empty chunks of pixels", png_with(*[(b"IDAT", b"")] * 1_000_000), may_pass=True)
    yield File("a PNG with 500,000 comments after its pixels", png_with(*[(b"tEXt", b"")] * 500_000, after=True), True)
    yield File("a PNG whose chunk claims 2 GB", png_with((b"IDAT", b""))[:41] + b"\x7f\xff\xff\xffIDAT")
    yield File("a PNG of 62 MP with 16 bits per colour", png_of_depth(16, 6, 7900), may_pass=True)
    yield File("an interlaced PNG of 62 MP", png_of_depth(1, 0, 7900, interlaced=True), may_pass=True)
    yield File("a PNG with a bit depth of 7", png_of_depth(7, 0, 64))
    yield File("a PNG of an unknown colour type", png_of_depth(8, 5, 64))
    yield File("a PNG with a palette of no colours", png_of_depth(8, 3, 64), may_pass=True)
    yield File("a PNG with two headers", png_with((b"IHDR", struct.pack(">IIBBBBB", 90_000, 90_000, 8, 2, 0, 0, 0))))
    yield File("an animated PNG with 100,000 frames", animated_png(100_000), may_pass=True)
    yield File("an animated PNG that claims 4 billion frames", png_with((b"acTL", b"\xff" * 8)), may_pass=True)


def animations() -> Iterator[File]:
    yield File("a GIF with a frame outside of its screen", gif_of(64, 64, gif_frame(0, 0, 20_000, 20_000)))
    yield File("a GIF with a frame far outside", gif_of(64, 64, gif_frame(60_000, 60_000, 5000, 5000)))
    second = gif_of(64, 64, gif_frame(0, 0, 64, 64), gif_frame(0, 0, 60_000, 60_000))
    yield File("a GIF whose second frame has 4 GP", second, may_pass=True)
    yield File("a GIF with 100,000 frames", gif_of(64, 64, gif_frame(0, 0, 64, 64) * 100_000), may_pass=True)
    yield File("a GIF with 500,000 comments", gif_of(64, 64, b"!\xfe\x01a\0" * 500_000, gif_frame(0, 0, 64, 64)), True)
    yield File("a GIF with 10 MB of empty blocks", gif_of(64, 64, b"\0" * 10_000_000))
    yield File("a GIF without a frame", gif_of(64, 64))
    yield File("a GIF of no size", gif_of(0, 0, gif_frame(0, 0, 0, 0)))
    yield File("a WebP with a frame outside of its canvas", webp_of(64, 64, [(0, 0, 9000, 9000)]), may_pass=True)
    yield File("a WebP with a frame far outside", webp_of(64, 64, [(16_000_000, 16_000_000, 8, 8)]))
    yield File("a WebP with 100,000 frames", webp_of(64, 64, [(0, 0, 8, 8)] * 100_000), may_pass=True)
    yield File("a WebP with 1,000 frames on 60 MP", webp_of(7700, 7700, [(0, 0, 8, 8)] * 1000), may_pass=True)
    yield File("a WebP without a frame", webp_of(64, 64, []))


def bitmaps() -> Iterator[File]:
    yield File("a BMP of 20 MB of single runs", rle_bmp(SIDE, SIDE, b"\x01\0" * 9_500_000), may_pass=True)
    yield File("a BMP of 64 MP in 80 bytes of jumps", rle_bmp(SIDE, SIDE, b"\0\x02\xff\xff" * 20))
    yield File("a BMP of jumps", rle_bmp(SIDE, SIDE, b"\0\x02\xff\xff" * 4_000_000), may_pass=True)
    yield File("a BMP of ends of lines", rle_bmp(SIDE, SIDE, b"\0\0" * 9_000_000), may_pass=True)
    yield File("a BMP with 4 bits of runs", rle_bmp(SIDE, SIDE, b"\x01\0" * 5_000_000, 2, 4), may_pass=True)
    yield File("a BMP that contains a JPEG", rle_bmp(64, 64, media.picture("red", kind="JPEG"), 4))
    yield File("a BMP of 2 GP in one row", bmp(2**31 - 1, 1))
    yield File("a BMP of the lowest height", bmp(64, -(2**31)))
    yield File("a BMP of no size", bmp(0, 0))
