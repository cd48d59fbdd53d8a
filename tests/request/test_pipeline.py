"""The pipeline's layers around scripted apps: time limit, errors, records and the memory of bodies."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.support.clock import VirtualLoop, run_on_virtual_clock
from worker.errors import ENGINE_DIED, LEAVING, LOADING, InvalidRequestError, JobError
from worker.lifecycle import Lifecycle
from worker.memory import Budget
from worker.request import sse
from worker.request.asgi import App, Receive, Request, Response, Send, exchange
from worker.request.pipeline import BodyBudget, ErrorBoundary, Pipeline, Recorder, TimeLimit
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
    """Return an app that streams this many events and ignores disconnects."""

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


async def fetch(app: App, body: bytes = b"{}") -> tuple[Response, bytes]:
    """Return the response to `request(body)`, and its body."""
    async with exchange(app, request(body)) as response:
        return response, await response.read_all()


def response_of(app: App) -> tuple[Response, bytes]:
    return asyncio.run(fetch(app))


async def ignore(_message: Any) -> None:
    """Ignore a part of a response."""


def call(app: App, receive: Receive | None = None) -> None:
    """Call an app without `exchange`, so that its exceptions reach the test. Ignore its response."""

    async def run() -> None:
        await app(request().scope(), receive or Response(request()).receive, ignore)

    asyncio.run(run())


def receive_in_parts(*parts: bytes) -> Receive:
    """Return a `receive` for a body in parts, after which the client disconnects."""
    remaining = list(parts)

    async def receive() -> Any:
        if remaining:
            return {"type": "http.request", "body": remaining.pop(0), "more_body": bool(remaining)}
        return {"type": "http.disconnect"}

    return receive


# ---- TimeLimit


@asynccontextmanager
async def slow_reader(app: App, pause: float) -> AsyncIterator[list[bytes]]:
    """Read a stream with a pause after each part, like a worker that posts it to a slow platform."""
    parts: list[bytes] = []
    async with exchange(app, request()) as response:
        while part := await response.read():
            parts.append(part)
            await asyncio.sleep(pause)
    yield parts


@pytest.mark.parametrize("cause", ["deadline", "drain", "death"])
def test_a_stream_that_is_read_slowly_ends_on_time(cause: str) -> None:
    """Reading never blocks, because new events have always arrived during the pause."""
    dead = [False]

    async def run() -> tuple[float, bytes]:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: dead[0])
        limits = TimeLimit(streaming(200, pause=0.01), lifecycle, 0.3 if cause == "deadline" else None)
        app = ErrorBoundary(limits, lifecycle)

        def end() -> None:
            if cause == "drain":
                lifecycle.stopping.set()
            dead[0] = cause == "death"
            lifecycle.over.set()

        loop = asyncio.get_running_loop()
        began = loop.time()
        if cause != "deadline":
            loop.call_later(0.3, end)
        async with slow_reader(app, pause=0.05) as parts:
            return loop.time() - began, b"".join(parts)

    seconds, text = asyncio.run(run())
    assert seconds < 1.5
    *events, error, done, end = text.split(b"\n\n")
    assert [json.loads(event.removeprefix(b"data: "))["n"] for event in events] == list(range(len(events)))
    message = json.loads(error.removeprefix(b"data: "))["error"]["message"]
    expected = {"deadline": "REQUEST_TIMEOUT=0.3", "drain": LEAVING, "death": ENGINE_DIED}
    assert expected[cause] in message
    assert (done, end) == (b"data: [DONE]", b"")


def test_the_app_sees_a_disconnect_at_the_deadline() -> None:
    received: list[str] = []

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        received.append((await receive())["type"])

    with pytest.raises(JobError, match=r"REQUEST_TIMEOUT=0.05"):
        call(TimeLimit(app, ready(), 0.05))
    assert received == ["http.disconnect"]


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
        call(TimeLimit(app, ready(), 0.05))
    assert cancelled == [True]


def test_the_time_limit_begins_when_the_body_is_complete() -> None:
    body = receive_in_parts(b"a", b"b", b"c")

    async def slow_upload() -> Any:
        await asyncio.sleep(0.1)
        return await body()

    call(TimeLimit(BodyBudget(answering(b"{}"), Budget(100)), ready(), 0.2), slow_upload)


def test_the_time_in_which_the_worker_was_frozen_does_not_count() -> None:
    lifecycle = ready()

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        await asyncio.sleep(10)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(3600)
        lifecycle.resumes.resumed(3600)
        await receive()

    async def run() -> float:
        with pytest.raises(JobError, match="REQUEST_TIMEOUT=60"):
            await TimeLimit(app, lifecycle, 60)(request().scope(), Response(request()).receive, ignore)
        return asyncio.get_running_loop().time()

    assert run_on_virtual_clock(run()) == pytest.approx(3660, abs=1)


def test_no_request_begins_once_the_worker_ends_its_requests() -> None:
    async def app(_scope: Any, _receive: Receive, _send: Send) -> None:
        pytest.fail("The app was called although the worker has ended its requests.")

    lifecycle = Lifecycle()
    lifecycle.over.set()
    with pytest.raises(JobError, match=LOADING):
        call(TimeLimit(app, lifecycle, None))


def test_a_response_that_is_complete_in_time_is_unchanged() -> None:
    response, body = response_of(ErrorBoundary(TimeLimit(answering(b"{}"), ready(), 5), ready()))
    assert (response.status, body) == (200, b"{}")


# ---- ErrorBoundary


@pytest.mark.parametrize(
    "begun", [pytest.param(True, id="during a stream"), pytest.param(False, id="before the response")]
)
def test_an_unexpected_exception_is_logged_without_its_message(begun: bool, caplog: pytest.LogCaptureFixture) -> None:
    response, body = response_of(ErrorBoundary(raising(LookupError(SECRET), begun), ready()))
    assert b"The worker failed while it handled request id-1." in body
    assert response.status == (200 if begun else 500)
    assert not begun or body.endswith(sse.DONE)
    assert "LookupError" in caplog.text
    assert SECRET not in caplog.text + body.decode()


def test_a_job_error_is_the_response_with_its_status() -> None:
    response, body = response_of(ErrorBoundary(raising(InvalidRequestError("No.", param="prompt")), ready()))
    assert response.status == 400
    assert json.loads(body) == {
        "error": {"message": "No.", "type": "BadRequestError", "param": "prompt", "code": 400},
    }


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(answering(b'{"error": {"message": "EngineCore encountered an issue."}}', 500), id="not streaming"),
        pytest.param(raising(LookupError(SECRET), begun=False), id="exception"),
        pytest.param(raising(LookupError(SECRET), begun=True), id="exception during a stream"),
        pytest.param(
            streaming(1, last=sse.event({"error": {"message": "EngineCore encountered an issue.", "code": 500}})),
            id="streaming",
        ),
    ],
)
def test_an_error_of_a_dead_engine_is_replaced_by_advice(app: App) -> None:
    body = response_of(ErrorBoundary(app, ready(is_dead=True)))[1]
    assert ENGINE_DIED.encode() in body
    assert b"EngineCore" not in body
    assert ENGINE_DIED.encode() not in response_of(ErrorBoundary(app, ready()))[1]


def test_the_rest_of_the_response_after_a_replaced_error_is_dropped() -> None:
    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": JSON_BODY})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"second"})

    response, body = response_of(ErrorBoundary(app, ready(is_dead=True)))
    assert response.status == 503
    assert json.loads(body)["error"]["message"] == ENGINE_DIED


# ---- Recorder


@pytest.mark.parametrize(
    ("app", "outcome", "status"),
    [
        pytest.param(answering(b"{}"), "ok", 200, id="success"),
        pytest.param(answering(b"{}", 404), "client_error", 404, id="the caller's mistake"),
        pytest.param(answering(b'{"error":{"code":503}}'), "engine_error", 503, id="error body with status 200"),
        pytest.param(answering(b'{"text":"\\"error\\":{"}'), "ok", 200, id="text that mentions an error"),
        pytest.param(streaming(2, last=sse.DONE), "ok", 200, id="stream"),
        pytest.param(streaming(1, last=sse.event({"error": {"code": 504}})), "timeout", 504, id="error event"),
        pytest.param(waiting, "timeout", 504, id="deadline"),
        pytest.param(raising(LookupError()), "engine_error", 500, id="exception"),
        pytest.param(raising(LookupError(), begun=True), "engine_error", 500, id="exception during a stream"),
    ],
)
def test_each_request_has_one_record(app: App, outcome: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(Settings(request_timeout=0.2), ready(), Telemetry("model", CollectorRegistry()))
    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        response_of(pipeline.around(app))
    (record,) = [vars(record) for record in caplog.records if record.name == "worker.telemetry.jobs"]
    assert (record["outcome"], record["status"], record["route"]) == (outcome, status, "/v1/completions")
    assert record["request_id"] == "id-1"


def test_a_request_whose_client_disconnects_counts_as_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("model", CollectorRegistry())

    async def run() -> None:
        async with exchange(Recorder(streaming(1000, pause=0.01), telemetry), request()) as response:
            await response.read()
            assert telemetry.running == 1

    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        asyncio.run(run())
    assert "Job id-1 cancelled" in caplog.text
    assert telemetry.running == 0


# ---- BodyBudget


def test_a_body_arrives_in_one_piece_and_is_counted_until_the_request_ends() -> None:
    memory = Budget(100)
    received: list[Any] = []

    async def app(_scope: Any, receive: Receive, _send: Send) -> None:
        received.extend([(await receive())["body"], (await receive())["type"], memory.held])

    call(BodyBudget(app, memory), receive_in_parts(b"ab", b"", b"c"))
    assert received == [b"abc", "http.disconnect", 3]
    assert memory.held == 0


def test_a_body_larger_than_the_memory_is_refused_with_the_limit() -> None:
    memory = Budget(10)
    app = ErrorBoundary(BodyBudget(answering(b"{}"), memory), ready())
    response, body = asyncio.run(fetch(app, b"x" * 32))
    assert (response.status, memory.held) == (413, 0)
    assert b"MAX_TOTAL_REQUEST_BYTES=10" in body


def test_a_body_beyond_the_memory_waits_until_others_end() -> None:
    async def run() -> tuple[bool, int]:
        memory = Budget(10)
        app = ErrorBoundary(BodyBudget(waiting, memory), ready())
        async with exchange(begun_early(app), request(b"x" * 8)):
            second = asyncio.create_task(fetch(BodyBudget(answering(b"{}"), memory), b"x" * 3))
            await asyncio.sleep(0.05)
            waited = not second.done()
        response, _ = await second
        return waited, response.status

    assert asyncio.run(run()) == (True, 200)


def begun_early(app: App) -> App:
    """Return an app that begins a response before it calls `app`, so that `exchange` does not wait."""

    async def begun(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await app(scope, receive, send)

    return begun
