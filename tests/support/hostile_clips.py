"""Videos and sounds that are small but cost much to decode, or whose headers lie."""

import io
import struct
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache

import av

from tests.support import media
from tests.support.hostile import SESSION, sounds, webp
from tests.support.hostile_images import File, animated_png, gif_frame, gif_of, palette_png
from tests.support.hostile_tiffs import avif_that_claims, box

CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""The boxes of an MP4 file that contain other boxes."""


def rebuilt(mp4: bytes, boxes: Mapping[bytes, bytes]) -> bytes:
    """Return an MP4 file in which these boxes have other contents. Its index must follow its pixels."""
    result = b""
    while mp4:
        size, kind = int.from_bytes(mp4[:4], "big") or len(mp4), mp4[4:8]
        content, mp4 = mp4[8:size], mp4[size:]
        if kind in CONTAINERS:
            content = rebuilt(content, boxes)
            if kind == b"trak" and b"edts" in boxes:
                content += box(b"edts", boxes[b"edts"])
        result += box(kind, boxes.get(kind, content))
    return result


def table(*numbers: int) -> bytes:
    """Return the content of a box that is a table of 32-bit numbers, with its version and flags."""
    return struct.pack(f">{1 + len(numbers)}I", 0, *numbers)


def media_header(timescale: int, duration: int) -> bytes:
    """Return the content of the box `mdhd`: units per second, and the duration in units."""
    return table(0, 0, timescale, duration, 0x55C40000)


def mp4_of(frames: int, timescale: int, size: int | None = None, *, per_frame: int = 1, chunks: int = 1) -> bytes:
    """Return an MP4 file that claims `frames` frames of `size` bytes, each `per_frame` units of its clock long.

    All of them are at the place of the first frame, and have its size by default.
    """
    film = media.film("red", "blue")
    first = int.from_bytes(film[film.index(b"stsz") + 16 :][:4], "big")
    place = int.from_bytes(film[film.index(b"stco") + 12 :][:4], "big")
    return rebuilt(
        film,
        {
            b"mdhd": media_header(timescale, frames * per_frame & 0xFFFFFFFF),
            b"stts": table(1, frames, per_frame),
            b"stsz": table(first if size is None else size, frames),
            b"stsc": table(1, 1, frames // chunks, 1),
            b"stco": table(chunks, *[place] * chunks),
            b"stss": table(1, 1),
        },
    )


@cache
def mp4_of_20_million_frames() -> bytes:
    """Return an MP4 file of 770 kB whose 20 million frames last 0.02 s: its clock ticks 10⁹ times a second."""
    return mp4_of(20_000_000, 1_000_000_000, chunks=192_000)


def mp4_with_edits(*edits: tuple[int, int], count: int | None = None) -> bytes:
    """Return an MP4 file with an edit list: the duration and the start of each edit."""
    entries = b"".join(struct.pack(">IiI", duration, start, 0x10000) for duration, start in edits)
    edit_list = box(b"elst", table(len(edits) if count is None else count), entries)
    return rebuilt(media.film("red", "blue"), {b"edts": edit_list})


def webm_that_lasts(seconds: float) -> bytes:
    """Return a WebM file whose header claims a duration."""
    data = bytearray(media.film("red", "blue", kind="webm"))
    offset = data.index(b"\x44\x89\x88") + 3
    data[offset : offset + 8] = struct.pack(">d", seconds * 1000)
    return bytes(data)


def film_of(sizes: list[tuple[int, int]], kind: str) -> bytes:
    """Return a video of JPEG frames with these sizes in pixels."""
    file, pictures = io.BytesIO(), {size: media.picture("red", size, "JPEG") for size in sizes}
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuvj420p"
        for number, size in enumerate(sizes):
            packet = av.Packet(pictures[size])
            packet.stream = stream
            packet.pts = packet.dts = number
            packet.time_base = Fraction(1, 8)
            container.mux(packet)
    return file.getvalue()


def avi_that_claims(**fields: int) -> bytes:
    """Return an AVI file whose headers claim `frames`, `rate`, `scale`, `width` or `height`."""
    data = bytearray(media.film("red", "blue", kind="avi"))
    main, stream, picture = data.index(b"avih") + 8, data.index(b"strh") + 8, data.index(b"strf") + 8
    places = {
        "frames": (main + 16, stream + 32),
        "scale": (stream + 20,),
        "rate": (stream + 24,),
        "width": (main + 32, picture + 4),
        "height": (main + 36, picture + 8),
    }
    for name, value in fields.items():
        for place in places[name]:
            data[place : place + 4] = struct.pack("<I", value & 0xFFFFFFFF)
    return bytes(data)


def clips() -> Iterator[File]:
    """Yield each hostile video that is in no row of issue 16."""
    yield File("an MP4 of 1 kB with 20 million frames", mp4_of(20_000_000, 1_000_000_000))
    yield File("an MP4 with 20 million frames of no size", mp4_of(20_000_000, 1_000_000_000, 0))
    yield File("an MP4 with 4 billion frames", mp4_of(2**32 - 1, 1_000_000_000))
    yield File("an MP4 with 16 million frames in a second", mp4_of(16_000_000, 16_000_000))
    yield File("an MP4 with 2 million frames in 200 s", mp4_of(2_000_000, 10_000))
    yield File("an MP4 with frames of 2 GB", mp4_of(100, 8, 2**31 - 1))
    yield File("an MP4 whose frames last no time", mp4_of(16, 8, per_frame=0), may_pass=True)
    yield File("an MP4 whose frames last 17 years", mp4_of(16, 8, per_frame=2**32 - 1), may_pass=True)
    yield File("an MP4 with 100,000 chunks of the same bytes", mp4_of(1_000_000, 10_000, chunks=100_000))
    film = media.film("red", "blue")
    yield File("an MP4 without a clock", rebuilt(film, {b"mdhd": media_header(0, 0)}))
    yield File("an MP4 whose table of times claims 4 billion entries", rebuilt(film, {b"stts": table(2**32 - 1, 1, 1)}))
    yield File("an MP4 whose table of sizes claims 4 billion", rebuilt(film, {b"stsz": table(0, 2**32 - 1)}))
    yield File("an MP4 whose chunks lie outside", rebuilt(film, {b"stco": table(1, 2**32 - 1)}))
    yield File("an MP4 without chunks", rebuilt(film, {b"stco": table(0)}))
    yield File("an MP4 with 100,000 edits", mp4_with_edits(*[(1, 0)] * 100_000), may_pass=True)
    yield File("an MP4 with an edit of 50 days", mp4_with_edits((2**32 - 1, 0)), may_pass=True)
    yield File("an MP4 whose edit starts before its time", mp4_with_edits((2000, -(2**31))), may_pass=True)
    yield File("an MP4 whose edits claim 4 billion entries", mp4_with_edits((1, 0), count=2**32 - 1), may_pass=True)
    nested = b""
    for _ in range(5000):
        nested = box(b"moov", nested)
    yield File("an MP4 of 5,000 nested boxes", film[:28] + nested)
    yield File("an MP4 of 1,000,000 empty boxes", film[:28] + box(b"free") * 1_000_000)
    yield File("an MP4 whose box is its own length of zero", film[:28] + b"\0\0\0\0moov" * 1000)
    yield File("a WebM that claims an hour", webm_that_lasts(3600))
    yield File("a WebM that claims no time", webm_that_lasts(0))
    yield File("a WebM that claims minus one second", webm_that_lasts(-1))
    yield File("a WebM that claims an infinite time", webm_that_lasts(float("inf")))
    yield File("a WebM whose duration is no number", webm_that_lasts(float("nan")))
    yield File("an AVI that becomes large", film_of([(64, 64)] * 4 + [(8100, 8100)] * 4, "avi"), may_pass=True)
    yield File("an MP4 that becomes large", film_of([(64, 64)] * 4 + [(8100, 8100)] * 4, "mp4"), may_pass=True)
    yield File("an MKV with 60 sizes", film_of([(16 * n, 16 * n) for n in range(1, 61)], "matroska"), may_pass=True)
    yield File("an AVI that claims 4 billion frames", avi_that_claims(frames=2**32 - 1))
    yield File("an AVI that claims a billion frames a second", avi_that_claims(frames=10**9, rate=10**9, scale=1))
    yield File("an AVI of no rate", avi_that_claims(rate=0), may_pass=True)
    yield File("an AVI that claims 4 GP", avi_that_claims(width=65_500, height=65_500), may_pass=True)
    yield File("an AVI of negative size", avi_that_claims(width=-64, height=-64), may_pass=True)
    yield File("a GIF with 100,000 frames", gif_of(64, 64, gif_frame(0, 0, 64, 64) * 100_000))
    yield File(
        "a GIF with frames outside of its screen", gif_of(64, 64, *[gif_frame(60_000, 60_000, 64, 64)] * 9), True
    )
    yield File("an animated PNG", animated_png(10))
    yield File("a WebP", webp(64, 64))
    yield File("an AVIF", avif_that_claims(64, 64))
    yield File("a palette PNG", palette_png())


def frame_lists() -> Iterator[File]:
    """Yield lists of JPEG frames, each in base64, that are too long or too costly."""
    frame, empty = media.encoded(media.picture("red", kind="JPEG")), ""
    yield File("200,000 empty frames", ",".join([empty] * 200_000).encode())
    yield File("10,000 frames", ",".join([frame] * 10_000).encode())
    yield File("10,000,000 commas", b"," * 10_000_000)
    yield File("frames that are palette PNGs of 64 MP", ",".join([media.encoded(palette_png())] * 30).encode())
    yield File("frames that are AVIFs of 121 MP", ",".join([media.encoded(avif_that_claims(64, 64))] * 30).encode())
    yield File("frames of different kinds", f"{frame},{media.encoded(media.picture('red', kind='PNG'))}".encode(), True)


def wave(rate: int, channels: int, bits: int, size: int) -> bytes:
    """Return a WAV file whose header claims a rate, a number of channels, bits per sample and bytes of sound."""
    head = struct.pack("<HHIIHH", 1, channels, rate, 0xFFFFFFFF, 0xFFFF, bits)
    return b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0" + head + b"data" + struct.pack("<I", size) + bytes(1000)


def flac(rate: int, channels: int, bits: int, samples: int) -> bytes:
    """Return a FLAC file whose header claims a rate, channels, bits per sample and a number of samples."""
    claims = rate << 44 | (channels - 1) << 41 | (bits - 1) << 36 | samples
    return b"fLaC\x80\0\0\x22" + struct.pack(">HH", 65_535, 65_535) + bytes(6) + claims.to_bytes(8, "big") + bytes(16)


def vorbis(rate: int, channels: int) -> bytes:
    """Return the first page of an OGG file whose header claims a rate and a number of channels."""
    head = b"\x01vorbis" + struct.pack("<IBIIIIBB", 0, channels, rate, 0, 0, 0, 0xB8, 1)
    return b"OggS\0\x02" + bytes(20) + b"\x01" + bytes([len(head)]) + head


def mp3(frames: int) -> bytes:
    """Return an MP3 file whose Xing header claims a number of frames."""
    return b"\xff\xfb\x90\x64" + bytes(32) + b"Xing\0\0\0\x01" + struct.pack(">I", frames) + bytes(373)


def recordings() -> Iterator[File]:
    """Yield each hostile sound."""
    for name, data in sounds():
        yield File(name, data)
    yield File("88 bytes of SDP", SESSION.ljust(88, b"\n"))
    yield File("a WAV of 4 billion samples a second", wave(2**32 - 1, 1, 16, 2**32 - 1))
    yield File("a WAV of 65,535 channels", wave(48_000, 65_535, 64, 2**32 - 1))
    yield File("a WAV of no channels", wave(48_000, 0, 0, 0))
    yield File("a FLAC of 64 billion samples", flac(655_350, 8, 32, 2**36 - 1))
    yield File("a FLAC of no rate", flac(0, 1, 4, 1))
    yield File("an OGG of 255 channels", vorbis(2**32 - 1, 255))
    yield File("an MP3 of 4 billion frames", mp3(2**32 - 1))
    yield File("an ID3 tag of 256 MB", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(1000))
    yield File("an MP4 of 20 million frames", mp4_of_20_million_frames())
