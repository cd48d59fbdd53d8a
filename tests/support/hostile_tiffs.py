"""TIFF and AVIF files that are small but cost much to decode, or whose headers claim less than they contain."""

import struct
import zlib
from collections.abc import Iterator
from functools import cache

from tests.support import media
from tests.support.hostile import FOLDER, tiff
from tests.support.hostile_images import File

Tag = tuple[int, int, int, int]
"""Number, type (3: 16 bits, 4: 32 bits), count, and value or offset."""


def tiff_of(tags: list[Tag], content: bytes = b"") -> bytes:
    """Return a TIFF file with one directory, followed by `content`."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + content


def tiled_tiff(width: int, height: int, tile: tuple[int, int], compression: int, bits: int = 8) -> bytes:
    """Return a TIFF file with one tile whose size does not match that of the picture."""
    content = zlib.compress(bytes(900_000), 9)
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1),
        (277, 3, 1, 1), (322, 4, 1, tile[0]), (323, 4, 1, tile[1]), (324, 4, 1, 10 + 12 * 10 + 4),
        (325, 4, 1, len(content)),
    ]  # fmt: skip
    return tiff_of(tags, content)


def striped_tiff(width: int, height: int, rows: int, compression: int, claimed: int | None = None) -> bytes:
    """Return a TIFF file with one strip of `rows` rows, which claims to have `claimed` bytes."""
    content = zlib.compress(bytes(900_000), 9)
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, compression), (262, 3, 1, 1),
        (273, 4, 1, 10 + 12 * 9 + 4), (277, 3, 1, 1), (278, 4, 1, rows),
        (279, 4, 1, len(content) if claimed is None else claimed),
    ]  # fmt: skip
    return tiff_of(tags, content)


@cache
def tiff_with_warnings(count: int = 65_000) -> bytes:
    """Return a TIFF file of 780 kB. Pillow warns about each of its tags, which claim more bytes than the file has."""
    return tiff_of([*TINY_TIFF, *((number, 4, 1_000_000, 8) for number in range(500, 500 + count))], bytes(4096))


# ---- AVIF


def box(kind: bytes, *content: bytes) -> bytes:
    """Return a box of an ISO media file (MP4, AVIF)."""
    data = b"".join(content)
    return struct.pack(">I", 8 + len(data)) + kind + data


def avif_that_claims(width: int, height: int) -> bytes:
    """Return an AVIF file of 1.8 kB whose header claims a size, but whose pixels are 11000 x 11000."""
    data = bytearray((FOLDER / "flat_121_megapixels.avif").read_bytes())
    offset = data.index(b"ispe") + 8
    data[offset : offset + 8] = struct.pack(">II", width, height)
    return bytes(data)


def avif_grid(columns: int, rows: int, width: int, height: int) -> bytes:
    """Return an AVIF file that is a grid of one tile of 256 x 256 pixels, repeated, and claims a size."""
    tile = media.picture("red", (256, 256), "AVIF")
    meta = tile[tile.index(b"meta") :]
    codec = meta[meta.index(b"av1C") - 4 :][: int.from_bytes(meta[meta.index(b"av1C") - 4 :][:4], "big")]
    pixels = tile[tile.index(b"mdat") + 4 :]
    grid = struct.pack(">BBBBII", 0, 1, rows - 1, columns - 1, width, height)
    ids = range(2, 2 + columns * rows)

    def entry(number: int, kind: bytes) -> bytes:
        return box(b"infe", b"\x02\0\0\0", struct.pack(">HH", number, 0), kind, b"\0")

    def location(number: int, method: int, offset: int, length: int) -> bytes:
        return struct.pack(">HHHHII", number, method, 0, 1, offset, length)

    def build(offset: int) -> bytes:
        locations = [location(1, 1, 0, len(grid)), *(location(number, 0, offset, len(pixels)) for number in ids)]
        properties = box(
            b"ipco",
            box(b"ispe", bytes(4), struct.pack(">II", width, height)),
            box(b"ispe", bytes(4), struct.pack(">II", 256, 256)),
            box(b"pixi", bytes(4), b"\x03\x08\x08\x08"),
            codec,
        )
        links = [struct.pack(">HBBB", 1, 2, 1, 3), *(struct.pack(">HBBBB", number, 3, 2, 3, 0x84) for number in ids)]
        parts = [
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), b"\0\x01"),
            box(b"iloc", b"\x01\0\0\0\x44\0", struct.pack(">H", len(locations)), *locations),
            box(
                b"iinf", bytes(4), struct.pack(">H", 1 + len(ids)), entry(1, b"grid"), *(entry(n, b"av01") for n in ids)
            ),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH", 1, len(ids)), struct.pack(f">{len(ids)}H", *ids))),
            box(b"iprp", properties, box(b"ipma", bytes(4), struct.pack(">I", len(links)), *links)),
            box(b"idat", grid),
        ]
        return tile[: int.from_bytes(tile[:4], "big")] + box(b"meta", bytes(4), *parts)

    return build(len(build(0)) + 8) + box(b"mdat", pixels)


def tiffs() -> Iterator[File]:
    for compression, name in ((1, "plain"), (5, "LZW"), (7, "JPEG"), (8, "deflate"), (32773, "PackBits")):
        yield File(f"a TIFF with a {name} tile of 2 GB", tiled_tiff(64, 64, (65_520, 32_752), compression))
        yield File(f"a TIFF with a {name} strip of 4 billion rows", striped_tiff(64, 64, 2**32 - 1, compression), True)
    yield File("a TIFF with a strip of 4 GB", striped_tiff(64, 64, 64, 8, 2**32 - 1))
    yield File("a TIFF of 60 MP with a strip of nothing", striped_tiff(7700, 7700, 7700, 8, 0))
    yield File("a TIFF with a tile of one row", tiled_tiff(7700, 7700, (16, 1), 8), may_pass=True)
    yield File("a TIFF with a tile of 64 bits per pixel", tiled_tiff(64, 64, (16_384, 16_384), 8, 64))
    yield File("a TIFF with a tile of no width", tiled_tiff(64, 64, (0, 64), 8))
    yield File("a TIFF without tags", tiff_of([]))
    yield File("a TIFF of 4 billion values per tag", tiff_of([(256, 12, 2**32 - 1, 8), (257, 4, 2**32 - 1, 8)]))
    yield File("a TIFF of one row of 64 MP", tiff(64_000_000, 1))
    yield File("a TIFF whose offset lies outside", b"II*\0\xff\xff\xff\x7f")
    yield File("a TIFF with 1,000,000 samples per pixel", tiff_of([*TINY_TIFF, (277, 4, 1, 1_000_000)]))


TINY_TIFF: list[Tag] = [
    (256, 4, 1, 64),
    (257, 4, 1, 64),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (279, 4, 1, 4096),
]


def avifs() -> Iterator[File]:
    yield File("an AVIF that claims 7900 x 7900", avif_that_claims(7900, 7900))
    yield File("an AVIF of 121 MP", avif_that_claims(11_000, 11_000))
    yield File("an AVIF of no size", avif_that_claims(0, 0))
    yield File("an AVIF that claims 4 billion x 4 billion", avif_that_claims(2**32 - 1, 2**32 - 1))
    yield File("an AVIF grid of 1 tile that claims 64 x 64", avif_grid(1, 1, 64, 64), may_pass=True)
    yield File("an AVIF grid of 100 MP", avif_grid(40, 40, 10_240, 10_240))
    yield File("an AVIF grid of 256 x 256 tiles that claims 64 x 64", avif_grid(250, 250, 64, 64))
    yield File("an AVIF grid that claims 60 MP: loading it twice crashes libavif 1.4.2", avif_grid(2, 2, 7700, 7700))
