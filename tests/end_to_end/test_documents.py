"""Documents through every API of the real engine, from the queue and over HTTP, streaming and not.

The embedded model names the colours of pages, in their order.
"""

from typing import Any

import httpx
import openai
import pytest

from tests.conftest import API_KEY, HttpWorker
from tests.end_to_end.test_multimodal import CHAT, TEXT, ask, both_ways, error_of
from tests.support import hostile_pdfs, media, pdfs
from tests.support.links import Server

Part = dict[str, Any]
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
COLOURS = "|".join(media.COLOURS)


def data_part(route: str, data: bytes) -> Part:
    url = media.data_url(data, "application/pdf")
    match route:
        case "/v1/responses":
            return {"type": "input_file", "file_data": url, "filename": "a.pdf"}
        case "/v1/messages":
            source = {"type": "base64", "media_type": "application/pdf", "data": media.encoded(data)}
            return {"type": "document", "source": source}
        case _:
            return {"type": "file", "file": {"file_data": url, "filename": "a.pdf"}}


def link_part(route: str, url: str) -> Part:
    match route:
        case "/v1/responses":
            return {"type": "input_file", "file_url": url}
        case "/v1/messages":
            return {"type": "document", "source": {"type": "url", "url": url}}
        case _:
            return {"type": "file", "file": {"file_url": url}}


def turn(route: str, *parts: Part, text: str = "What do you see?") -> Part:
    return {"role": "user", "content": [*parts, {"type": TEXT[route], "text": text}]}


@both_ways
@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_pages_are_named(api: httpx.Client, links: Server, route: str, stream: bool) -> None:
    one = data_part(route, pdfs.of_colours("red"))
    assert ask(api, route, [turn(route, one)], stream) == "The image is red."
    three = link_part(route, f"{links.url}/document/green-blue-yellow")
    assert ask(api, route, [turn(route, three)], stream) == "The images are green, blue and yellow."


@pytest.mark.parametrize("colour", ["green", "yellow", "black"])
def test_page_3_of_5_is_found(api: httpx.Client, colour: str) -> None:
    part = data_part(CHAT, pdfs.of_colours("red", "cyan", colour, "orange", "purple"))
    pattern = f"The images are ({COLOURS}), ({COLOURS}), ({COLOURS})\\."
    body = {
        "model": "tiny",
        "messages": [turn(CHAT, part, text="Which colours are these images?")],
        "structured_outputs": {"regex": pattern},
    }
    answer = api.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    assert answer == f"The images are red, cyan, {colour}."


def test_the_text_of_a_page_reaches_the_model(http_worker: HttpWorker) -> None:
    part = data_part(CHAT, pdfs.of_texts("First", "Second", "Third", "Fourth", "Fifth"))
    part["file"]["detail"] = "text"
    with http_worker.client() as client:
        tokens = client.post("/tokenize", json={"model": "tiny", "messages": [turn(CHAT, part)]}).json()["tokens"]
        prompt = client.post("/detokenize", json={"model": "tiny", "tokens": tokens}).json()["prompt"]
    # The template of this model puts the images before all texts.
    assert prompt.count("<|image_pad|>") == 5
    assert "First\nSecond\nThird\nFourth\nFifth\nWhat do you see?" in prompt


def test_the_client_of_openai(http_worker: HttpWorker) -> None:
    url = media.data_url(pdfs.of_colours("blue"), "application/pdf")
    with openai.OpenAI(base_url=f"{http_worker.url}/v1", api_key=API_KEY) as client:
        chat = client.chat.completions.create(
            model="tiny",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "file", "file": {"file_data": url, "filename": "a.pdf"}},
                        {"type": "text", "text": "What is this?"},
                    ],
                }
            ],
        )
        response = client.responses.create(
            model="tiny",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_file", "file_data": url, "filename": "a.pdf"},
                        {"type": "input_text", "text": "What is this?"},
                    ],
                }
            ],
        )
    assert chat.choices[0].message.content == response.output_text == "The image is blue."


def test_documents_and_images_together(api: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": media.image_url("green")}}
    parts = [data_part(CHAT, pdfs.of_colours("red")), image]
    assert ask(api, CHAT, [turn(CHAT, *parts)]) == "The images are red and green."
    assert ask(api, CHAT, [turn(CHAT, *reversed(parts))]) == "The images are green and red."


def test_the_error_names_the_part(api: httpx.Client) -> None:
    text = {"type": "text", "text": "?"}
    for data, status, message in (
        (
            pdfs.of_colours(*["red"] * 6),
            400,
            "it has 6 pages, each of which counts as an image; a request may have at most 5",
        ),
        (b"%PDF-1.7 nothing", 400, "it cannot be decoded"),
    ):
        code, error = error_of(api, CHAT, [turn(CHAT, text, data_part(CHAT, data))])
        assert (code, error["param"]) == (status, "messages[0].content[1]")
        assert error["message"].startswith(f"messages[0].content[1], a document: {message}")


HOSTILE = (
    "a password", "a page 100,000 times", "a content of 1 GB, compressed", "a page of 1 x 1e+06 points", "20¹² forms",
    "a button with a script", "a font of 1 GB", "a form that draws itself",
)  # fmt: skip


def test_hostile_documents_do_not_stop_the_worker(http_worker: HttpWorker) -> None:
    files = {file.name: file for file in hostile_pdfs.files()}
    with http_worker.client() as client:
        for name in HOSTILE:
            body = {"model": "tiny", "messages": [turn(CHAT, data_part(CHAT, files[name].data))], "max_tokens": 5}
            answer = client.post(CHAT, json=body)
            # The drawing of some takes longer than REQUEST_TIMEOUT.
            assert answer.status_code in ((200, 400, 413, 504) if files[name].may_pass else (400, 413)), (
                name,
                answer.text,
            )
            assert "messages[0].content[0]" in answer.text or answer.status_code in (200, 504), (name, answer.text)
        assert ask(client, CHAT, [turn(CHAT, data_part(CHAT, pdfs.of_colours("red")))]) == "The image is red."
