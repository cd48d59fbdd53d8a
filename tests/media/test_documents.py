"""Documents: drawn and read in child processes, within limits, whatever they contain."""

import asyncio
import hashlib
import math
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from PIL import Image

from tests.support import hostile_pdfs, media, pdfs
from tests.support.hostile_images import File
from worker import settings
from worker.errors import MediaError, MediaTooLargeError, MemoryExceededError
from worker.media.checks import Limits
from worker.media.decoder_documents import MAX_CHARACTERS
from worker.media.documents import DRAWING_BYTES, Document, Documents, Page
from worker.memory import Account, Budget

T = TypeVar("T")
PATH = "messages[0].content[0]"


class Case:
    """Documents and the account of one request."""

    def __init__(self, memory: int, environ: dict[str, str]) -> None:
        self.memory = Budget(memory)
        self.account = self.memory.account()
        self.documents = Documents(Limits(settings.read({"MEDIA_PROCESSES": "2", **environ})))

    async def open(self, data: bytes, *, with_text: bool = False) -> Document:
        document = Document(data, PATH, with_text=with_text)
        await self.documents.open(document, self.account)
        return document

    async def draw(self, document: Document, index: int = 0, mode: str | None = "RGB") -> Image.Image:
        return await self.documents.draw(Page(document, index), mode, self.account)


def run(
    work: Callable[[Case], Coroutine[Any, Any, T]], environ: dict[str, str] | None = None, memory: int = 4 << 30
) -> T:
    async def main() -> T:
        case = Case(memory, environ or {})
        try:
            return await work(case)
        finally:
            case.documents.close()

    return asyncio.run(main())


def drawn(data: bytes, index: int = 0, mode: str | None = "RGB", environ: dict[str, str] | None = None) -> Image.Image:
    async def work(case: Case) -> Image.Image:
        return await case.draw(await case.open(data), index, mode)

    return run(work, environ)


def texts_of(data: bytes) -> list[str]:
    async def work(case: Case) -> list[str]:
        return (await case.open(data, with_text=True)).texts

    return run(work)


def test_every_page_is_drawn() -> None:
    async def work(case: Case) -> list[Any]:
        document = await case.open(pdfs.of_colours(*colours))
        images = await asyncio.gather(*(case.draw(document, index) for index in range(document.pages)))
        return [image.getpixel((600, 800)) for image in images]

    colours = ("red", "green", "blue", "yellow", "black")
    pixels = run(work)
    assert len(pixels) == len(colours)
    for pixel, colour in zip(pixels, colours, strict=True):
        assert max(abs(one - other) for one, other in zip(pixel, media.shade(colour), strict=True)) <= 1


def test_the_text_of_every_page() -> None:
    assert texts_of(pdfs.of_texts("First\nline two", "Second")) == ["First\nline two", "Second"]
    assert texts_of(pdfs.of_colours("red")) == [""]


def test_text_beside_the_page_is_not_read() -> None:
    content = pdfs.stream(b"BT /F1 11 Tf 60 780 Td (inside) Tj 9000 0 Td (outside) Tj ET")
    assert texts_of(pdfs.of_pages(content)) == ["inside"]


def test_text_without_characters_that_no_caller_wrote() -> None:
    (text,) = texts_of(pdfs.of_texts("a\x02b\x01c hyphen-\nated"))
    assert not set(map(ord, text)) & {*range(10), *range(11, 32), 0xFFFE}


def test_pages_are_drawn_with_200_dots_per_inch() -> None:
    image = drawn(pdfs.of_pages(pdfs.painted("red"), size=(144, 72)))
    assert (image.mode, image.size) == ("RGB", (400, 200))


@pytest.mark.parametrize("setting", ["DOCUMENT_PAGE_PIXELS", "IMAGE_DOWNSCALE_PIXELS"])
def test_the_pixels_of_a_page_are_limited(setting: str) -> None:
    image = drawn(pdfs.of_colours("red"), environ={setting: "10000"})
    assert 9_500 <= image.width * image.height <= 10_000
    assert image.width / image.height == pytest.approx(math.sqrt(0.5), rel=0.02)


@pytest.mark.parametrize("size", [(1, 90), (90, 1), (9_000, 91), (1e-9, 1e-9), (1e9, 1e9)])
def test_a_page_of_any_size_has_few_pixels(size: tuple[float, float]) -> None:
    image = drawn(pdfs.of_pages(pdfs.painted("red"), size=size))
    assert 1 <= image.width * image.height <= 2_000_000


@pytest.mark.parametrize("size", [(1, 1e6), (1e6, 1)])
def test_a_narrow_page_is_refused(size: tuple[float, float]) -> None:
    with pytest.raises(MediaError, match=r"page 1: it is \d+ x \d+ points large, which is too narrow"):
        drawn(pdfs.of_pages(pdfs.painted("red"), size=size))


def test_other_modes() -> None:
    assert drawn(pdfs.of_colours("red"), mode="L").mode == "L"
    assert drawn(pdfs.of_colours("red"), mode=None).mode == "RGB"
    with pytest.raises(MediaError, match="image_mode is 'X'"):
        drawn(pdfs.of_colours("red"), mode="X")


@pytest.mark.parametrize("subtype", ["Stamp", "Widget /FT /Tx /T (a)"])
def test_notes_and_the_content_of_form_fields_are_drawn(subtype: str) -> None:
    note = b"<< /Type /Annot /Subtype /%b /Rect [0 0 595 842] /F 4 /AP << /N 5 0 R >> >>" % subtype.encode()
    look = pdfs.stream(b"1 0 0 rg 0 0 595 842 re f", b"/Type /XObject /Subtype /Form /BBox [0 0 595 842]")
    data = pdfs.of_pages(
        pdfs.stream(b""), page=b"/Annots [4 0 R]", more=[note, look], catalogue=b"/AcroForm << /Fields [4 0 R] >>"
    )
    assert drawn(data).getpixel((600, 800)) == (255, 0, 0)


def encrypted() -> bytes:
    """Return a document that is encrypted with RC4, but opens without a password."""

    def rc4(key: bytes, data: bytes) -> bytes:
        state, j, out = list(range(256)), 0, bytearray()
        for i in range(256):
            j = (j + state[i] + key[i % len(key)]) % 256
            state[i], state[j] = state[j], state[i]
        j = 0
        for i, byte in enumerate(data, start=1):
            j = (j + state[i % 256]) % 256
            state[i % 256], state[j] = state[j], state[i % 256]
            out.append(byte ^ state[(state[i % 256] + state[j]) % 256])
        return bytes(out)

    def md5(data: bytes, length: int) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()[:length]

    padding = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    owner = rc4(md5(padding, 5), padding)
    key = md5(padding + owner + (-4).to_bytes(4, "little", signed=True) + b"a", 5)
    content = pdfs.stream(rc4(md5(key + b"\4\0\0\0\0", 10), b"1 0 0 rg 0 0 100 100 re f"))
    entries = f"/Filter /Standard /V 1 /R 2 /P -4 /O <{owner.hex()}> /U <{rc4(key, padding).hex()}>"
    trailer = b"/ID [<61> <61>] /Encrypt << %b >>" % entries.encode()
    return hostile_pdfs.one_page(content=content, trailer=trailer)


def test_an_encrypted_document_without_a_password() -> None:
    assert drawn(encrypted()).getpixel((9, 9)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "environ", "error", "message"),
    [
        pytest.param(b"", {}, MediaError, "it is empty", id="nothing"),
        pytest.param(b"hello", {}, MediaError, "matches no known document format; accepted are PDF", id="text"),
        pytest.param(media.picture("red"), {}, MediaError, "image/png where document data is expected", id="a picture"),
        pytest.param(b"%PDF-1.7 hello", {}, MediaError, "truncated or damaged", id="damaged"),
        pytest.param(
            pdfs.of_colours("red"),
            {"MAX_DOCUMENT_BYTES": "100"},
            MediaTooLargeError,
            "MAX_DOCUMENT_BYTES=100",
            id="size",
        ),
        pytest.param(
            pdfs.of_colours("red", "red", "red"),
            {"MAX_DOCUMENT_PAGES": "2"},
            MediaTooLargeError,
            "it has 3 pages, which is more than MAX_DOCUMENT_PAGES=2 allows",
            id="pages",
        ),
        pytest.param(
            pdfs.of_colours("red"),
            {"DOCUMENT_DECODE_TIMEOUT": "0.000001"},
            MediaTooLargeError,
            "DOCUMENT_DECODE_TIMEOUT=1e-06 s",
            id="time",
        ),
    ],
)
def test_documents_beyond_a_limit(data: bytes, environ: dict[str, str], error: type[MediaError], message: str) -> None:
    with pytest.raises(error, match=message):
        drawn(data, environ=environ)


def test_text_beyond_the_limit() -> None:
    letters = pdfs.deflated(b"BT /F1 0.1 Tf " + b"(%b) Tj " % (b"a" * 1000) * (MAX_CHARACTERS // 1000 // 2 + 1) + b"ET")

    with pytest.raises(MediaTooLargeError, match="its text has more than 2,000,000 characters"):
        texts_of(pdfs.of_pages(letters, letters))


def test_the_pages_of_a_document_share_its_time() -> None:
    async def work(case: Case) -> None:
        document = await case.open(pdfs.of_colours("red"))
        assert document.seconds > 0
        document.seconds = 60.0
        with pytest.raises(
            MediaTooLargeError, match="page 1: it takes longer to decode than DOCUMENT_DECODE_TIMEOUT=60 s"
        ):
            await case.draw(document)

    run(work)


def test_a_damaged_page_is_named() -> None:
    async def work(case: Case) -> None:
        document = await case.open(pdfs.of_colours("red", "blue"))
        with pytest.raises(MediaError, match="page 3: it cannot be decoded"):
            await case.draw(document, 2)

    run(work)


def test_the_account_pays_for_pages_and_texts() -> None:
    async def work(case: Case) -> None:
        document = await case.open(pdfs.of_texts("twelve chars"), with_text=True)
        assert case.account.held == 12
        image = await case.draw(document)
        assert (case.account.held, case.account.media) == (12 + 4 * image.width * image.height, case.account.held - 12)
        case.account.give_back_media()
        assert case.account.held == 12

    run(work)


def test_documents_for_which_there_is_no_memory() -> None:
    async def work(case: Case) -> None:
        with pytest.raises(MemoryExceededError):
            await case.open(pdfs.of_colours("red"))
        assert case.memory.held == 0

    run(work, memory=DRAWING_BYTES)


def test_documents_take_turns_if_there_is_memory_for_one_page_only() -> None:
    async def work(case: Case) -> None:
        large = await case.open(pdfs.of_colours(*["red"] * 4))
        other = Document(pdfs.of_colours("blue"), PATH)
        account = case.memory.account()

        async def open_and_draw() -> None:
            await case.documents.open(other, account)
            await case.documents.draw(Page(other, 0), "RGB", account)

        await asyncio.gather(*(case.draw(large, index) for index in range(4)), open_and_draw())
        assert (case.account.brief, account.brief) == (0, 0)
        account.close()

    run(work, memory=2 * DRAWING_BYTES)


def test_pages_that_wait_for_a_process_hold_no_memory() -> None:
    async def work(case: Case) -> None:
        document = await case.open(pdfs.of_colours(*["red"] * 20))
        drawing = asyncio.gather(*(case.draw(document, index) for index in range(20)))
        most = 0
        while not drawing.done():
            most = max(most, case.account.brief)
            await asyncio.sleep(0.001)
        await drawing
        assert 0 < most < 2 * DRAWING_BYTES

    run(work, {"MEDIA_PROCESSES": "1"})


def test_requests_take_turns_to_use_a_process() -> None:
    async def work(case: Case) -> None:
        await case.open(pdfs.of_colours("red"))
        users: list[Account] = []

        async def use(request: Account) -> None:
            async with case.documents._pool.process(request):
                users.append(request)
                await asyncio.sleep(0)

        first, second = Account(case.memory), Account(case.memory)
        await asyncio.gather(*(use(request) for request in [*[first] * 5, second]))
        assert users.index(second) <= 2

    run(work, {"MEDIA_PROCESSES": "1"})


def test_a_cancelled_request_ends_its_drawing() -> None:
    (slow,) = (file for file in hostile_pdfs.drawings() if file.name == "tiles every 0.0001 points")

    async def work(case: Case) -> None:
        document = await case.open(slow.data)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await case.draw(document)
        assert case.memory.held == 0
        await case.draw(await case.open(pdfs.of_colours("red")))

    run(work)


# ---- Hostile documents

HOSTILE = list(hostile_pdfs.files())
MEMORY_BYTES = 1 << 30
"""The most memory that a process may use: the shared memory, PDFium, and DOCUMENT_BYTES."""


async def outcome(case: Case, file: File) -> str:
    """Open a hostile document, read its text, and draw its first page. Return what is wrong with the answer."""
    try:
        image = await case.draw(await case.open(file.data, with_text=True))
    except MediaError as error:
        return "" if error.status in (400, 413) and str(error) else f"{file.name}: {error!r}"
    if image.width * image.height > 2_000_000 or not file.may_pass:
        return f"{file.name}: an image of {image.size}"
    return ""


def peaks() -> list[int]:
    """Return the peak memory of the decoder processes, in bytes."""
    peaks = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess, OSError, ValueError):
            if "pypdfium2" in child.cmdline():
                status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peaks += [1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return peaks


async def watched(case: Case) -> tuple[list[str], int]:
    """Send all files, and return the wrong answers and the peak memory of a process."""
    highest = 0

    async def watch() -> None:
        nonlocal highest
        while True:
            highest = max(highest, *peaks(), 0)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    wrong = [await outcome(case, file) for file in HOSTILE]
    watching.cancel()
    case.account.close()
    assert case.memory.held == 0
    return [text for text in wrong if text], highest


def test_hostile_documents() -> None:
    assert len({file.name for file in HOSTILE}) == len(HOSTILE) >= 60
    wrong, highest = run(watched, {"DOCUMENT_DECODE_TIMEOUT": "1"})
    assert not wrong
    assert 0 < highest < MEMORY_BYTES
