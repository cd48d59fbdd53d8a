import asyncio
import json

import pytest

from worker.request.asgi import App, ClientDisconnectedError, Message, Receive, Request, Send, exchange
from worker.request.rewrite import is_json, rewriting, unless_disconnected, with_body


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


class Client:
    """A client that disconnects when it is told to."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.asked = asyncio.Event()

    async def receive(self) -> Message:
        self.asked.set()
        await self.gone.wait()
        return {"type": "http.disconnect"}


def test_a_client_that_leaves_during_the_rewrite_ends_it_and_reaches_no_app() -> None:
    ended: list[str] = []

    async def app(_scope: Message, _receive: Receive, _send: Send) -> None:
        raise AssertionError("nobody waits for an answer")

    async def main() -> None:
        gone = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": b"abc"}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_message: Message) -> None:
            raise AssertionError("nobody takes a response")

        async def slow(_scope: Message, _body: bytes) -> tuple[Message, bytes]:
            gone.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("rewrite")
            raise AssertionError

        await rewriting(app, slow)(Request("POST", "/").scope(), receive, send)

    asyncio.run(main())
    assert ended == ["rewrite"]


def test_work_that_does_not_wait_does_not_ask_for_a_disconnect() -> None:
    async def main() -> None:
        client = Client()

        async def work() -> str:
            return "done"

        assert await unless_disconnected(work(), client.receive) == "done"
        await asyncio.sleep(0)
        assert not client.asked.is_set()

    asyncio.run(main())


def test_work_runs_in_the_callers_task_and_its_errors_reach_the_caller() -> None:
    async def main() -> None:
        async def work() -> None:
            assert asyncio.current_task() is caller
            await asyncio.sleep(0.001)
            raise TimeoutError("of the work")

        caller = asyncio.current_task()
        with pytest.raises(TimeoutError, match="of the work"):
            await unless_disconnected(work(), Client().receive)

    asyncio.run(main())


def test_a_disconnect_in_the_moment_in_which_the_work_ends_is_not_lost() -> None:
    async def main() -> None:
        client = Client()

        async def work() -> None:
            await client.asked.wait()
            client.gone.set()

        # The work is over, but the caller's next message is still the disconnect.
        await unless_disconnected(work(), client.receive)
        assert (await client.receive())["type"] == "http.disconnect"

    asyncio.run(main())


def test_a_disconnect_that_arrived_before_the_work_ended_is_not_lost() -> None:
    async def main() -> None:
        disconnects: list[Message] = [{"type": "http.disconnect"}]
        is_received = asyncio.Event()

        async def receive() -> Message:
            is_received.set()
            return disconnects.pop()

        async def work() -> None:
            await is_received.wait()

        with pytest.raises(ClientDisconnectedError):
            await unless_disconnected(work(), receive)

    asyncio.run(main())


def test_a_cancelled_caller_stays_cancelled() -> None:
    async def main() -> None:
        client = Client()
        working = asyncio.create_task(unless_disconnected(asyncio.Event().wait(), client.receive))
        await client.asked.wait()
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(main())


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
