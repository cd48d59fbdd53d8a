"""PDF documents that lie, loop, or cost far more to read and draw than their size suggests. All are deterministic."""

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from random import Random

from PIL import Image

from tests.support import media, pdfs
from tests.support.hostile_images import File
from tests.support.pdfs import deflated, file_of, of_pages, stream

CATALOGUE = b"<< /Type /Catalog /Pages 2 0 R >>"
PAGES = b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>"
PAGE = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Contents 4 0 R >>"
CONTENT = stream(b"1 0 0 rg 0 0 100 100 re f")
DRAWN = stream(b"q 500 0 0 500 0 0 cm /X Do Q")
USES_X = b"/Resources << /XObject << /X 4 0 R >> >>"


def one_page(page: bytes = PAGE, content: bytes = CONTENT, *more: bytes, trailer: bytes = b"") -> bytes:
    """Return a file with one page; `more` are objects with the numbers from 5 on."""
    return file_of([CATALOGUE, PAGES, page, content, *more], trailer)


def catalogue(entries: bytes, *more: bytes) -> bytes:
    """Return a file with one page and more entries in its catalogue; `more` are objects with the numbers from 5 on."""
    return file_of([b"<< /Type /Catalog /Pages 2 0 R %b >>" % entries, PAGES, PAGE, CONTENT, *more])


def with_table(table: bytes, trailer: bytes, start: int | None = None) -> bytes:
    """Return a file with its own cross-reference table."""
    data = one_page()
    data = data[: data.rindex(b"xref\n0")]
    place = len(data) if start is None else start
    return data + table + b"trailer\n<< /Size 5 /Root 1 0 R %b >>\nstartxref\n%d\n%%%%EOF" % (trailer, place)


@cache
def zeros(size: int = 1 << 30, rounds: int = 1) -> bytes:
    """Return `size` zero bytes, compressed one or more times. A megabyte is compressed once, and then repeated."""
    compressor = zlib.compressobj(9)
    head = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">I", size % 65_521 << 16 | 1)
    data = head + block * ((size >> 20) - 1) + b"\3\0" + checksum
    for _ in range(rounds - 1):
        data = zlib.compress(data, 9)
    return data


def image(entries: bytes, data: bytes, width: int, height: int, *more: bytes) -> bytes:
    """Return a document that draws an image."""
    head = b"/Type /XObject /Subtype /Image /Width %d /Height %d %b" % (width, height, entries)
    return of_pages(DRAWN, page=USES_X, more=[stream(data, head), *more])


def form(content: bytes, entries: bytes = b"") -> bytes:
    """Return a form, which is a content stream that others draw."""
    return deflated(content, b"/Type /XObject /Subtype /Form /BBox [0 0 600 900] " + entries)


def files() -> Iterator[File]:
    """Yield all files."""
    yield from broken()
    yield from page_trees()
    yield from objects()
    yield from active()
    yield from pages()
    yield from streams()
    yield from images()
    yield from drawings()
    yield from fonts()


def broken() -> Iterator[File]:
    whole = pdfs.of_texts("Hello")
    yield File("nothing but a header", b"%PDF-1.7\n")
    yield File("random bytes", b"%PDF-1.7\n" + Random(1).randbytes(100_000))
    yield File("the first half", whole[: len(whole) // 2], may_pass=True)
    yield File("no end", whole[:-40], may_pass=True)
    yield File("no table", whole[: whole.index(b"xref\n")], may_pass=True)
    yield File("a table beyond the end", with_table(b"", b"", 1 << 60), may_pass=True)
    yield File("a table at a negative place", with_table(b"", b"", -5), may_pass=True)
    place = len(one_page()[: one_page().rindex(b"xref\n0")])
    yield File("a table that follows itself", with_table(b"xref\n0 0\n", b"/Prev %d" % place), may_pass=True)
    yield File("a table of 2³¹ entries", with_table(b"xref\n0 2147483647\n", b""), may_pass=True)
    yield File("a table of 4 million entries", with_table(b"xref\n0 4000000\n", b"/Size 4000000"), may_pass=True)
    entries = b"<< /Type /XRef /Size 2147483647 /W [8 8 8] /Index [0 2147483647] /Root 1 0 R /Length 0 >>"
    head = one_page()
    head = head[: head.rindex(b"xref\n0")]
    table = b"9 0 obj\n%b\nstream\n\nendstream endobj\nstartxref\n%d\n%%%%EOF" % (entries, len(head))
    yield File("a compressed table of 2³¹ entries", head + table, may_pass=True)
    yield File("a length beyond the end", one_page(content=stream(b"0 0 9 9 re f", length=1 << 40)), may_pass=True)
    yield File("a negative length", one_page(content=stream(b"0 0 9 9 re f", length=-9)), may_pass=True)
    loop = b"<< /Length 4 0 R >>\nstream\n0 0 9 9 re f\nendstream"
    yield File("a length that is its own stream", one_page(content=loop), may_pass=True)


def page_trees() -> Iterator[File]:
    def tree(pages: bytes, *more: bytes) -> bytes:
        return file_of([CATALOGUE, pages, PAGE, CONTENT, *more])

    yield File("no pages", tree(b"<< /Type /Pages /Count 0 /Kids [] >>"))
    yield File("2 billion pages", tree(b"<< /Type /Pages /Count 2000000000 /Kids [3 0 R] >>"), may_pass=True)
    yield File("a negative number of pages", tree(b"<< /Type /Pages /Count -1 /Kids [3 0 R] >>"), may_pass=True)
    yield File("a page 100,000 times", tree(b"<< /Type /Pages /Count 100000 /Kids [%b] >>" % (b"3 0 R " * 100_000)))
    yield File("a page tree that contains itself", tree(b"<< /Type /Pages /Count 9 /Kids [2 0 R 2 0 R] >>"), True)
    nodes = [b"<< /Type /Pages /Count 1 /Kids [%d 0 R] >>" % (number + 6) for number in range(20_000)]
    deep = tree(b"<< /Type /Pages /Count 1 /Kids [5 0 R] >>", *nodes, PAGE)
    yield File("a page tree 20,000 levels deep", deep, may_pass=True)


def objects() -> Iterator[File]:
    numbers = [b"<< /A %d >>" % number for number in range(200_000)]
    yield File("200,000 objects", one_page(PAGE, CONTENT, *numbers), may_pass=True)
    for name, start, end in (("lists", b"[", b"]"), ("dictionaries", b"<</A ", b">>")):
        nested = start * 100_000 + end * 100_000
        yield File(f"100,000 nested {name}", one_page(PAGE[:-2] + b"/A " + nested + b">>"), may_pass=True)
    yield File("an object that is itself", one_page(PAGE.replace(b"[0 0 100 100]", b"5 0 R"), CONTENT, b"5 0 R"), True)
    yield File("a name of 5 MB", one_page(PAGE[:-2] + b"/A /" + b"a" * 5_000_000 + b">>"), may_pass=True)
    contents = PAGE.replace(b"4 0 R", b"[5 0 R]")
    yield File("contents that contain themselves", one_page(contents, CONTENT, b"[5 0 R 5 0 R]"), may_pass=True)
    inner = stream(b"4 0 9 0 ", b"/Type /ObjStm /N 2147483647 /First 8 /Extends 4 0 R")
    yield File("a stream of objects that contains itself", one_page(content=inner), may_pass=True)


def active() -> Iterator[File]:
    script = b"/S /JavaScript /JS (while (true) app.alert(1))"
    yield File("a script when it opens", catalogue(b"/OpenAction << %b >>" % script), may_pass=True)
    yield File("a program to launch", catalogue(b"/OpenAction << /S /Launch /F (/bin/sh) >>"), may_pass=True)
    yield File("an action that follows itself", catalogue(b"/OpenAction 5 0 R", b"<< %b /Next 5 0 R >>" % script), True)
    button = b"<< /Type /Annot /Subtype /Widget /FT /Btn /Rect [0 0 9 9] /T (a) /AA << /PO << %b >> >> >>" % script
    page = PAGE[:-2] + b"/Annots [5 0 R] /AA << /O << %b >> >> >>" % script
    head = b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [5 0 R] /NeedAppearances true >> >>"
    yield File("a button with a script", file_of([head, PAGES, page, CONTENT, button]), may_pass=True)
    names = b"/Names << /EmbeddedFiles << /Names [(a) 5 0 R] >> >> /AF [5 0 R]"
    attachment = b"<< /Type /Filespec /F (a.exe) /EF << /F 6 0 R >> >>"
    bomb = stream(zeros(), b"/Filter /FlateDecode /Type /EmbeddedFile")
    yield File("an attachment of 1 GB", catalogue(names, attachment, bomb), may_pass=True)
    xfa = b"/AcroForm << /XFA 5 0 R /NeedAppearances true /Fields [] >>"
    yield File("a form in XML", catalogue(xfa, stream(b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>")), True)
    outline = b"<< /Title (a) /Next 5 0 R /First 5 0 R /Parent 5 0 R >>"
    yield File("an outline that contains itself", catalogue(b"/Outlines 5 0 R", outline), may_pass=True)
    password = b"/Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O (%b) /U (%b)" % (b"o" * 32, b"u" * 32)
    yield File("a password", one_page(trailer=b"/ID [(a) (a)] /Encrypt << %b >>" % password))
    unknown = b"/ID [(a) (a)] /Encrypt << /Filter /Unknown /V 9 >>"
    yield File("an unknown encryption", one_page(trailer=unknown))
    yield File("an encryption that is itself", one_page(PAGE, CONTENT, b"5 0 R", trailer=b"/Encrypt 5 0 R"), True)
    yield File(
        "an external file", image(b"/F (/etc/passwd) /ColorSpace /DeviceGray /BitsPerComponent 8", b"", 9, 9), True
    )


def pages() -> Iterator[File]:
    for width, height in ((1e9, 1e9), (3e38, 3e38), (0, 0), (-5, -5), (1, 1e6), (1e-9, 1e-9)):
        content = stream(b"1 0 0 rg 0 0 %.9f %.9f re f" % (width, height))
        yield File(f"a page of {width:g} x {height:g} points", of_pages(content, size=(width, height)), may_pass=True)
    yield File("a page turned by 2³¹ - 1 degrees", one_page(PAGE[:-2] + b"/Rotate 2147483647 >>"), may_pass=True)
    yield File("a page in units of 10³⁰", one_page(PAGE[:-2] + b"/UserUnit 1e30 >>"), may_pass=True)


def streams() -> Iterator[File]:
    flate = b"/Filter /FlateDecode"
    yield File("a content of 1 GB, compressed", one_page(content=stream(zeros(), flate)), may_pass=True)
    twice = stream(zeros(rounds=2), b"/Filter [/FlateDecode /FlateDecode]")
    yield File("a content of 1 GB, compressed twice", one_page(content=twice), may_pass=True)
    runs = stream(b"\x81 " * 4_000_000, b"/Filter /RunLengthDecode")
    yield File("a content of 500 MB in runs", one_page(content=runs), may_pass=True)
    yield File(
        "a content of 40 MB of zeros", one_page(content=stream(b"z" * 10_000_000, b"/Filter /ASCII85Decode")), True
    )
    chain = stream(b"00", b"/Filter [%b]" % (b"/ASCIIHexDecode " * 100_000))
    yield File("100,000 filters", one_page(content=chain), may_pass=True)
    predictor = b"/DecodeParms << /Predictor 15 /Colors 32 /BitsPerComponent 16 /Columns 2147483647 >>"
    yield File("a row of 2³¹ pixels", one_page(content=stream(zeros(1 << 20), flate + predictor)), may_pass=True)
    array = PAGE.replace(b"4 0 R", b"[%b]" % (b"4 0 R " * 100_000))
    large = deflated(b"0 0 9 9 re f " * 10_000)
    yield File("a stream 100,000 times", one_page(array, large), may_pass=True)


def images() -> Iterator[File]:
    grey = b"/ColorSpace /DeviceGray /BitsPerComponent 8 "
    rgb = b"/ColorSpace /DeviceRGB /BitsPerComponent 8 "
    bit = b"/ColorSpace /DeviceGray /BitsPerComponent 1 "
    yield File("an image of 10¹⁰ pixels", image(grey, b"", 100_000, 100_000), may_pass=True)
    yield File("an image of 2³¹ x 2³¹ pixels", image(grey, b"", (1 << 31) - 1, (1 << 31) - 1), may_pass=True)
    flate = rgb + b"/Filter /FlateDecode"
    yield File("an image of 1 GB, compressed", image(flate, zeros(), 18_000, 18_000), may_pass=True)
    jpeg = bytearray(media.picture("red", kind="JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    yield File(
        "a JPEG that claims 4 GP", image(rgb + b"/Filter /DCTDecode", bytes(jpeg), 65_500, 65_500), may_pass=True
    )
    jpx = _jpeg_2000()
    yield File("a JPEG 2000 of 4 GP", image(b"/Filter /JPXDecode", jpx, 65_535, 65_535), may_pass=True)
    page = struct.pack(">IBBBI", 0, 48, 0, 1, 19) + struct.pack(">IIIIBH", 0xFFFF_FFFF, 0xFFFF_FFFF, 0, 0, 0, 0)
    region = struct.pack(">IBBBI", 1, 38, 0, 1, 18 + 8) + struct.pack(">IIIIBB", 0xFFFF_FFF, 0xFFFF_FFF, 0, 0, 0, 0)
    jbig2 = page + region + bytes(8)
    yield File(
        "a JBIG2 of 2³² x 2³² pixels", image(bit + b"/Filter /JBIG2Decode", jbig2, 65_535, 65_535), may_pass=True
    )
    fax = b"/Filter /CCITTFaxDecode /DecodeParms << /K -1 /Columns 2147483647 /Rows 2147483647 >>"
    yield File("a fax of 2³¹ x 2³¹ pixels", image(bit + fax, b"\0" * 1000, 65_535, 65_535), may_pass=True)
    inline = stream(b"q 500 0 0 500 0 0 cm BI /W 100000 /H 100000 /CS /RGB /BPC 8 ID a EI Q")
    yield File("an image of 10¹⁰ pixels in the text", one_page(content=inline), may_pass=True)
    yield File("a mask that is its own mask", image(grey + b"/SMask 4 0 R", bytes(81), 9, 9), may_pass=True)
    indexed = b"/ColorSpace [/Indexed 5 0 R 255 (a)] /BitsPerComponent 8"
    yield File("colours that contain themselves", image(indexed, bytes(81), 9, 9, b"[/Indexed 5 0 R 255 (a)]"), True)
    many = stream(b"q 500 0 0 500 0 0 cm /X Do Q " * 20_000)
    large = deflated(bytes(4_000_000), b"/Type /XObject /Subtype /Image /Width 2000 /Height 2000 " + grey)
    yield File("an image drawn 20,000 times", of_pages(many, page=USES_X, more=[large]), may_pass=True)


def _jpeg_2000() -> bytes:
    """Return a JPEG 2000 image whose header claims 65,535 x 65,535 pixels in one tile."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "JPEG2000", no_jp2=True)
    data = bytearray(file.getvalue())
    place = data.index(b"\xff\x51") + 6
    data[place : place + 32] = struct.pack(">8I", 65_535, 65_535, 0, 0, 65_535, 65_535, 0, 0)
    return bytes(data)


def drawings() -> Iterator[File]:
    itself = form(b"/X Do /X Do", USES_X)
    yield File("a form that draws itself", of_pages(DRAWN, page=USES_X, more=[itself]), may_pass=True)
    levels = [form(b"/X Do " * 20, b"/Resources << /XObject << /X %d 0 R >> >>" % (number + 5)) for number in range(12)]
    yield File("20¹² forms", of_pages(DRAWN, page=USES_X, more=[*levels, form(b"0 0 9 9 re f")]), may_pass=True)
    groups = [
        form(b"/X Do", b"/Group << /S /Transparency >> /Resources << /XObject << /X %d 0 R >> >>" % (number + 5))
        for number in range(2000)
    ]
    yield File(
        "2,000 nested groups", of_pages(DRAWN, page=USES_X, more=[*groups, form(b"0 0 9 9 re f")]), may_pass=True
    )
    tile = b"/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 1 1] /XStep %b /YStep %b "
    paint = stream(b"/Pattern cs /P scn 0 0 600 900 re f")
    uses = b"/Resources << /Pattern << /P 4 0 R >> >>"
    fine = deflated(b"0 0 1 1 re f", tile % (b"0.0001", b"0.0001") + b"/Resources << >>")
    yield File("tiles every 0.0001 points", of_pages(paint, page=uses, more=[fine]), may_pass=True)
    own = deflated(b"/Pattern cs /P scn 0 0 1 1 re f", tile % (b"1", b"1") + uses)
    yield File("a pattern of itself", of_pages(paint, page=uses, more=[own]), may_pass=True)
    stitched = b"<< /FunctionType 3 /Domain [0 1] /Functions [5 0 R 5 0 R] /Bounds [0.5] /Encode [0 1 0 1] >>"
    shading = b"<< /ShadingType 2 /ColorSpace /DeviceRGB /Coords [0 0 1 1] /Function 5 0 R >>"
    shaded = b"/Resources << /Shading << /S 4 0 R >> >>"
    yield File("a function of itself", of_pages(stream(b"/S sh"), page=shaded, more=[shading, stitched]), may_pass=True)
    program = stream(b"{" * 50_000 + b"}" * 50_000, b"/FunctionType 4 /Domain [0 1] /Range [0 1 0 1 0 1]")
    yield File("a program 50,000 levels deep", of_pages(stream(b"/S sh"), page=shaded, more=[shading, program]), True)
    mesh = b"/ShadingType 4 /ColorSpace /DeviceRGB /BitsPerCoordinate 8 /BitsPerComponent 8 /BitsPerFlag 8 "
    triangles = deflated(b"\0\0\0\xff\0\0" * 3_000_000, mesh + b"/Decode [0 600 0 900 0 1 0 1 0 1]")
    yield File("a million triangles", of_pages(stream(b"/S sh"), page=shaded, more=[triangles]), may_pass=True)
    yield File("10 million saved states", of_pages(deflated(b"q " * 10_000_000)), may_pass=True)
    dashes = stream(b"[0.00001] 0 d 1 w 0 0 m 500 800 l S " * 50)
    yield File("a line of 10⁸ dashes", of_pages(dashes), may_pass=True)
    curves = deflated(b"0 0 m " + b"500 800 0 800 500 0 c " * 500_000 + b"50 w S")
    yield File("a path of 500,000 curves", of_pages(curves), may_pass=True)
    clips = deflated(b"0 0 500 800 re W n " * 200_000 + b"0 0 500 800 re f")
    yield File("200,000 clips", of_pages(clips), may_pass=True)


def fonts() -> Iterator[File]:
    text = stream(b"BT /F1 12 Tf 9 9 Td (aaaa) Tj ET")
    uses = b"/Resources << /Font << /F1 4 0 R >> >>"
    glyphs = b"/CharProcs << /a 5 0 R >> /Encoding << /Differences [97 /a] >> /FirstChar 97 /LastChar 97 /Widths [9]"
    type3 = b"<< /Type /Font /Subtype /Type3 /FontBBox [0 0 9 9] /FontMatrix [1 0 0 1 0 0] %b %b >>" % (glyphs, uses)
    glyph = stream(b"9 0 d0 BT /F1 12 Tf (aaaa) Tj ET")
    yield File("a letter that writes itself", of_pages(text, page=uses, more=[type3, glyph]), may_pass=True)
    font = b"<< /Type /Font /Subtype /TrueType /BaseFont /A /FontDescriptor 5 0 R >>"
    descriptor = b"<< /Type /FontDescriptor /FontName /A /Flags 32 /FontFile2 6 0 R >>"
    noise = stream(b"\0\1\0\0\0\x20" + Random(2).randbytes(100_000))
    yield File("a font of random bytes", of_pages(text, page=uses, more=[font, descriptor, noise]), may_pass=True)
    bomb = stream(zeros(), b"/Filter /FlateDecode")
    yield File("a font of 1 GB", of_pages(text, page=uses, more=[font, descriptor, bomb]), may_pass=True)
    composite = (
        b"<< /Type /Font /Subtype /Type0 /BaseFont /A /Encoding 5 0 R /ToUnicode 5 0 R /DescendantFonts [6 0 R] >>"
    )
    ranges = b"1 begincidrange <00000000> <ffffffff> 0 endcidrange 1 beginbfrange <0000> <ffff> <0041> endbfrange "
    table = deflated(ranges * 20_000, b"/Type /CMap /UseCMap 5 0 R")
    descendant = b"<< /Type /Font /Subtype /CIDFontType2 /BaseFont /A /FontDescriptor 7 0 R >>"
    more = [composite, table, descendant, b"<< /Type /FontDescriptor /FontName /A /Flags 4 >>"]
    yield File("20,000 tables of 2³² letters", of_pages(text, page=uses, more=more), may_pass=True)
    letters = deflated(b"BT /F1 1 Tf " + b"(%b) Tj " % (b"a" * 1000) * 5000 + b"ET")
    yield File("5 million letters", of_pages(letters), may_pass=True)
    yield File("a letter of 10⁹ points", of_pages(stream(b"BT /F1 1000000000 Tf (a) Tj ET")), may_pass=True)
