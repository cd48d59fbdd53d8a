"""The pipeline's layers around scripted apps: records, errors, limits and the memory of bodies."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from worker.errors import ENGINE_DIED, LEAVING, LOADING, InvalidRequestError, JobError
from worker.lifecycle import Lifecycle
from worker.request import sse
from worker.request.asgi import App, Receive, Request, Response, Send, exchange
from worker.request.pipeline import BodyBudget, BodyMemory, ErrorBoundary, Pipeline, Recorder, TimeLimit
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry

SECRET = "a user's prompt"
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON_BODY = [(b"content-type", b"application/json")]


def ready(is_dead: bool = False) -> Lifecycle:
    lifecycle = Lifecycle()
    lifecycle.ready(lambda: is_dead)
    return lifecycle


def streaming(events: int, pause: float = 0.0, last: bytes = b"") -> App:
    """Return an app that streams so many events, whatever its client does."""

    async def app(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        for number in range(events):
            await send({"type": "http.response.body", "body": sse.event({"n": number}), "more_body": True})
            await asyncio.sleep(pause)
        await send({"type": "http.response.body", "body": last})

    return app


def answering(body: bytes, status: int = 200) -> App:
    async def app(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": JSON_BODY})
        await send({"type": "http.response.body", "body": body})

    return app


def raising(error: Exception, begun: bool = False) -> App:
    async def app(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            await send({"type": "http.response.body", "body": sse.event({"n": 0}), "more_body": True})
        raise error

    return app


async def waiting(_scope: Any, receive: Receive, _send: Send) -> None:
    """Wait for the client's disconnect."""
    while (await receive())["type"] != "http.disconnect":
        pass


def request(body: bytes = b"{}") -> Request:
    return Request("POST", "/v1/completions", "", {"x-request-id": "id-1"}, body)


async def ask(app: App, body: bytes = b"{}") -> tuple[Response, bytes]:
    async with exchange(app, request(body)) as response:
        return response, await response.read_all()


def asked(app: App, body: bytes = b"{}") -> tuple[Response, bytes]:
    return asyncio.run(ask(app, body))


# ---- TimeLimit


@asynccontextmanager
async def slow_reader(app: App, pause: float) -> AsyncIterator[list[bytes]]:
    """Read a stream with a pause after each part, as if each were posted to a slow platform."""
    parts: list[bytes] = []
    async with exchange(app, request()) as response:
        while part := await response.read():
            parts.append(part)
            await asyncio.sleep(pause)
    yield parts


@pytest.mark.parametrize("why", ["deadline", "drain", "death"])
def test_a_stream_that_is_read_slowly_ends_on_time(why: str) -> None:
    """The reader never waits for the app: each time it reads, more has arrived."""
    dead = [False]

    async def run() -> tuple[float, bytes]:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: dead[0])
        limits = TimeLimit(streaming(200, pause=0.01), lifecycle, 0.3 if why == "deadline" else None)
        app = ErrorBoundary(limits, lifecycle)

        def end() -> None:
            if why == "drain":
                lifecycle.stopping.set()
            dead[0] = why == "death"
            lifecycle.over.set()

        loop = asyncio.get_running_loop()
        began = loop.time()
        if why != "deadline":
            loop.call_later(0.3, end)
        async with slow_reader(app, pause=0.05) as parts:
            return loop.time() - began, b"".join(parts)

    seconds, text = asyncio.run(run())
    assert seconds < 1.5
    *events, error, done, rest = text.split(b"\n\n")
    assert [json.loads(event.removeprefix(b"data: "))["n"] for event in events] == list(range(len(events)))
    message = json.loads(error.removeprefix(b"data: "))["error"]["message"]
    expected = {"deadline": "REQUEST_TIMEOUT=0.3", "drain": LEAVING, "death": ENGINE_DIED}
    assert expected[why] in message
    assert (done, rest) == (b"data: [DONE]", b"")


def test_the_app_sees_a_disconnect_at_the_deadline() -> None:
    ended: list[str] = []

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        ended.append((await receive())["type"])

    with pytest.raises(JobError, match=r"REQUEST_TIMEOUT=0.05"):
        asyncio.run(TimeLimit(app, ready(), 0.05)(request().scope(), Response(request()).receive, _drop))
    assert ended == ["http.disconnect"]


async def _drop(_message: Any) -> None:
    pass


def test_an_app_that_ignores_the_disconnect_is_cancelled() -> None:
    cancelled: list[bool] = []

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(JobError, match="REQUEST_TIMEOUT"):
        asyncio.run(TimeLimit(app, ready(), 0.05)(request().scope(), Response(request()).receive, _drop))
    assert cancelled == [True]


def test_the_time_limit_begins_when_the_body_is_complete() -> None:
    pieces = [b"a", b"b", b"c"]

    async def slow_upload() -> Any:
        if not pieces:
            await asyncio.sleep(60)
        await asyncio.sleep(0.1)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    app = BodyBudget(answering(b"{}"), BodyMemory(100))
    asyncio.run(TimeLimit(app, ready(), 0.2)(request().scope(), slow_upload, _drop))


def test_no_request_begins_when_the_worker_is_over() -> None:
    async def app(_scope: Any, _receive: Receive, _send: Send) -> None:
        pytest.fail("the app was called")

    lifecycle = Lifecycle()
    lifecycle.over.set()
    with pytest.raises(JobError, match=LOADING):
        asyncio.run(TimeLimit(app, lifecycle, None)(request().scope(), Response(request()).receive, _drop))


def test_a_response_that_is_complete_in_time_stays_as_it_is() -> None:
    response, body = asked(ErrorBoundary(TimeLimit(answering(b"{}"), ready(), 5), ready()))
    assert (response.status, body) == (200, b"{}")


# ---- The error boundary


@pytest.mark.parametrize("begun", [pytest.param(True, id="within a stream"), pytest.param(False, id="before")])
def test_an_unforeseen_error_is_logged_without_its_message(begun: bool, caplog: pytest.LogCaptureFixture) -> None:
    response, body = asked(ErrorBoundary(raising(LookupError(SECRET), begun), ready()))
    assert b"The worker failed while it handled request id-1." in body
    assert response.status == (200 if begun else 500)
    assert not begun or body.endswith(sse.DONE)
    assert "LookupError" in caplog.text
    assert SECRET not in caplog.text + body.decode()


def test_a_known_error_is_the_body_with_its_status() -> None:
    response, body = asked(ErrorBoundary(raising(InvalidRequestError("No.", param="prompt")), ready()))
    assert response.status == 400
    assert json.loads(body) == {
        "error": {"message": "No.", "type": "BadRequestError", "param": "prompt", "code": 400},
    }


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(answering(b'{"error": {"message": "EngineCore encountered an issue."}}', 500), id="whole"),
        pytest.param(
            streaming(1, last=sse.event({"error": {"message": "EngineCore encountered an issue.", "code": 500}})),
            id="stream",
        ),
    ],
)
def test_errors_of_a_dead_engine_say_what_to_do(app: App) -> None:
    body = asked(ErrorBoundary(app, ready(is_dead=True)))[1]
    assert ENGINE_DIED.encode() in body
    assert b"EngineCore" not in body
    assert b"EngineCore" in asked(ErrorBoundary(app, ready()))[1]


def test_what_comes_after_an_error_is_dropped() -> None:
    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": JSON_BODY})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"second"})

    response, body = asked(ErrorBoundary(app, ready(is_dead=True)))
    assert response.status == 503
    assert json.loads(body)["error"]["message"] == ENGINE_DIED


# ---- The record


@pytest.mark.parametrize(
    ("app", "outcome", "status"),
    [
        pytest.param(answering(b"{}"), "ok", 200, id="answered"),
        pytest.param(answering(b"{}", 404), "client_error", 404, id="the caller's mistake"),
        pytest.param(answering(b'{"error":{"code":503}}'), "engine_error", 503, id="error with status 200"),
        pytest.param(answering(b'{"text":"\\"error\\":{"}'), "ok", 200, id="text about errors"),
        pytest.param(streaming(2, last=sse.DONE), "ok", 200, id="streamed"),
        pytest.param(streaming(1, last=sse.event({"error": {"code": 504}})), "timeout", 504, id="error event"),
        pytest.param(waiting, "timeout", 504, id="deadline"),
        pytest.param(raising(LookupError()), "engine_error", 500, id="broken"),
        pytest.param(raising(LookupError(), begun=True), "engine_error", 500, id="broken within a stream"),
    ],
)
def test_each_request_has_one_record(app: App, outcome: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(Settings(request_timeout=0.2), ready(), Telemetry("model", CollectorRegistry()))
    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        asked(pipeline.around(app))
    (record,) = [vars(record) for record in caplog.records if record.name == "worker.telemetry.jobs"]
    assert (record["outcome"], record["status"], record["route"]) == (outcome, status, "/v1/completions")
    assert record["request_id"] == "id-1"


def test_a_request_whose_client_leaves_counts_as_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("model", CollectorRegistry())

    async def run() -> None:
        async with exchange(Recorder(streaming(1000, pause=0.01), telemetry), request()) as response:
            await response.read()
            assert telemetry.running == 1

    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        asyncio.run(run())
    assert "Job id-1 cancelled" in caplog.text
    assert telemetry.running == 0


# ---- The memory of bodies


def test_a_body_arrives_in_one_piece_and_is_counted_until_the_request_ends() -> None:
    memory = BodyMemory(100)
    pieces = [b"ab", b"", b"c"]
    seen: list[Any] = []

    async def receive() -> Any:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        return {"type": "http.disconnect"}

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        seen.extend([(await receive())["body"], (await receive())["type"], memory.held])

    asyncio.run(BodyBudget(app, memory)({}, receive, _drop))
    assert seen == [b"abc", "http.disconnect", 3]
    assert memory.held == 0


def test_a_large_body_is_accepted_alone_however_it_arrives() -> None:
    memory = BodyMemory(10)
    pieces = [b"x" * 8] * 4
    sizes: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": pieces.pop(), "more_body": bool(pieces)}

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        sizes.append(len((await receive())["body"]))

    asyncio.run(BodyBudget(app, memory)({}, receive, _drop))
    assert (sizes, memory.held) == ([32], 0)


def test_bodies_beyond_the_memory_are_refused_until_others_end() -> None:
    async def run() -> list[int]:
        memory = BodyMemory(10)
        app = ErrorBoundary(BodyBudget(waiting, memory), ready())
        async with exchange(_begun(app), request(b"x" * 8)):
            refused, _ = await ask(app, b"x" * 3)
            small = memory.held
        accepted, _ = await ask(ErrorBoundary(BodyBudget(answering(b"{}"), memory), ready()), b"x" * 30)
        return [refused.status, small, accepted.status, memory.held]

    assert asyncio.run(run()) == [429, 8, 200, 0]


def _begun(app: App) -> App:
    """Return the app, which begins its response at once."""

    async def begun(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await app(scope, receive, send)

    return begun
