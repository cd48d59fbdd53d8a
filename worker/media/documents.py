"""Opens documents and draws their pages in processes of their own, which start with the first document."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image

from worker.errors import MediaError, MediaTooLargeError
from worker.media.checks import Limits, check_kind, check_size
from worker.media.decoders import KEPT_PIXEL_BYTES, check_mode
from worker.media.pool import Pool, Process
from worker.memory import Account
from worker.telemetry.usage import rejected
from worker.threads import Result

DRAWING_BYTES = 64 << 20
"""What drawing a page usually needs besides its file and its pixels. An A4 page that was scanned with 600 dots per inch
needs 50 MB. The limit for a process is higher: DOCUMENT_BYTES in `decoder_documents.py`."""


class Document:
    """An opened document of one request."""

    def __init__(self, data: bytes, path: str, *, with_text: bool = False) -> None:
        self.data = data
        self.path = path
        """Its part of the request, such as `messages[0].content[1]`."""
        self.with_text = with_text
        """Whether the texts of its pages are needed."""
        self.seconds = 0.0
        """The time that its pages have taken so far."""
        self.pages = 0
        self.texts: list[str] = []
        """The text of each page, if they are needed."""
        self.waiting = asyncio.Lock()
        """Held by the page that waits for memory: so one document cannot fill the queue of those who wait."""
        self.token = secrets.token_hex(16)
        self.digest = hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Page:
    """A page of a document."""

    document: Document
    index: int

    @property
    def url(self) -> str:
        """The reference to it, which takes the place of an image's URL in the request. Nobody can guess it."""
        return f"document-page:{self.document.token}:{self.index}"

    @property
    def key(self) -> str:
        """Cache key of its content."""
        return f"{self.document.digest}:{self.index}"


current_pages: ContextVar[Sequence[Page]] = ContextVar("current_pages", default=())
"""The pages of the current request. They exist as long as its tasks do."""


class Documents:
    """Opens documents. The account of the request pays for the memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pages: WeakValueDictionary[str, Page] = WeakValueDictionary()
        self._pool = Pool(limits.processes, self._start)

    def _start(self) -> Process:
        pixels = KEPT_PIXEL_BYTES * self._limits.page_pixels
        return Process(max(pixels, int(self._limits.bytes["document"].value)), ("pypdfium2",))

    def keep(self, pages: Sequence[Page]) -> None:
        """Keep pages until the current request ends."""
        current_pages.set(pages)
        self._pages.update((page.url, page) for page in pages)

    def page(self, url: str) -> Page | None:
        """Return the page for a reference, or None. Some of vLLM's threads do not know the request."""
        return self._pages.get(url)

    async def open(self, document: Document, account: Account) -> None:
        """Count the pages, and read their texts if they are needed.

        Raises:
            MediaError: the file is no document, is damaged, or exceeds a limit.
            MemoryExceededError: the request has no memory left for it.
            MemoryBusyError: the other requests leave no memory.
        """
        check_size(len(document.data), self._limits.bytes["document"])
        check_kind(document.data, "document")
        most = self._limits.document_pages
        request = ("open_document", int(most.value), document.with_text)
        pages, texts = await self._run(document, account, _pages, *request)
        if pages > most.value:
            raise MediaTooLargeError(f"it has {pages} pages, which is more than {most} allows")
        await account.take(sum(map(len, texts)))
        document.pages, document.texts = pages, texts

    async def draw(self, page: Page, mode: str | None, account: Account) -> Image.Image:
        """Draw a page as an image in one of Pillow's modes; None: RGB. Raises the same errors."""
        check_mode(mode)
        request = ("draw_page", page.index, self._limits.page_pixels)
        try:
            image = await self._run(page.document, account, _image, *request)
        except MediaError as error:
            raise type(error)(f"page {page.index + 1}: {error}") from None
        return image if mode in (None, image.mode) else image.convert(mode)

    async def _run(
        self, document: Document, account: Account, read: Callable[[Process, Any], Result], *request: object
    ) -> Result:
        """Have a process run an operation, and return what `read` makes of its result."""
        # The file is also in the memory that is shared with the process, and once more in the process.
        # The pixels are in the shared memory too.
        size = DRAWING_BYTES + 2 * len(document.data) + 2 * KEPT_PIXEL_BYTES * self._limits.page_pixels

        async def work(process: Process) -> Result:
            return await self._pool.in_thread(self._request, process, document, read, *request)

        async with self._pool.process(account) as process:
            if account.has_room(size):
                async with _memory(account, size) as keep:
                    return keep(await work(process))
        # While it waits for memory, others may use the process.
        async with document.waiting, _memory(account, size) as keep, self._pool.process(account) as process:
            return keep(await work(process))

    def _request(
        self,
        process: Process,
        document: Document,
        read: Callable[[Process, Any], Result],
        operation: str,
        *arguments: object,
    ) -> Result:
        process.begin(document.data, self._limits.document_seconds, document.seconds)
        began = time.monotonic()
        try:
            return read(process, process.request(operation, len(document.data), *arguments))
        finally:
            document.seconds += time.monotonic() - began

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


@asynccontextmanager
async def _memory(account: Account, size: int) -> AsyncIterator[Callable[[Result], Result]]:
    """Reserve memory while the block runs. The block gets a function that keeps the memory for an image."""
    kept = 0

    def keep(result: Result) -> Result:
        nonlocal kept
        if isinstance(result, Image.Image):
            kept = KEPT_PIXEL_BYTES * result.width * result.height
        return result

    await account.take_media(size, is_brief=True)
    try:
        yield keep
    finally:
        account.keep_media(size, kept)


def _pages(_process: Process, result: Any) -> tuple[int, list[str]]:
    pages, texts = result
    return pages, texts


def _image(process: Process, size: Any) -> Image.Image:
    width, height = size
    return Image.frombytes("RGB", (width, height), process.result(KEPT_PIXEL_BYTES * width * height), "raw", "RGBX")


def located(error: MediaError, path: str) -> MediaError:
    """Return an error about a document that names its part of the request, and count it."""
    return rejected(type(error)(f"{path}, a document: {error}.", param=path))
