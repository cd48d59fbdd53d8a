"""The handler over scripted apps: how each answer of the engine, and each failure, becomes yields."""

import asyncio
import json
import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from worker.errors import ENGINE_DIED, LEAVING, Json
from worker.lifecycle import Lifecycle
from worker.queue.handler import JobHandler, Output
from worker.request import sse
from worker.request.asgi import App, Receive, Send
from worker.request.pace import current_pace
from worker.request.pipeline import Pipeline
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry

DEFAULTS = Settings()
SECRET = "what a user said"
CHAT: Json = {"messages": [{"role": "user", "content": "Hello"}]}
ERROR = {"error": {"message": "too long", "type": "BadRequestError", "param": "messages", "code": 400}}
CHUNKS = [{"choices": [{"delta": {"content": text}}]} for text in ("こん", "にちは", "!")]


def answer(body: bytes, status: int = 200, content_type: str = "application/json") -> App:
    """Return an app that answers everything with `body`."""

    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def stream(*pieces: bytes, fails: bool = False) -> App:
    """Return an app that streams `pieces`, one per turn of the loop."""

    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0.001)
        if fails:
            raise LookupError(SECRET)
        await send({"type": "http.response.body", "body": b""})

    return app


def handler(
    app: App,
    settings: Settings = DEFAULTS,
    lifecycle: Lifecycle | None = None,
) -> JobHandler:
    if lifecycle is None:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: False)
    return JobHandler(app, Pipeline(settings, lifecycle, Telemetry("model", CollectorRegistry())), settings)


async def collect(handler: JobHandler, job_input: object) -> list[Output]:
    return [output async for output in handler.handle({"id": "job-1", "input": job_input})]


def outputs(app: App, job_input: object, settings: Settings = DEFAULTS) -> list[Output]:
    return asyncio.run(collect(handler(app, settings), job_input))


def openai(**fields: Any) -> Json:
    return {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, **fields}}


def error_of(output: Output) -> Json:
    """Return the error object in a yield by which the SDK marks a job FAILED."""
    assert isinstance(output, dict)
    assert list(output) == ["error"]
    value: Json = json.loads(output["error"])
    return value


def test_a_json_body_is_one_yield() -> None:
    assert outputs(answer(b'{"id": "x", "error": null}'), CHAT) == [{"id": "x", "error": None}]


def test_a_text_body_is_one_string() -> None:
    metrics = answer(b"# HELP a\na 1\n", content_type="text/plain; version=1.0.0")
    assert outputs(metrics, {"route": "/metrics"}) == ["# HELP a\na 1\n"]


def test_an_empty_body_is_its_status() -> None:
    assert outputs(answer(b"", content_type="text/plain"), {"route": "/health"}) == [{"status": 200}]


def test_the_engine_gets_the_body_and_the_jobs_id() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.extend([scope["path"], dict(scope["headers"]), json.loads((await receive())["body"])])
        await answer(b"{}")(scope, receive, send)

    outputs(app, openai(max_tokens=3))
    headers = {b"x-request-id": b"job-1", b"content-type": b"application/json"}
    assert seen == ["/v1/chat/completions", headers, {**CHAT, "max_tokens": 3}]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_sse_text_is_passed_byte_for_byte(size: int) -> None:
    data = b"".join(map(sse.event, CHUNKS)) + sse.DONE
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    texts = outputs(stream(*pieces), openai(stream=True))
    assert "".join(map(str, texts)).encode() == data
    assert all(str(text).endswith("\n\n") for text in texts)


@pytest.mark.parametrize(
    "job_input",
    [
        pytest.param({**CHAT, "stream": True}, id="messages"),
        pytest.param({"prompt": "Hello", "stream": True}, id="prompt"),
        pytest.param({"route": "/v1/chat/completions", "body": {**CHAT, "stream": True}}, id="route"),
    ],
)
def test_other_shapes_stream_lists_of_chunk_objects(job_input: Json) -> None:
    lists = outputs(stream(*map(sse.event, CHUNKS), sse.DONE), job_input)
    assert [chunk for chunks in lists for chunk in chunks] == CHUNKS
    assert all(lists)


@pytest.mark.parametrize("job_input", [pytest.param(openai(), id="openai"), pytest.param(CHAT, id="messages")])
def test_the_engines_error_fails_the_job_whole(job_input: Json) -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode(), 400), job_input)
    assert error_of(output) == ERROR["error"]


def test_an_error_within_a_body_of_status_200_fails_the_job() -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode()), {"route": "/v1/responses", "body": {}})
    assert error_of(output) == ERROR["error"]


def test_an_error_before_a_stream_is_an_event_for_sse_readers() -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode(), 400), openai(stream=True))
    assert output == (sse.event(ERROR) + sse.DONE).decode()


def test_anthropics_error_is_a_named_event_and_is_completed_for_a_failed_job() -> None:
    error = {"type": "error", "error": {"type": "BadRequestError", "message": "no"}}
    app = answer(json.dumps(error).encode(), 400)
    (event,) = outputs(app, {"openai_route": "/v1/messages", "openai_input": {"stream": True}})
    assert str(event).startswith("event: error\ndata: ")
    (output,) = outputs(app, {"openai_route": "/v1/messages", "openai_input": {}})
    assert error_of(output) == {"message": "no", "type": "BadRequestError", "param": None, "code": 400}


@pytest.mark.parametrize("together", [pytest.param(True, id="in one batch"), pytest.param(False, id="in two")])
def test_an_error_in_a_stream_of_objects_is_a_chunk_and_fails_the_job(together: bool) -> None:
    events = [sse.event(CHUNKS[0]), sse.event(ERROR), sse.DONE]
    app = stream(b"".join(events)) if together else stream(*events)
    *chunks, error, failed = outputs(app, {**CHAT, "stream": True})
    assert chunks == [[CHUNKS[0]]]
    assert error == [ERROR]
    assert error_of(failed) == ERROR["error"]


def test_an_error_that_is_no_json_is_told_with_its_status() -> None:
    (output,) = outputs(answer(b"", 503, "text/plain"), {"route": "/health"})
    assert error_of(output)["message"] == "The engine answered with HTTP status 503."
    assert error_of(output)["code"] == 503


@pytest.mark.parametrize("job_input", [pytest.param({"text": "x"}, id="no shape"), pytest.param(None, id="null")])
def test_an_input_that_fits_no_shape_fails_the_job(job_input: object) -> None:
    (output,) = outputs(answer(b"{}"), job_input)
    assert error_of(output)["code"] == 400


def test_an_unknown_route_is_an_event_for_sse_readers() -> None:
    (output,) = outputs(answer(b"{}"), {"openai_route": "/v1/nothing", "openai_input": {"stream": True}})
    assert '"code": 404' in str(output)
    assert str(output).endswith(sse.DONE.decode())


@pytest.mark.parametrize(
    "job_input", [pytest.param(CHAT, id="not streaming"), pytest.param({**CHAT, "stream": True}, id="streaming")]
)
def test_what_is_unforeseen_is_logged_and_not_told(job_input: Json, caplog: pytest.LogCaptureFixture) -> None:
    *_, output = outputs(stream(b"data: 1\n\n", fails=True), job_input)
    assert error_of(output) == {
        "message": "The worker failed while it handled request job-1. Its log has the cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert "LookupError" in caplog.text
    assert SECRET not in caplog.text


def test_cancelling_a_job_ends_its_work_in_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    async def endless(_scope: Any, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        told.extend([(await receive())["type"], (await receive())["type"]])

    async def consume() -> None:
        await collect(handler(endless), openai(stream=True))

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consume(), 0.02)
        assert told == ["http.request", "http.disconnect"]

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert "Job job-1 cancelled" in caplog.text


@pytest.mark.parametrize("streaming", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_a_job_that_takes_too_long_is_ended_with_an_error(streaming: bool) -> None:
    told: list[str] = []

    async def endless(_scope: Any, receive: Receive, send: Send) -> None:
        if streaming:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": sse.event(CHUNKS[0]), "more_body": True})
        told.extend([(await receive())["type"], (await receive())["type"]])

    *_, failed = outputs(endless, {**CHAT, "stream": streaming}, Settings(request_timeout=0.05))
    assert error_of(failed) == {
        "message": "The request was ended after REQUEST_TIMEOUT=0.05 s. Ask for fewer tokens, or raise the limit.",
        "type": "TimeoutError",
        "param": None,
        "code": 504,
    }
    assert told == ["http.request", "http.disconnect"]


def test_what_comes_while_a_batch_is_posted_is_the_next_batch() -> None:
    events = [sse.event({"n": number}) for number in range(30)]

    async def run() -> list[Output]:
        texts = []
        async for text in handler(stream(*events)).handle({"id": "job-1", "input": openai(stream=True)}):
            texts.append(text)
            await asyncio.sleep(0.2)
        return texts

    texts = asyncio.run(run())
    assert "".join(map(str, texts)).encode() == b"".join(events)
    assert len(texts) == 2


@pytest.mark.parametrize(("milliseconds", "seconds"), [(40, 0.04), (0, None)])
def test_the_engine_is_told_the_pace_of_the_stream(milliseconds: float, seconds: float | None) -> None:
    waits = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        if (pace := current_pace.get()) is not None:
            pace.sent(now=0)
            waits.append(pace.wait(now=0))
        await answer(b"{}")(scope, receive, send)

    outputs(app, CHAT, Settings(stream_batch_ms=milliseconds))
    assert waits == ([] if seconds is None else [seconds])


@pytest.mark.parametrize(
    ("app", "job_input", "outcome", "status"),
    [
        pytest.param(answer(b"{}"), CHAT, "ok", 200, id="whole"),
        pytest.param(stream(sse.DONE), openai(stream=True), "ok", 200, id="stream"),
        pytest.param(answer(b"{}"), {}, "client_error", 400, id="refused by the worker"),
        pytest.param(answer(json.dumps(ERROR).encode(), 400), CHAT, "client_error", 400, id="refused by the engine"),
        pytest.param(stream(sse.event({"n": 1}), fails=True), openai(stream=True), "engine_error", 500, id="broken"),
        pytest.param(
            stream(sse.event({"n": 1}), sse.event({"error": {"message": "?", "code": 500}}), sse.DONE),
            openai(stream=True),
            "engine_error",
            500,
            id="error event",
        ),
    ],
)
def test_what_became_of_a_job_is_told_once(
    app: App, job_input: Json, outcome: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        outputs(app, job_input)
    (record,) = [record for record in caplog.records if record.name == "worker.telemetry.jobs"]
    assert (vars(record)["outcome"], vars(record)["status"]) == (outcome, status)


# ---- The end of all jobs


def ended_while_they_run(app: App, *job_inputs: Json) -> list[list[Output]]:
    """Return the yields of jobs that are ended while the engine is silent, and of one that comes later."""

    async def run() -> list[list[Output]]:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: False)
        answering = handler(app, lifecycle=lifecycle)
        tasks = [asyncio.create_task(collect(answering, job_input)) for job_input in job_inputs]
        await asyncio.sleep(0.1)
        lifecycle.stopping.set()
        lifecycle.over.set()
        late = await collect(answering, CHAT)
        return [*await asyncio.gather(*tasks), late]

    return asyncio.run(run())


async def silent(_scope: Any, receive: Receive, send: Send) -> None:
    """Begin a stream, and go on when the client has left."""
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": sse.event(CHUNKS[0]), "more_body": True})
    await receive()
    await receive()


async def mute(_scope: Any, receive: Receive, _send: Send) -> None:
    """Begin nothing."""
    await receive()
    await receive()


def test_what_runs_is_ended_with_an_error_in_its_own_form() -> None:
    text, objects, late = ended_while_they_run(silent, openai(stream=True), {**CHAT, "stream": True})
    assert text[0] == sse.event(CHUNKS[0]).decode()
    assert LEAVING in str(text[1])
    assert str(text[1]).endswith("data: [DONE]\n\n")
    assert objects[0] == [CHUNKS[0]]
    assert error_of(objects[-1])["message"] == LEAVING
    assert error_of(late[0])["code"] == 503


def test_what_has_not_begun_is_ended_too() -> None:
    (waiting,), _ = ended_while_they_run(mute, openai())
    assert error_of(waiting)["message"] == LEAVING


def test_a_dead_engine_is_told_in_words_that_help() -> None:
    lifecycle = Lifecycle()
    lifecycle.ready(engine_is_dead=lambda: True)
    app = answer(b'{"error": {"message": "EngineCore encountered an issue.", "code": 500}}', 500)
    (output,) = asyncio.run(collect(handler(app, lifecycle=lifecycle), CHAT))
    assert error_of(output)["message"] == ENGINE_DIED


def test_an_event_larger_than_a_yield_is_cut() -> None:
    event = sse.event({"choices": [{"text": "\u4e16\n" * 400_000}]})
    texts = outputs(stream(event, sse.DONE), openai(stream=True))
    assert "".join(map(str, texts)).encode() == event + sse.DONE
    assert max(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts) <= 1_000_000


def test_a_route_for_models_of_another_kind() -> None:
    (output,) = outputs(answer(b'{"detail":"Not Found"}', 404), {"route": "/v1/embeddings", "body": {"input": "Hello"}})
    error = error_of(output)
    assert (error["code"], error["type"]) == (404, "NotFoundError")
    assert "does not support '/v1/embeddings'" in error["message"]
