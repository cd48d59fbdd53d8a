"""Calls of ASGI apps in this process: of scripted apps, and of Starlette apps."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from worker.request.asgi import App, IncompleteResponseError, Receive, Request, Send, exchange, header, with_headers

POST = Request("POST", "/echo", "a=1&b=2", {"content-type": "application/json"}, b'{"text": "hi"}')


def scripted(body: Callable[[Receive, Send], Awaitable[None]]) -> App:
    async def app(_scope: object, receive: Receive, send: Send) -> None:
        await body(receive, send)

    return app


async def start(send: Send, content_type: bytes = b"text/event-stream") -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", content_type)]})


async def body(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def test_a_starlette_app_sees_an_ordinary_request() -> None:
    async def echo(request: StarletteRequest) -> JSONResponse:
        return JSONResponse(
            [request.method, request.url.path, dict(request.query_params), await request.json()], status_code=201
        )

    async def run() -> None:
        app = Starlette(routes=[Route("/echo", echo, methods=["POST"])])
        async with exchange(app, POST) as response:
            assert (response.status, response.headers["content-type"]) == (201, "application/json")
            assert not response.is_event_stream
            assert await response.read_all() == b'["POST","/echo",{"a":"1","b":"2"},{"text":"hi"}]'

    asyncio.run(run())


def test_a_stream_is_read_while_it_is_produced() -> None:
    is_read = asyncio.Event()

    async def app(_receive: Receive, send: Send) -> None:
        await start(send)
        await body(send, b"one ")
        await body(send, b"two")
        await is_read.wait()
        await body(send, b"three", more=False)

    async def run() -> None:
        async with exchange(scripted(app), POST) as response:
            assert response.is_event_stream
            assert await response.read() == b"one two"
            is_read.set()
            assert await response.read() == b"three"
            assert await response.read() == b""

    asyncio.run(run())


@pytest.mark.parametrize("streaming", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_leaving_the_block_early_is_a_disconnect(streaming: bool) -> None:
    received: list[str] = []

    async def app(receive: Receive, send: Send) -> None:
        if streaming:
            await start(send)
        assert (await receive())["body"] == POST.body
        received.append((await receive())["type"])
        await body(send, b"late")

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), exchange(scripted(app), POST) as response:
                await response.read()
        assert received == ["http.disconnect"]

    asyncio.run(run())


def test_starlette_closes_the_generator_of_a_stream_after_a_disconnect() -> None:
    closed = asyncio.Event()

    async def tokens() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0)
        finally:
            closed.set()

    async def stream(_request: StarletteRequest) -> StreamingResponse:
        return StreamingResponse(tokens())

    async def run() -> None:
        app = Starlette(routes=[Route("/echo", stream, methods=["POST"])])
        async with exchange(app, POST) as response:
            assert await response.read()
        assert closed.is_set()

    asyncio.run(run())


def test_an_app_that_ignores_the_disconnect_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def app(_receive: Receive, send: Send) -> None:
        await start(send)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def run() -> None:
        async with exchange(scripted(app), POST, grace=0.01):
            pass
        assert cancelled.is_set()

    asyncio.run(run())


def test_an_app_that_fails_before_its_response() -> None:
    async def app(_receive: Receive, _send: Send) -> None:
        raise LookupError("boom")

    async def run() -> None:
        async with exchange(scripted(app), POST):
            pass

    with pytest.raises(IncompleteResponseError) as caught:
        asyncio.run(run())
    assert isinstance(caught.value.__cause__, LookupError)


@pytest.mark.parametrize("method", ["read", "read_all"])
def test_an_app_that_fails_during_its_response(method: str) -> None:
    async def app(_receive: Receive, send: Send) -> None:
        await start(send)
        await body(send, b"half")
        raise LookupError("boom")

    async def run() -> None:
        async with exchange(scripted(app), POST) as response:
            while await getattr(response, method)():
                pass

    with pytest.raises(IncompleteResponseError):
        asyncio.run(run())


def test_an_exception_after_a_complete_response_does_not_matter() -> None:
    async def app(_receive: Receive, send: Send) -> None:
        await start(send)
        await body(send, b"whole", more=False)
        raise LookupError("boom")

    async def run() -> None:
        async with exchange(scripted(app), POST) as response:
            assert await response.read_all() == b"whole"

    asyncio.run(run())


def test_headers_are_replaced_and_added() -> None:
    scope = with_headers(POST.scope(), {"content-type": "text/plain", "traceparent": "00-1"})
    assert (header(scope, b"content-type"), header(scope, b"traceparent")) == (b"text/plain", b"00-1")
    assert len(scope["headers"]) == 2
    assert header(scope, b"authorization") == b""
