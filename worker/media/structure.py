"""Checks of a file's structure before it is decoded: claims that cost a decoder far more than an honest file. Pure."""

import re

from worker.errors import MediaError, MediaTooLargeError

PIXEL_BYTES = 20
"""What decoding a pixel of an image needs at most: the decoder's buffers, and conversions from a palette with
transparency."""
MAX_JPEG_SCANS = 64
"""Encoders write about ten. Each scan of a progressive JPEG goes over the whole image again."""
MAX_JPEG_SEGMENTS = 10_000
MAX_TILE_PIXELS = 4 << 20
"""A tile of a TIFF may be larger than the image, but not by much."""
MAX_FRAME_RATE = 1000.0
"""Frames per second of a video. Cameras for slow motion record up to 960."""

MAX_BOXES = 100_000
MAX_BOX_DEPTH = 10
"""Of an MP4 file. Honest ones have a few hundred boxes, seven levels deep, or some for each second if fragmented."""

_CONTAINERS = frozenset(b"moov trak mdia minf stbl moof traf udta edts dinf mvex tref wave sinf schi ilst".split())
"""Boxes that FFmpeg descends into."""
_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
"""Boxes that state a number of frames, and its position in their content."""
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_SEQUENTIAL = (0xC0, 0xC1)
"""The markers of frames that are not progressive."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def check_jpeg(data: bytes) -> None:
    """Raise `MediaTooLargeError` if a JPEG file has too many segments or scans."""
    position, components, scans = 2, 0, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        # As decoders do, this skips whatever is no marker: compressed data, and garbage between segments.
        if (found := _MARKER.search(data, position)) is None or (marker := found[0][1]) == _END:
            return
        position = found.end()
        if marker in _SEQUENTIAL and position + 7 < len(data):
            components = data[position + 7]
        elif marker == _SCAN:
            # Decoders stop after the first scan of a sequential file that has all components.
            if components and data[position + 2 : position + 3] == bytes([components]):
                return
            scans += 1
            if scans > MAX_JPEG_SCANS:
                raise MediaTooLargeError(f"it has more than {MAX_JPEG_SCANS} scans; save it as a baseline JPEG")
        position += int.from_bytes(data[position : position + 2], "big")
    raise MediaTooLargeError(f"it has more than {MAX_JPEG_SEGMENTS} segments; save it again as JPEG")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return the width and height in a WebP file's header; 0, 0 if it is damaged. Source: RFC 9649."""
    kind, payload = data[12:16], data[20:30]
    if len(payload) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(payload[4:7], "little"), 1 + int.from_bytes(payload[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(payload[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(payload[6:8], "little") & 0x3FFF, int.from_bytes(payload[8:10], "little") & 0x3FFF


def check_tiles(tags: dict[int, object], width: int, height: int) -> None:
    """Raise `MediaTooLargeError` if the tiles of a TIFF image are far larger than the image. `tags` are its tags."""
    tile = [value for tag in (_TILE_WIDTH, _TILE_HEIGHT) if isinstance(value := tags.get(tag), int)]
    if len(tile) == 2 and tile[0] * tile[1] > max(MAX_TILE_PIXELS, 4 * width * height):
        raise MediaTooLargeError(
            f"its tiles of {tile[0]} x {tile[1]} pixels are far larger than the image of {width} x {height} pixels"
        )


def check_frame_rate(frames: float, rate: float, seconds: float) -> None:
    """Raise `MediaError` if a video claims an impossible rate, or more frames than `seconds` may have."""
    if not (frames >= 1 and rate > 0):
        raise MediaError("its container does not state its duration; remux the video")
    if rate > MAX_FRAME_RATE:
        raise MediaTooLargeError(f"it claims {rate:.0f} frames per second; at most {MAX_FRAME_RATE:.0f} are accepted")
    if frames > MAX_FRAME_RATE * seconds:
        raise MediaTooLargeError(f"it claims {frames:.0f} frames")


def check_mp4(data: bytes) -> None:
    """Raise `MediaTooLargeError` if an MP4 or MOV file claims more frames than it has bytes.

    A claim takes a few bytes of the file, and FFmpeg allocates memory for each frame. Source of the boxes: ISO/IEC
    14496-12.
    """
    pending = [(0, len(data), 0)]
    boxes = 0
    while pending:
        start, end, depth = pending.pop()
        while start + 8 <= end:
            boxes += 1
            size, box, header = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
            if size == 1:
                size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
            stop = end if size == 0 else min(start + size, end)
            if stop < start + header:
                break
            if box == b"cmov" or boxes > MAX_BOXES or depth > MAX_BOX_DEPTH:
                raise MediaTooLargeError("its boxes are compressed, too many or nested too deep; remux the file")
            if (count := _frame_count(data, box, start + header)) > len(data):
                raise MediaTooLargeError(f"it claims {count:,} frames, which is more than it has bytes")
            if box in _CONTAINERS:
                pending.append((start + header, stop, depth + 1))
            start = stop


def _frame_count(data: bytes, box: bytes, position: int) -> int:
    """Return the number of frames that a box states; 0 for other boxes. `position` is that of its content."""
    if box not in _COUNTS:
        return 0
    position += _COUNTS[box]
    return int.from_bytes(data[position : position + 4], "big")
