"""Images and videos in plain colours, in the forms that clients send."""

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
    """Return a colour that differs slightly from Pillow's colour of this name."""
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
    """Return a video file that shows `first`, and `last` from its middle on; `rate` is in frames per second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"film.{kind}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*CODECS[kind]), rate, size)
        for index in range(frames):
            colour = shade(first if index < frames // 2 else last)
            writer.write(np.full((size[1], size[0], 3), colour[::-1], dtype=np.uint8))
        writer.release()
        return path.read_bytes()


def animation(first: str, last: str, frames: int = 16) -> bytes:
    """Return a GIF file that shows `first`, and `last` from its middle on, with 8 frames per second."""
    file = io.BytesIO()
    images = [Image.new("RGB", (64, 64), shade(first if index < frames // 2 else last)) for index in range(frames)]
    # Pillow merges equal frames into one, so each gets a different pixel.
    for index, image in enumerate(images):
        image.putpixel((index, 0), (0, 0, 0))
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=125)
    return file.getvalue()


def frames(first: str, last: str, count: int = 4) -> str:
    """Return a `data:` URL of JPEG frames that show `first`, and `last` from the middle on."""
    pictures = [picture(first if index < count // 2 else last, kind="JPEG") for index in range(count)]
    return "data:video/jpeg;base64," + ",".join(map(encoded, pictures))


def encoded(data: bytes) -> str:
    """Return the base64 of a file."""
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str) -> str:
    """Return a file as a `data:` URL."""
    return f"data:{media_type};base64,{encoded(data)}"


def image_url(colour: str) -> str:
    """Return a PNG image in a colour as a `data:` URL."""
    return data_url(picture(colour), "image/png")
