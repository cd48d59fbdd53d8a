"""Documents: operations of the decoder processes. PDFium draws pages; it runs no scripts and opens no attachments."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from worker.errors import MediaError, MediaTooLargeError
from worker.media.decoder_images import scaled
from worker.media.workspace import Workspace

DOCUMENT_BYTES = 512 << 20
"""What drawing a page may need besides the file, in bytes of address space."""
POINTS_PER_INCH = 72
DOTS_PER_INCH = 200
MAX_RATIO = 100
"""How many times as long as wide a page may be. Models refuse images that are longer, some of them above 200."""
MAX_CHARACTERS = 2_000_000
"""The longest text of a document."""
SMALL_DOCUMENT = b"""%PDF-1.4
1 0 obj<</Pages 2 0 R>>endobj
2 0 obj<</Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj
4 0 obj<</Length 20>>stream
BT/F 9 Tf(Hello)Tj ET
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R>>
"""
_NOT_IN_TEXT = dict.fromkeys([*(code for code in range(32) if chr(code) not in "\t\n"), 0xFFFE, 0xFFFF])
"""What PDFium adds to a text: carriage returns, and marks where a line breaks a word."""


class DocumentDecoder(Workspace):
    """Draws one page after the other. Each operation opens the document again, so that nothing of it stays."""

    def open_document(self, size: int, most_pages: int, with_text: bool) -> tuple[int, list[str]]:
        """Return the number of pages, and the text of each if it is asked for and there are at most `most_pages`."""
        with self._document(size) as document:
            pages = len(document)
            texts = list(_texts(document)) if with_text and pages <= most_pages else []
        return pages, texts

    def draw_page(self, size: int, index: int, pixels: int) -> tuple[int, int]:
        """Draw a page with at most `pixels` pixels into the shared memory, four bytes each; return width and height."""
        import pypdfium2  # type: ignore[import-untyped]
        from pypdfium2 import raw

        with self._document(size) as document:
            # Without it, the fields of a form would be empty.
            document.init_forms()
            page = document[index]
            points = page.get_size()
            if not max(points) < MAX_RATIO * min(points):
                raise MediaError(
                    f"it is {points[0]:.0f} x {points[1]:.0f} points large, which is too narrow for a model"
                )
            scale = min(DOTS_PER_INCH / POINTS_PER_INCH, (pixels / (points[0] * points[1])) ** 0.5)
            width = scaled(points[0], scale, pixels)
            height = scaled(points[1], scale, pixels // width)
            buffer = (ctypes.c_ubyte * (4 * width * height)).from_address(self._address)
            bitmap = pypdfium2.PdfBitmap.new_native(width, height, raw.FPDFBitmap_BGRx, True, buffer)
            bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
            flags = raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER | raw.FPDF_RENDER_LIMITEDIMAGECACHE
            raw.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, 0, flags)
            if document.formenv:
                raw.FPDF_FFLDraw(document.formenv, bitmap, page, 0, 0, width, height, 0, flags)
            bitmap.close()
        return width, height

    @contextmanager
    def _document(self, size: int) -> Iterator[Any]:
        import pypdfium2
        from pypdfium2 import raw

        data = self._file(size)
        self._limit(2 * size + DOCUMENT_BYTES)
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
                raise MediaError("it is encrypted; send it without encryption") from None
            raise
        try:
            yield document
        finally:
            document.close()


def decode_small_document() -> None:
    """Read and draw a page: Python and PDFium load some of their parts when they are first needed."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory.write(SMALL_DOCUMENT)
    decoder = DocumentDecoder(memory)
    decoder.open_document(len(SMALL_DOCUMENT), 1, True)
    decoder.draw_page(len(SMALL_DOCUMENT), 0, 100)


def _texts(document: Any) -> Iterator[str]:
    characters = 0
    for page in document:
        text_page = page.get_textpage()
        characters += text_page.count_chars()
        if characters > MAX_CHARACTERS:
            raise MediaTooLargeError(f"its text has more than {MAX_CHARACTERS:,} characters; send fewer pages")
        # Only what is within the page: text beside it is invisible.
        yield text_page.get_text_bounded().translate(_NOT_IN_TEXT).strip()
        page.close()
