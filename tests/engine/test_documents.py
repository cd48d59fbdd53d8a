"""Documents in requests: what vLLM gets in their place, and what is refused. No engine runs."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from tests.support import hostile_pdfs, media, pdfs
from tests.support.links import Server
from worker import settings
from worker.engine import patches
from worker.engine.connector import Guard
from worker.engine.documents import MAX_DOCUMENTS, rewriting_documents
from worker.engine.media_errors import RejectedMediaError
from worker.errors import JobError
from worker.media.documents import current_pages
from worker.memory import Budget
from worker.request.asgi import Message, Receive, Send
from worker.request.pipeline import BodyBudget
from worker.request.rewrite import rewriting
from worker.settings.environment import MEDIA_CONNECTOR
from worker.telemetry.usage import Usage, current_usage

ENVIRONMENT = {"MEDIA_ALLOW_PRIVATE_NETWORKS": "true", "MEDIA_PROCESSES": "1"}
SCOPE = {"type": "http", "method": "POST", "state": {}, "headers": [(b"content-type", b"application/json")]}
Part = dict[str, Any]

TEXTS = pdfs.of_texts("One", "Two")
URL = media.data_url(TEXTS, "application/pdf")
BASE64 = media.encoded(TEXTS)


async def rewritten(
    body: bytes, limit: int = 100, then: Callable[[Any], Any] | None = None, environ: dict[str, str] | None = None
) -> tuple[bytes, Any]:
    """Return the body that vLLM gets, and what `then` returns for vLLM's media connector."""
    guard = Guard(settings.read({**ENVIRONMENT, **(environ or {})}), Budget(4 << 30))
    patches.install(guard)
    async with aclosing(guard):
        _, new_body = await rewriting_documents(guard, limit)(SCOPE, body)
        connector = MEDIA_CONNECTOR_REGISTRY.load(MEDIA_CONNECTOR, media_io_kwargs={})
        return new_body, await then(connector) if then else None


def rewrite(body: Any, limit: int = 100) -> Any:
    return json.loads(asyncio.run(rewritten(json.dumps(body).encode(), limit))[0])


def chat(*parts: Part) -> Any:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def content(parts: list[Part], limit: int = 100) -> Any:
    return rewrite(chat(*parts), limit)["messages"][0]["content"]


def refused(body: Any, limit: int = 100) -> JobError:
    with pytest.raises(JobError) as caught:
        rewrite(body, limit)
    return caught.value


def file_part(data: bytes = TEXTS, **fields: Any) -> Part:
    return {"type": "file", "file": {"file_data": media.data_url(data, "application/pdf"), **fields}}


def is_page(url: str, index: int) -> bool:
    return url.startswith("document-page:") and url.endswith(f":{index}")


QUESTION = {"type": "text", "text": "What is this?"}


# ---- What vLLM gets


@pytest.mark.parametrize(
    ("part", "image", "text"),
    [
        pytest.param(
            {"type": "file", "file": {"file_data": URL, "filename": "a.pdf"}},
            lambda part: part["image_url"]["url"],
            {"type": "text"},
            id="a chat",
        ),
        pytest.param(
            {"type": "file", "file": {"file_data": BASE64}},
            lambda part: part["image_url"]["url"],
            {"type": "text"},
            id="a chat with plain base64",
        ),
        pytest.param(
            {"type": "input_file", "file_data": URL, "filename": "a.pdf"},
            lambda part: part["image_url"],
            {"type": "input_text"},
            id="a response",
        ),
        pytest.param(
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": BASE64}},
            lambda part: part["source"]["url"],
            {"type": "text"},
            id="Anthropic's messages",
        ),
    ],
)
def test_pages_take_the_place_of_a_document(part: Part, image: Callable[[Part], str], text: Part) -> None:
    first, second, question = content([part, QUESTION])
    assert is_page(image(first), 0)
    assert is_page(image(second), 1)
    assert question == QUESTION
    detailed = {**part, "detail": "text"}
    first, one, second, two, question = content([detailed, QUESTION])
    assert is_page(image(first), 0)
    assert is_page(image(second), 1)
    assert (one, two) == ({**text, "text": "One"}, {**text, "text": "Two"})


def test_detail_may_stand_beside_the_data() -> None:
    assert len(content([file_part(detail="text")])) == 4
    assert len(content([file_part(detail="high")])) == 2


def test_a_model_without_images_gets_the_texts() -> None:
    assert content([file_part(), QUESTION], limit=0) == [
        {"type": "text", "text": "One"},
        {"type": "text", "text": "Two"},
        QUESTION,
    ]
    error = refused(chat(QUESTION, file_part(pdfs.of_colours("red"))), limit=0)
    assert (error.status, error.param) == (400, "messages[0].content[1]")
    assert "the model takes no images, and the pages contain no text" in str(error)


def test_links(server: Server) -> None:
    url = f"{server.url}/document/red-green"
    for part in (
        {"type": "file", "file": {"file_url": url}},
        {"type": "input_file", "file_url": url},
        {"type": "document", "source": {"type": "url", "url": url}},
    ):
        assert len(content([part, QUESTION])) == 3


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param({"type": "text", "data": "Hi"}, [{"type": "text", "text": "Hi"}], id="text"),
        pytest.param({"type": "content", "content": "Hi"}, [{"type": "text", "text": "Hi"}], id="a string"),
        pytest.param({"type": "content", "content": [QUESTION]}, [QUESTION], id="parts"),
    ],
)
def test_documents_of_anthropics_api_without_a_file(source: Part, expected: list[Part]) -> None:
    assert content([{"type": "document", "source": source}]) == expected


def test_documents_in_every_place() -> None:
    result = {"type": "tool_result", "content": [{"type": "document", "source": {"type": "url", "url": URL}}]}
    (rewritten_result,) = content([result])
    assert [part["type"] for part in rewritten_result["content"]] == ["image", "image"]
    output = {"type": "function_call_output", "output": [{"type": "input_file", "file_data": URL}]}
    assert len(rewrite({"input": [output]})["input"][0]["output"]) == 2
    assert len(rewrite({"data_1": {"content": [file_part()]}})["data_1"]["content"]) == 2
    conversations = rewrite({"messages": [[{"role": "user", "content": [file_part()]}]] * 2})["messages"]
    assert [len(conversation[0]["content"]) for conversation in conversations] == [2, 2]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"messages": [{"content": "a document and a file"}]}', id="no document"),
        pytest.param(b'{"messages": [{"content": "the word \\"file\\" in a text"}], "x": "file"}', id="the word alone"),
        pytest.param(b'{"tools": [{"input": {"type": "document"}}], "messages": 5, "input": null}', id="another place"),
        pytest.param(b'{"type": "file"', id="no JSON"),
        pytest.param(b'["file"]', id="a list"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_other_requests_stay_as_they_are(body: bytes) -> None:
    assert asyncio.run(rewritten(body))[0] is body


def test_bodies_that_are_no_strict_json() -> None:
    body = json.dumps(chat(file_part(), QUESTION)).encode()
    for extra in (b'"x": NaN', rb'"x": "\ud800"'):
        new_body, _ = asyncio.run(rewritten(body[:-1] + b", " + extra + b"}"))
        assert extra in new_body
        assert len(json.loads(new_body)["messages"][0]["content"]) == 3
    new_body, _ = asyncio.run(rewritten(b"\xef\xbb\xbf" + body))
    assert len(json.loads(new_body)["messages"][0]["content"]) == 3


# ---- What is refused


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        pytest.param({"type": "file", "file": {"file_id": "a"}}, 400, "the worker stores no files", id="a file's id"),
        pytest.param(
            {"type": "document", "source": {"type": "file", "file_id": "a"}}, 400, "stores no files", id="ids"
        ),
        pytest.param({"type": "file"}, 400, "its field 'file' must be an object", id="no file"),
        pytest.param({"type": "file", "file": {"file_data": 5}}, 400, "must have either 'file_data'", id="no data"),
        pytest.param(
            {"type": "input_file", "file_data": URL, "file_url": "https://a"},
            400,
            "must have either",
            id="data and a link",
        ),
        pytest.param(file_part(detail="txt"), 400, "'detail' must be one of 'auto', 'low'", id="an unknown detail"),
        pytest.param(file_part(b"hello"), 400, "no known document format; accepted are PDF", id="text"),
        pytest.param({"type": "file", "file": {"file_data": "%"}}, 400, "its data is not valid base64", id="no base64"),
        pytest.param({"type": "file", "file": {"file_url": "ftp://a"}}, 403, "only https:", id="another scheme"),
        pytest.param({"type": "file", "file": {"file_url": "file:///etc/passwd"}}, 403, "file: links are", id="a path"),
        pytest.param(
            {"type": "file", "file": {"file_url": "http://127.0.0.1:1/"}}, 424, "cannot be reached", id="no server"
        ),
    ],
)
def test_parts_that_are_refused(part: Part, status: int, message: str) -> None:
    usage = Usage()
    token = current_usage.set(usage)
    error = refused(chat(QUESTION, part))
    current_usage.reset(token)
    assert (error.status, error.param) == (status, "messages[0].content[1]")
    assert str(error).startswith("messages[0].content[1], a document: ")
    assert message in str(error)
    assert len(usage.rejections) == 1


def test_more_pages_than_images_are_refused() -> None:
    picture = {"type": "image_url", "image_url": {"url": media.image_url("red")}}
    error = refused(chat(picture, file_part(), file_part()), limit=4)
    assert (error.status, error.param) == (400, "messages[0].content[2]")
    assert "it has 2 pages, each of which counts as an image" in str(error)
    assert "at most 4 images; a higher IMAGE_LIMIT allows more" in str(error)
    assert len(content([picture, file_part(), file_part()], limit=5)) == 5


def test_the_limit_for_images_is_for_each_conversation_of_a_batch() -> None:
    body = {"messages": [[{"role": "user", "content": [file_part()]}]] * 3}
    assert len(rewrite(body, limit=2)["messages"]) == 3


def test_too_many_documents_are_refused() -> None:
    error = refused(chat(*[file_part()] * (MAX_DOCUMENTS + 1)))
    assert (error.status, error.param) == (400, f"messages[0].content[{MAX_DOCUMENTS}]")


def test_a_client_that_disconnects_while_a_document_loads(server: Server) -> None:
    async def app(_scope: Message, _receive: Receive, _send: Send) -> None:
        raise AssertionError("nobody waits for an answer")

    async def send(_message: Message) -> None:
        raise AssertionError("nobody takes a response")

    async def main() -> None:
        memory = Budget(4 << 30)
        guard = Guard(settings.read(ENVIRONMENT), memory)
        part = {"type": "file", "file": {"file_url": f"{server.url}/drip"}}
        messages: list[Message] = [{"type": "http.request", "body": json.dumps(chat(part)).encode()}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            while not server.hits:  # noqa: ASYNC110 - until the link is being fetched
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async with aclosing(guard):
            layers = BodyBudget(rewriting(app, rewriting_documents(guard, 100)), memory)
            await layers({**SCOPE, "path": "/"}, receive, send)
            assert memory.held == 0

    asyncio.run(main())


# ---- What the connector returns


async def loaded(data: bytes, *links: str, **environ: str) -> list[Any]:
    """Return the pages of a document as vLLM's connector loads them, and then other links, or the exceptions."""

    async def then(connector: Any) -> list[Any]:
        loads = [connector.fetch_image_async(url) for url in [*(page.url for page in current_pages.get()), *links]]
        return await asyncio.gather(*loads, return_exceptions=True)

    body = json.dumps(chat(QUESTION, file_part(data))).encode()
    return list((await rewritten(body, then=then, environ=environ))[1])


def test_the_connector_draws_pages() -> None:
    data = pdfs.of_colours("red", "blue")
    red, blue = asyncio.run(loaded(data))
    assert [page.media.getpixel((9, 9))[::2] for page in (red, blue)] == [(243, 12), (12, 243)]
    again, _ = asyncio.run(loaded(data))
    assert again.original_bytes == red.original_bytes != blue.original_bytes
    assert len(red.original_bytes) < 200


def test_callers_cannot_name_pages() -> None:
    _, error = asyncio.run(loaded(pdfs.of_colours("red"), "document-page:abc:0"))
    assert isinstance(error, RejectedMediaError)
    assert (error.error.status, "only https:" in str(error)) == (403, True)


def test_an_error_about_a_page_names_the_document() -> None:
    (slow,) = (file for file in hostile_pdfs.drawings() if file.name == "tiles every 0.0001 points")

    (error,) = asyncio.run(loaded(slow.data, DOCUMENT_DECODE_TIMEOUT="1"))
    assert isinstance(error, RejectedMediaError)
    assert (error.error.status, error.error.param) == (413, "messages[0].content[1]")
    assert str(error).startswith("messages[0].content[1], a document: page 1: it takes longer")
