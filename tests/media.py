"""Pictures and videos in plain colours, as a client would send them."""

import base64
import io
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")

Pixel = tuple[int, int, int]


def shade(colour: str) -> Pixel:
    """Return a colour slightly off the one that Pillow calls by this name."""
    red, green, blue = Image.new("RGB", (1, 1), colour).tobytes()
    return tuple(value - 12 if value > 127 else value + 12 for value in (red, green, blue))  # type: ignore[return-value]


def picture(colour: str, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    """Return an image file; `size` is width and height, `kind` one of Pillow's formats."""
    file = io.BytesIO()
    Image.new("RGB", size, shade(colour)).save(file, kind)
    return file.getvalue()


def film(first: str, last: str, frames: int = 16, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return an MP4 file that shows one colour, and another from its middle on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 8.0, size)
        for index in range(frames):
            colour = shade(first if index < frames // 2 else last)
            writer.write(np.full((size[1], size[0], 3), colour[::-1], dtype=np.uint8))
        writer.release()
        return path.read_bytes()


def encoded(data: bytes) -> str:
    """Return base64 text."""
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str) -> str:
    """Return a `data:` URL."""
    return f"data:{media_type};base64,{encoded(data)}"


def image_url(colour: str) -> str:
    """Return a picture as a `data:` URL."""
    return data_url(picture(colour), "image/png")
