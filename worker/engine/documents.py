"""Documents in requests: before vLLM parses a body, each document part becomes its pages as images, texts, or both."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from worker.engine.connector import Guard, as_media_errors
from worker.errors import Json, MediaError
from worker.media.documents import Document, Page, located
from worker.media.parts import KEYS
from worker.request.asgi import Message
from worker.request.rewrite import Rewrite, is_json, with_body

MAX_DOCUMENTS = 32
"""How many documents a request may have."""
DETAILS = ("auto", "low", "high", "text")
"""The accepted values of `detail`. Only `text` has an effect."""
PDF = "application/pdf"
PART_TYPES = tuple(f'"{name}"'.encode() for name in KEYS["document"])
"""The types of document parts as JSON. A body without any of these has no documents."""
SMALL_BODY_BYTES = 100_000
"""A body of up to this size is searched for each of PART_TYPES in turn."""
MAX_QUOTES = 1000
"""In a larger body, PART_TYPES are compared at its first quotes only, up to this many. The rest is searched in turn."""


class Api(NamedTuple):
    """How an API writes documents, images and texts."""

    source: str | None
    """The field of a document part that holds its file; None: the part itself does."""
    data: str
    """The field with a `data:` URL or base64."""
    link: str
    """The field with a link."""
    image: Callable[[str], Json]
    text: Callable[[str], Json]


APIS: Mapping[str, Api] = {
    "file": Api(
        "file",
        "file_data",
        "file_url",
        lambda url: {"type": "image_url", "image_url": {"url": url}},
        lambda text: {"type": "text", "text": text},
    ),
    "input_file": Api(
        None,
        "file_data",
        "file_url",
        lambda url: {"type": "input_image", "image_url": url, "detail": "auto"},
        lambda text: {"type": "input_text", "text": text},
    ),
    "document": Api(
        "source",
        "data",
        "url",
        lambda url: {"type": "image", "source": {"type": "url", "url": url}},
        lambda text: {"type": "text", "text": text},
    ),
}
"""The APIs by the type of their document parts: chats, responses, and Anthropic's messages."""


@dataclass(frozen=True, slots=True)
class Part:
    """A document part of a request."""

    value: Json
    path: str
    siblings: list[Any]
    """The list that contains it."""
    index: int
    prompt: str
    """The path of the prompt that it belongs to: a request may have several."""


class Request:
    """The parsed body of a request, and its documents."""

    def __init__(self, body: bytes) -> None:
        self._encode: Callable[[Any], bytes] = msgspec.json.encode
        try:
            self.body = msgspec.json.decode(body)
        except ValueError:
            # NaN, a byte order mark and half of a surrogate pair are no JSON for msgspec, but they are for vLLM.
            self._encode = _dumped
            self.body = _loaded(body)
        self.parts: list[Part] = []
        self.images: Counter[str] = Counter()
        """The number of images in each prompt."""
        for prompt, value in _prompts(self.body):
            for path, siblings in _contents(prompt, value):
                self._add(prompt, path, siblings)

    def _add(self, prompt: str, path: str, siblings: list[Any]) -> None:
        for index, value in enumerate(siblings):
            if isinstance(value, dict) and value.get("type") in APIS:
                self.parts.append(Part(value, f"{path}[{index}]", siblings, index, prompt))
            elif isinstance(value, dict) and value.get("type") in KEYS["image"]:
                self.images[prompt] += 1

    def replace(self, replacements: Iterable[list[Json]]) -> bytes:
        """Replace the documents, and return the new body."""
        # The last one first: a replacement moves what comes after it.
        for part, replacement in reversed([*zip(self.parts, replacements, strict=True)]):
            part.siblings[part.index : part.index + 1] = replacement
        return self._encode(self.body)


def rewriting_documents(guard: Guard, image_limit: int) -> Rewrite:
    """Return the function that replaces documents. A prompt may have `image_limit` images; 0: only texts."""

    async def rewrite(scope: Message, body: bytes) -> tuple[Message, bytes]:
        if not _may_have_documents(body) or not is_json(scope):
            return scope, body
        in_thread = guard.decoders.pool.in_thread
        request = await in_thread(Request, body)
        if not request.parts:
            return scope, body
        if len(request.parts) > MAX_DOCUMENTS:
            too_many = MediaError(f"a request may have at most {MAX_DOCUMENTS} documents")
            raise located(too_many, request.parts[MAX_DOCUMENTS].path)
        loads = [_load(part, guard, with_text=not image_limit) for part in request.parts]
        loaded = await asyncio.gather(*loads, return_exceptions=True)
        pages: list[Page] = []
        replacements = []
        for part, content in zip(request.parts, loaded, strict=True):
            if isinstance(content, BaseException):
                raise content
            replacements.append(_replacement(part, content, request.images, image_limit, pages))
        guard.documents.keep(pages)
        return with_body(scope, await in_thread(request.replace, replacements), "application/json")

    return rewrite


def _loaded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _dumped(body: Any) -> bytes:
    return json.dumps(body).encode()


def _may_have_documents(body: bytes) -> bool:
    """Tell whether a body contains one of `PART_TYPES`. Base64 has no quotes, so it is skipped quickly."""
    start = 0
    for _ in range(MAX_QUOTES if len(body) > SMALL_BODY_BYTES else 0):
        if (start := body.find(b'"', start)) < 0:
            return False
        if body.startswith(PART_TYPES, start):
            return True
        start += 1
    return any(body.find(part_type, start) >= 0 for part_type in PART_TYPES)


async def _load(part: Part, guard: Guard, *, with_text: bool) -> Document | list[Json]:
    """Open a document. A part of Anthropic's API that contains no file is returned as the parts that it stands for."""
    api = APIS[part.value["type"]]
    try:
        fields = part.value.get(api.source) if api.source else part.value
        if not isinstance(fields, dict):
            raise MediaError(f"its field {api.source!r} must be an object")
        if api.source == "source" and (inline := _inline(fields)) is not None:
            return inline
        detail = fields.get("detail", part.value.get("detail", "auto"))
        if detail not in DETAILS:
            raise MediaError(f"its field 'detail' must be one of {', '.join(map(repr, DETAILS))}")
        with guard.account() as account, as_media_errors():
            data = await guard.file(_link(fields, api), "document", account)
            # It is needed until the request ends, while other files are freed when the engine has the request.
            account.give_back_media(len(data))
            await account.take(len(data))
            # In a thread: it computes a hash of the file.
            new = partial(Document, data, part.path, with_text=with_text or detail == "text")
            document = await guard.decoders.pool.in_thread(new)
            await guard.documents.open(document, account)
            return document
    except MediaError as error:
        raise located(error, part.path) from None


def _inline(source: Json) -> list[Json] | None:
    """Return the parts in a source of Anthropic's API, or None if it is a file."""
    text, content = source.get("data"), source.get("content")
    if source.get("type") == "text" and isinstance(text, str):
        return [{"type": "text", "text": text}]
    if source.get("type") == "content" and isinstance(content, str | list):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return None


def _link(fields: Json, api: Api) -> str:
    """Return the URL of a document; base64 becomes a `data:` URL."""
    if fields.get("file_id") is not None:
        raise MediaError(f"the worker stores no files, so it knows no 'file_id'; send {api.data!r} or {api.link!r}")
    data, link = fields.get(api.data), fields.get(api.link)
    if isinstance(data, str) and data and link is None:
        return data if data[:5].lower() == "data:" else f"data:{PDF};base64,{data}"
    if isinstance(link, str) and link and data is None:
        return link
    raise MediaError(f"it must have either {api.data!r}, a data: URL or base64, or {api.link!r}, a link")


def _replacement(
    part: Part, content: Document | list[Json], images: Counter[str], image_limit: int, pages: list[Page]
) -> list[Json]:
    """Return the parts that take the place of a document, and add its pages to `pages`."""
    if isinstance(content, list):
        return content
    api, document = APIS[part.value["type"]], content
    texts = [[api.text(text)] if text else [] for text in document.texts]
    if not image_limit:
        if not any(texts):
            raise located(MediaError("the model takes no images, and the pages contain no text"), part.path)
        return [*chain.from_iterable(texts)]
    images[part.prompt] += document.pages
    if images[part.prompt] > image_limit:
        reason = (
            f"it has {document.pages} pages, each of which counts as an image; a request may have at most "
            f"{image_limit} images; a higher IMAGE_LIMIT allows more"
        )
        raise located(MediaError(reason), part.path)
    replacement = []
    for index in range(document.pages):
        page = Page(document, index)
        pages.append(page)
        replacement += [api.image(page.url), *(texts[index] if texts else [])]
    return replacement


def _prompts(body: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each prompt in a body."""
    for key, value in body.items() if isinstance(body, dict) else ():
        is_list = isinstance(value, list)
        if is_list and (key not in ("messages", "input") or any(isinstance(item, list) for item in value[:1])):
            yield from ((f"{key}[{index}]", item) for index, item in enumerate(value))
        else:
            yield key, value


def _contents(path: str, value: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yield the path and the value of each list of parts in a message, or in a list of messages."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _contents(f"{path}[{index}]", item)
    elif isinstance(value, dict):
        for key in ("content", "output"):
            if isinstance(parts := value.get(key), list):
                yield f"{path}.{key}", parts
                yield from _contents(f"{path}.{key}", parts)
