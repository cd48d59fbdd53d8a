"""Checks of a file's structure before it is decoded: claims that cost a decoder far more than an honest file. Pure."""

from collections.abc import Iterator

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

MAX_FRAMES = 1_000_000
"""Frames in an MP4 file: more than 16 minutes at 1,000 frames per second."""

_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_COUNTS = {b"stsz": 16, b"stz2": 16, b"trun": 12}
"""Boxes that state a number of samples, and the position of that number."""
_REPORTED = (b"trak", b"traf", b"hdlr", *_COUNTS)
_SCAN = b"\xff\xda"
_SEQUENTIAL = (0xC0, 0xC1)
"""The markers of frames that are not progressive."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323


def check_jpeg(data: bytes) -> None:
    """Raise `MediaTooLargeError` if a JPEG file has too many segments or scans."""
    components = 0
    for number, position in enumerate(_segments(data)):
        marker = data[position + 1]
        if number >= MAX_JPEG_SEGMENTS:
            raise MediaTooLargeError(f"it has more than {MAX_JPEG_SEGMENTS} segments; save it again as JPEG")
        if marker in _SEQUENTIAL and position + 9 < len(data):
            components = data[position + 9]
        elif marker == _SCAN[1]:
            # Decoders stop after the first scan of a sequential file that has all components.
            if components and data[position + 4] == components:
                return
            break
    # Within compressed data an 0xFF is followed by 0, so this finds markers only, and those of a thumbnail.
    if data.count(_SCAN) > MAX_JPEG_SCANS:
        raise MediaTooLargeError(f"it has more than {MAX_JPEG_SCANS} scans; save it as a baseline JPEG")


def _segments(data: bytes) -> Iterator[int]:
    """Yield the position of each segment's marker."""
    position = 2
    while position + 5 <= len(data) and data[position] == 0xFF:
        yield position
        marker = data[position + 1]
        has_no_length = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD9
        if marker == 0xFF:
            position += 1
        else:
            position += 2 if has_no_length else 2 + int.from_bytes(data[position + 2 : position + 4], "big")


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
    """Raise `MediaTooLargeError` if an MP4 or MOV file claims too many frames. A claim takes a few bytes of the file.

    FFmpeg allocates memory for each of them. Source of the boxes: ISO/IEC 14496-12.
    """
    frames, is_sound = 0, False
    for position, box in _boxes(data, 0, len(data)):
        if box in (b"trak", b"traf"):
            is_sound = False
        elif box == b"hdlr":
            # Uncompressed sound may have millions of samples, which FFmpeg groups.
            is_sound = data[position + 16 : position + 20] == b"soun"
        elif not is_sound:
            frames += int.from_bytes(data[position + _COUNTS[box] : position + _COUNTS[box] + 4], "big")
        if frames > MAX_FRAMES:
            raise MediaTooLargeError(f"it claims more than {MAX_FRAMES:,} frames")


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield position and type of the boxes that matter for the number of frames."""
    while start + 8 <= end:
        size, box, header = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        stop = end if size == 0 else min(start + size, end)
        if stop < start + header:
            return
        if box in _REPORTED:
            yield start, box
        if box in _CONTAINERS:
            yield from _boxes(data, start + header, stop)
        start = stop
