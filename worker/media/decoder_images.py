"""Images: an operation of the decoder processes."""

import io
from collections.abc import Sequence
from contextlib import suppress

from PIL import Image, ImageOps

from worker.errors import MediaTooLargeError
from worker.media import structure
from worker.media.arrow import copy_rgbx
from worker.media.formats import PILLOW_FORMATS, media_type
from worker.media.structure import PIXEL_BYTES
from worker.media.workspace import Workspace

IMAGE_BYTES = 128 << 20
"""What decoding an image may need besides its pixels, in bytes of address space."""
PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F")
"""Pillow's modes whose images consist of their pixels alone, without a palette."""


class ImageDecoder(Workspace):
    """Decodes one image after the other."""

    def decode_image(
        self, size: int, allowed: int, mode: str | None, background: Sequence[int], pixels: int | None
    ) -> tuple[tuple[int, int], tuple[str, str, int, tuple[int, int], bool] | None]:
        """Decode a file, turn the image upright, and convert it to `mode` and to at most `pixels` pixels.

        Return the width and height that the file claims, and the result: its mode, the order and number of its bytes in
        the shared memory, its size, and whether the mode was converted. There is no result if the file claims more than
        `allowed` pixels.
        """
        data = self._file(size)
        detected = media_type(data)
        canvas = 0
        if detected == "image/jpeg":
            structure.check_jpeg(data)
        elif detected == "image/webp":
            # Pillow's decoder allocates two canvases when it opens the file.
            width, height = structure.webp_size(data)
            if (canvas := width * height) > allowed:
                return (width, height), None
        self._limit(2 * size + 8 * canvas + IMAGE_BYTES)
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS.get(str(detected), ())) as image:
            claimed = image.size
            if detected == "image/tiff":
                structure.check_tiles(dict(getattr(image, "tag_v2", {})), *claimed)
            if claimed[0] * claimed[1] > allowed:
                return claimed, None
            self._limit(PIXEL_BYTES * claimed[0] * claimed[1] + IMAGE_BYTES)
            image.load()
            if image.size != claimed:
                raise MediaTooLargeError("its pixels are not those that its header claims")
            with suppress(Exception):  # As in vLLM: a wrong orientation is better than no image.
                ImageOps.exif_transpose(image, in_place=True)
            converted = _converted(image, mode, tuple(background))
            is_converted = converted is not image
        if pixels is not None and converted.width * converted.height > pixels:
            scale = (pixels / (converted.width * converted.height)) ** 0.5
            smaller = (scaled(converted.width, scale, pixels), scaled(converted.height, scale, pixels))
            converted = converted.resize(smaller, Image.Resampling.LANCZOS)
        return claimed, (*self._share(converted), converted.size, is_converted)

    def _share(self, image: Image.Image) -> tuple[str, str, int]:
        """Copy the pixels into the shared memory; return the mode, the order of the bytes, and their number."""
        if image.mode == "RGB" and 4 * image.width * image.height <= len(self._memory):
            with suppress(ValueError):
                return "RGB", "RGBX", copy_rgbx(image, self._address)
        pixels = image.tobytes()
        self._memory[: len(pixels)] = pixels
        return image.mode, image.mode, len(pixels)


def scaled(length: float, scale: float, most: int) -> int:
    """Return a scaled width or height in pixels: at least 1, at most `most`."""
    return min(max(1, int(length * scale)), most)


def _converted(image: Image.Image, mode: str | None, background: tuple[int, ...]) -> Image.Image:
    """Convert an image as vLLM does: what is transparent takes the background's colour. None keeps the mode."""
    if mode is None:
        if image.mode in PLAIN_MODES:
            return image
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == mode:
        return image
    if mode != "RGB" or not image.has_transparency_data:
        return image.convert(mode)
    layered = image if image.mode == "RGBA" else image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(layered, mask=layered.getchannel("A"))
    return flat


def decode_small_images() -> None:
    """Decode an image in each format: Pillow imports its modules when they are first needed."""
    for (name,) in PILLOW_FORMATS.values():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).quantize(2).convert("P" if name in ("PNG", "GIF") else "RGB").save(file, name)
        with Image.open(file, formats=(name,)) as image:
            ImageOps.exif_transpose(image, in_place=True)
            _converted(image, "RGB", (0, 0, 0)).resize((4, 4)).tobytes()
