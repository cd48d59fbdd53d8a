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


CODECS = {"mp4": "mp4v", "mov": "mp4v", "webm": "VP90", "mkv": "mp4v", "avi": "MJPG"}


def film(
    first: str, last: str, frames: int = 16, size: tuple[int, int] = (64, 64), kind: str = "mp4", rate: float = 8.0
) -> bytes:
    """Return a video file that shows one colour, and another from its middle on; `rate` is in frames per second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film.{kind}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODECS[kind]), rate, size)
        for index in range(frames):
            colour = shade(first if index < frames // 2 else last)
            writer.write(np.full((size[1], size[0], 3), colour[::-1], dtype=np.uint8))
        writer.release()
        return path.read_bytes()


def animation(first: str, last: str, frames: int = 16) -> bytes:
    """Return the same as a GIF file, 8 frames a second."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (64, 64), shade(first if index < frames // 2 else last)) for index in range(frames)]
    # Each one differs a little, or Pillow would make one long frame of them.
    for index, picture in enumerate(pictures):
        picture.putpixel((index, 0), (0, 0, 0))
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=125)
    return file.getvalue()


def frames(first: str, last: str, count: int = 4) -> str:
    """Return the same as a `data:` URL of JPEG frames."""
    pictures = [picture(first if index < count // 2 else last, kind="JPEG") for index in range(count)]
    return "data:video/jpeg;base64," + ",".join(map(encoded, pictures))


def encoded(data: bytes) -> str:
    """Return base64 text."""
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str) -> str:
    """Return a `data:` URL."""
    return f"data:{media_type};base64,{encoded(data)}"


def image_url(colour: str) -> str:
    """Return a picture as a `data:` URL."""
    return data_url(picture(colour), "image/png")
