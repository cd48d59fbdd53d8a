import asyncio
import json

import pytest

from worker.request.asgi import App, Message, Receive, Request, Send, exchange
from worker.request.rewrite import is_json, rewriting, with_body


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """Answer with the body and the headers that arrive."""
    message = await receive()
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer = json.dumps({"body": message.get("body", b"").decode(), "headers": headers}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer})


async def to_text(scope: Message, body: bytes) -> tuple[Message, bytes]:
    return with_body(scope, body.upper(), "text/plain")


async def call(app: App, method: str, body: bytes) -> dict[str, object]:
    request = Request(method, "/", headers={"content-type": "application/json", "content-length": "2"}, body=body)
    async with exchange(app, request) as response:
        answer: dict[str, object] = json.loads(await response.read_all())
        return answer


def test_the_app_gets_the_new_body_and_headers_that_describe_it() -> None:
    answer = asyncio.run(call(rewriting(echo, to_text), "POST", b"abc"))
    assert answer == {"body": "ABC", "headers": {"content-type": "text/plain", "content-length": "3"}}


def test_a_get_request_is_left_as_it_is() -> None:
    assert asyncio.run(call(rewriting(echo, to_text), "GET", b"ab"))["body"] == "ab"


def test_the_app_sees_a_disconnect_after_the_body() -> None:
    seen: list[str] = []

    async def wait(_scope: Message, receive: Receive, send: Send) -> None:
        seen.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append((await receive())["type"])

    async def leave() -> None:
        async with exchange(rewriting(wait, to_text), Request("POST", "/", body=b"abc")):
            pass

    asyncio.run(leave())
    assert seen == ["http.request", "http.disconnect"]


def test_a_client_that_leaves_before_its_body_is_complete_reaches_the_app() -> None:
    seen: list[str] = []

    async def app(_scope: Message, receive: Receive, _send: Send) -> None:
        seen.append((await receive())["type"])

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        raise AssertionError("nobody takes a response")

    async def request() -> None:
        await rewriting(app, to_text)(Request("POST", "/").scope(), receive, send)

    asyncio.run(request())
    assert seen == ["http.disconnect"]


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        pytest.param("", True, id="no content type"),
        pytest.param("Application/JSON; charset=utf-8", True, id="JSON with a charset"),
        pytest.param("application/problem+json", True, id="a JSON format"),
        pytest.param("multipart/form-data; boundary=x", False, id="a form"),
    ],
)
def test_json_is_recognised_by_the_content_type(content_type: str, expected: bool) -> None:
    assert is_json(Request("POST", "/", headers={"content-type": content_type}).scope()) == expected
