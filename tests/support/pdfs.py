"""PDF documents, written object by object. Source of the format: ISO 32000-1."""

import zlib
from collections.abc import Iterable

from tests.support.media import shade

A4 = (595, 842)
"""Width and height in points."""
FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
LINE_POINTS = 14


def file_of(objects: Iterable[bytes], trailer: bytes = b"", version: bytes = b"1.7") -> bytes:
    """Return a PDF file of some objects, which are numbered from 1. The first one is the catalogue."""
    data, offsets = bytearray(b"%PDF-" + version + b"\n"), []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    entries = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    count = len(offsets) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n%b" % (count, entries)
    end = b"trailer\n<< /Size %d /Root 1 0 R %b >>\nstartxref\n%d\n%%%%EOF\n" % (count, trailer, len(data))
    return bytes(data) + table + end


def stream(data: bytes, entries: bytes = b"", length: int | None = None) -> bytes:
    """Return a stream object; `entries` are more entries of its dictionary, `length` is what it claims."""
    return b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(data) if length is None else length, entries, data)


def deflated(data: bytes, entries: bytes = b"") -> bytes:
    """Return a compressed stream object."""
    return stream(zlib.compress(data, 9), b"/Filter /FlateDecode " + entries)


def of_pages(
    *contents: bytes,
    size: tuple[float, float] = A4,
    page: bytes = b"",
    more: Iterable[bytes] = (),
    catalogue: bytes = b"",
) -> bytes:
    """Return a PDF file with one page for each content stream object.

    `page` are more entries of each page, `catalogue` more of the catalogue. `more` are objects with the numbers from 4
    on; the third one is a font.
    """
    extra = [FONT, *more]
    first = 3 + len(extra)
    kids = b" ".join(b"%d 0 R" % (first + 2 * index) for index in range(len(contents)))
    pages = b"<< /Type /Pages /Count %d /Kids [%b] >>" % (len(contents), kids)
    objects = [b"<< /Type /Catalog /Pages 2 0 R %b >>" % catalogue, pages, *extra]
    for index, content in enumerate(contents):
        box = b"/MediaBox [0 0 %.9f %.9f]" % size
        resources = b"" if b"/Resources" in page else b"/Resources << /Font << /F1 3 0 R >> >>"
        number = first + 2 * index + 1
        objects += [
            b"<< /Type /Page /Parent 2 0 R %b %b /Contents %d 0 R %b >>" % (box, resources, number, page),
            content,
        ]
    return file_of(objects)


def painted(colour: str) -> bytes:
    """Return a content stream that fills the page with a colour."""
    red, green, blue = (value / 255 for value in shade(colour))
    return stream(b"%.4f %.4f %.4f rg 0 0 %d %d re f" % (red, green, blue, *A4))


def written(text: str) -> bytes:
    """Return a content stream with the lines of a text."""
    lines = b" ".join(b"(%b) Tj T*" % line.encode("latin-1") for line in text.splitlines())
    return stream(b"BT /F1 11 Tf %d TL 60 780 Td %b ET" % (LINE_POINTS, lines))


def of_colours(*colours: str) -> bytes:
    """Return a document with one page in each colour."""
    return of_pages(*map(painted, colours))


def of_texts(*texts: str) -> bytes:
    """Return a document with one page for each text."""
    return of_pages(*map(written, texts))
