"""The job handler with scripted apps: the yields for each kind of response and failure."""

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.support.s3 import LinkServer
from worker.errors import ENGINE_DIED, LEAVING, Json
from worker.lifecycle import Lifecycle
from worker.media.fetch import Policy
from worker.queue.handler import JobHandler
from worker.queue.outputs import Output
from worker.request import sse
from worker.request.asgi import App, Receive, Send
from worker.request.links import LinkedInputs
from worker.request.pace import current_pace
from worker.request.pipeline import Pipeline
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import Usage, current_usage

DEFAULTS = Settings()
SECRET = "a user's prompt"
CHAT: Json = {"messages": [{"role": "user", "content": "Hello"}]}
ERROR = {"error": {"message": "too long", "type": "BadRequestError", "param": "messages", "code": 400}}
NO_HEADERS: Mapping[bytes, bytes] = MappingProxyType({})
CHUNKS = [{"choices": [{"delta": {"content": text}}]} for text in ("こん", "にちは", "!")]


def answer(
    body: bytes, status: int = 200, content_type: str = "application/json", headers: Mapping[bytes, bytes] = NO_HEADERS
) -> App:
    """Return an app that answers every request with `body`."""

    async def app(_scope: Any, _receive: Receive, send: Send) -> None:
        pairs = [(b"content-type", content_type.encode()), *headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})

    return app


def stream(*pieces: bytes, fails: bool = False) -> App:
    """Return an app that streams `pieces` at intervals of 1 ms, and then raises an error if it `fails`."""

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


def handler(app: App, settings: Settings = DEFAULTS, lifecycle: Lifecycle | None = None) -> JobHandler:
    if lifecycle is None:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: False)
    return JobHandler(app, Pipeline(settings, lifecycle, Telemetry("model", CollectorRegistry())), settings)


async def collect(handler: JobHandler, job_input: object) -> list[Any]:
    return [output async for output in handler.handle({"id": "job-1", "input": job_input})]


def outputs(app: App, job_input: object, settings: Settings = DEFAULTS) -> list[Any]:
    return asyncio.run(collect(handler(app, settings), job_input))


def openai(**fields: Any) -> Json:
    return {"openai_route": "/v1/chat/completions", "openai_input": {**CHAT, **fields}}


def error_of(output: Output) -> Json:
    """Return the error object in a yield by which the SDK marks a job FAILED."""
    assert isinstance(output, dict)
    assert list(output) == ["error"]
    value: Json = json.loads(output["error"])
    return value


def test_a_json_body_is_yielded_as_one_object() -> None:
    assert outputs(answer(b'{"id": "x", "error": null}'), CHAT) == [{"id": "x", "error": None}]


def test_a_text_body_is_yielded_as_one_string() -> None:
    metrics = answer(b"# HELP a\na 1\n", content_type="text/plain; version=1.0.0")
    assert outputs(metrics, {"route": "/metrics"}) == ["# HELP a\na 1\n"]


@pytest.mark.parametrize(("headers", "metadata"), [({}, None), ({b"metadata": b'{"model": "m"}'}, {"model": "m"})])
def test_a_binary_body_is_yielded_in_base64(headers: dict[bytes, bytes], metadata: Json | None) -> None:
    data = b"\xff\x00\x80"
    (output,) = outputs(answer(data, content_type="application/octet-stream", headers=headers), CHAT)
    assert output == {"content_type": "application/octet-stream", "metadata": metadata, "base64": "/wCA"}


def test_an_empty_body_is_yielded_as_its_status() -> None:
    assert outputs(answer(b"", content_type="text/plain"), {"route": "/health"}) == [{"status": 200}]


def test_the_engine_receives_the_body_and_the_jobs_id() -> None:
    received: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        received.extend([scope["path"], dict(scope["headers"]), json.loads((await receive())["body"])])
        await answer(b"{}")(scope, receive, send)

    outputs(app, openai(max_tokens=3))
    headers = {b"x-request-id": b"job-1", b"content-type": b"application/json"}
    assert received == ["/v1/chat/completions", headers, {**CHAT, "max_tokens": 3}]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_sse_text_is_passed_on_byte_for_byte(size: int) -> None:
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
def test_the_other_input_formats_stream_lists_of_chunk_objects(job_input: Json) -> None:
    lists = outputs(stream(*map(sse.event, CHUNKS), sse.DONE), job_input)
    assert [chunk for chunks in lists for chunk in chunks] == CHUNKS
    assert all(lists)


# ---- Jobs of worker-vllm: the shapes of src/handler.py of its newer releases, which docs/migration.md describes.

COMPLETION: Json = {"prompt": "Once"}
SAMPLING = {"temperature": 0.5}
OF_WORKER_VLLM = [
    pytest.param(
        {"openai_route": "/v1/completions", "openai_input": COMPLETION}, "/v1/completions", COMPLETION, id="proxy"
    ),
    pytest.param({"openai_input": CHAT}, "/v1/chat/completions", CHAT, id="openai_input alone is a chat"),
    pytest.param({"openai_route": "/v1/models", "openai_input": {}}, "/v1/models", None, id="proxy without a body"),
    pytest.param({"route": "/v1/completions", "body": COMPLETION}, "/v1/completions", COMPLETION, id="route"),
    pytest.param({"route": "/v1/models", "method": "get"}, "/v1/models", None, id="route with a method"),
    pytest.param(
        {**CHAT, "sampling_params": SAMPLING, "stream": False},
        "/v1/chat/completions",
        {**CHAT, **SAMPLING, "stream": False},
        id="messages",
    ),
    pytest.param(
        {**COMPLETION, "sampling_params": SAMPLING, "stream": False},
        "/v1/completions",
        {**COMPLETION, **SAMPLING, "stream": False},
        id="prompt",
    ),
]
"""Inputs, and the engine's route and body that worker-vllm makes of each."""
STREAMS_OF_WORKER_VLLM = [
    pytest.param({**CHAT, "stream": True}, id="messages"),
    pytest.param({"prompt": "Hello", "stream": True}, id="prompt"),
    pytest.param({"route": "/v1/chat/completions", "body": {**CHAT, "stream": True}}, id="route"),
    pytest.param(openai(stream=True), id="proxy"),
]
"""Inputs for which worker-vllm yields the engine's SSE text."""
RAW = Settings(raw_stream_output=True)


@pytest.mark.parametrize("settings", [pytest.param(DEFAULTS, id="default"), pytest.param(RAW, id="raw")])
@pytest.mark.parametrize(("job_input", "path", "body"), OF_WORKER_VLLM)
def test_a_job_of_worker_vllm_gets_the_engines_response_as_its_only_output(
    job_input: Json, path: str, body: Json | None, settings: Settings
) -> None:
    received: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        content = (await receive())["body"]
        received.extend([scope["method"], scope["path"], json.loads(content) if content else None])
        await answer(b'{"object": "x", "choices": []}')(scope, receive, send)

    assert outputs(app, job_input, settings) == [{"object": "x", "choices": []}]
    assert received == ["GET" if body is None else "POST", path, body]


@pytest.mark.parametrize("job_input", STREAMS_OF_WORKER_VLLM)
def test_raw_streams_are_the_engines_text_as_worker_vllm_yields_it(job_input: Json) -> None:
    data = b"".join(map(sse.event, CHUNKS)) + sse.DONE
    texts = outputs(stream(data[:50], data[50:]), job_input, RAW)
    assert all(isinstance(text, str) and text.endswith("\n\n") for text in texts)
    assert "".join(map(str, texts)).encode() == data


@pytest.mark.parametrize("job_input", STREAMS_OF_WORKER_VLLM[:3])
def test_a_raw_stream_that_fails_ends_with_an_event_and_fails_the_job(job_input: Json) -> None:
    """worker-vllm yields only the error, as an object with the key `error`, by which the SDK marks the job FAILED."""
    event, failed = outputs(answer(json.dumps(ERROR).encode(), 400), job_input, RAW)
    assert event == (sse.event(ERROR) + sse.DONE).decode()
    assert error_of(failed) == ERROR["error"]


@pytest.mark.parametrize("job_input", [pytest.param(openai(), id="openai"), pytest.param(CHAT, id="messages")])
def test_an_error_of_the_engine_is_the_error_of_the_job(job_input: Json) -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode(), 400), job_input)
    assert error_of(output) == ERROR["error"]


def test_an_error_body_with_status_200_fails_the_job() -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode()), {"route": "/v1/responses", "body": {}})
    assert error_of(output) == ERROR["error"]


def test_sse_readers_get_an_error_before_the_stream_as_an_event() -> None:
    (output,) = outputs(answer(json.dumps(ERROR).encode(), 400), openai(stream=True))
    assert output == (sse.event(ERROR) + sse.DONE).decode()


def test_an_anthropic_error_is_a_named_event_and_a_complete_openai_error_for_a_failed_job() -> None:
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


def test_an_error_without_a_json_body_reports_its_status() -> None:
    (output,) = outputs(answer(b"", 503, "text/plain"), {"route": "/health"})
    assert error_of(output)["message"] == "The engine answered with HTTP status 503."
    assert error_of(output)["code"] == 503


@pytest.mark.parametrize("job_input", [pytest.param({"text": "x"}, id="no known field"), pytest.param(None, id="null")])
def test_an_input_of_unknown_format_fails_the_job(job_input: object) -> None:
    (output,) = outputs(answer(b"{}"), job_input)
    assert error_of(output)["code"] == 400


def test_sse_readers_get_an_unknown_route_as_an_error_event() -> None:
    (output,) = outputs(answer(b"{}"), {"openai_route": "/v1/nothing", "openai_input": {"stream": True}})
    assert '"code": 404' in str(output)
    assert str(output).endswith(sse.DONE.decode())


@pytest.mark.parametrize(
    "job_input", [pytest.param(CHAT, id="not streaming"), pytest.param({**CHAT, "stream": True}, id="streaming")]
)
def test_an_unexpected_exception_is_logged_and_its_message_hidden(
    job_input: Json, caplog: pytest.LogCaptureFixture
) -> None:
    *_, output = outputs(stream(b"data: 1\n\n", fails=True), job_input)
    assert error_of(output) == {
        "message": "The worker failed while it handled request job-1. Its log has the cause.",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert "LookupError" in caplog.text
    assert SECRET not in caplog.text


def test_the_engine_sees_a_disconnect_when_a_job_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    received: list[str] = []

    async def endless(_scope: Any, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        received.extend([(await receive())["type"], (await receive())["type"]])

    async def consume() -> None:
        await collect(handler(endless), openai(stream=True))

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consume(), 0.02)
        assert received == ["http.request", "http.disconnect"]

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert "Job job-1 cancelled" in caplog.text


@pytest.mark.parametrize("streaming", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_a_job_that_times_out_fails_and_disconnects_from_the_engine(streaming: bool) -> None:
    received: list[str] = []

    async def endless(_scope: Any, receive: Receive, send: Send) -> None:
        if streaming:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": sse.event(CHUNKS[0]), "more_body": True})
        received.extend([(await receive())["type"], (await receive())["type"]])

    *_, failed = outputs(endless, {**CHAT, "stream": streaming}, Settings(request_timeout=0.05))
    assert error_of(failed) == {
        "message": "The request was ended after REQUEST_TIMEOUT=0.05 s. Ask for fewer tokens, or raise the limit.",
        "type": "TimeoutError",
        "param": None,
        "code": 504,
    }
    assert received == ["http.request", "http.disconnect"]


def test_events_that_arrive_while_a_batch_is_posted_form_the_next_batch() -> None:
    events = [sse.event({"n": number}) for number in range(30)]

    async def run() -> list[Any]:
        texts = []
        async for text in handler(stream(*events)).handle({"id": "job-1", "input": openai(stream=True)}):
            texts.append(text)
            await asyncio.sleep(0.2)
        return texts

    texts = asyncio.run(run())
    assert "".join(map(str, texts)).encode() == b"".join(events)
    assert len(texts) == 2


@pytest.mark.parametrize(("milliseconds", "seconds"), [(40, 0.04), (0, None)])
def test_the_engine_can_read_the_pace_of_the_stream(milliseconds: float, seconds: float | None) -> None:
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
        pytest.param(answer(b"{}"), CHAT, "ok", 200, id="not streaming"),
        pytest.param(stream(sse.DONE), openai(stream=True), "ok", 200, id="streaming"),
        pytest.param(answer(b"{}"), {}, "client_error", 400, id="rejected by the worker"),
        pytest.param(answer(json.dumps(ERROR).encode(), 400), CHAT, "client_error", 400, id="rejected by the engine"),
        pytest.param(
            stream(sse.event({"n": 1}), fails=True),
            openai(stream=True),
            "engine_error",
            500,
            id="exception in the stream",
        ),
        pytest.param(
            stream(sse.event({"n": 1}), sse.event({"error": {"message": "?", "code": 500}}), sse.DONE),
            openai(stream=True),
            "engine_error",
            500,
            id="error event",
        ),
    ],
)
def test_each_job_has_one_log_line_with_its_outcome(
    app: App, job_input: Json, outcome: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "worker.telemetry.jobs"):
        outputs(app, job_input)
    (record,) = [record for record in caplog.records if record.name == "worker.telemetry.jobs"]
    assert (vars(record)["outcome"], vars(record)["status"]) == (outcome, status)


# ---- Shutdown and the engine's death


def outputs_at_shutdown(app: App, *job_inputs: Json) -> list[list[Any]]:
    """Return the outputs of jobs that run when the worker shuts down, and of one more job after that."""

    async def run() -> list[list[Any]]:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: False)
        job_handler = handler(app, lifecycle=lifecycle)
        tasks = [asyncio.create_task(collect(job_handler, job_input)) for job_input in job_inputs]
        await asyncio.sleep(0.1)
        lifecycle.stopping.set()
        lifecycle.over.set()
        late = await collect(job_handler, CHAT)
        return [*await asyncio.gather(*tasks), late]

    return asyncio.run(run())


async def pausing(_scope: Any, receive: Receive, send: Send) -> None:
    """Send one event of a stream, then wait until the client disconnects."""
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": sse.event(CHUNKS[0]), "more_body": True})
    await receive()
    await receive()


async def silent(_scope: Any, receive: Receive, _send: Send) -> None:
    """Send nothing, and wait until the client disconnects."""
    await receive()
    await receive()


def test_streams_that_run_at_shutdown_end_with_an_error_in_their_own_format() -> None:
    text, objects, late = outputs_at_shutdown(pausing, openai(stream=True), {**CHAT, "stream": True})
    assert text[0] == sse.event(CHUNKS[0]).decode()
    assert LEAVING in str(text[1])
    assert str(text[1]).endswith("data: [DONE]\n\n")
    assert objects[0] == [CHUNKS[0]]
    assert error_of(objects[-1])["message"] == LEAVING
    assert error_of(late[0])["code"] == 503


def test_a_job_without_output_at_shutdown_fails() -> None:
    (failed,), _ = outputs_at_shutdown(silent, openai())
    assert error_of(failed)["message"] == LEAVING


def test_an_error_of_a_dead_engine_is_replaced_by_advice() -> None:
    lifecycle = Lifecycle()
    lifecycle.ready(engine_is_dead=lambda: True)
    app = answer(b'{"error": {"message": "EngineCore encountered an issue.", "code": 500}}', 500)
    (output,) = asyncio.run(collect(handler(app, lifecycle=lifecycle), CHAT))
    assert error_of(output)["message"] == ENGINE_DIED


def test_an_event_larger_than_the_platforms_limit_is_split() -> None:
    event = sse.event({"choices": [{"text": "\u4e16\n" * 400_000}]})
    texts = outputs(stream(event, sse.DONE), openai(stream=True))
    assert "".join(map(str, texts)).encode() == event + sse.DONE
    assert max(len(json.dumps(text, ensure_ascii=False).encode()) for text in texts) <= 1_000_000


# ---- Inputs behind links, and the link for a result

OPEN = Policy(seconds=5, private_networks=True)


@pytest.fixture
def links() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


def linked(
    job_input: object, app: App, settings: Settings = DEFAULTS, policy: Policy = OPEN, usage: Usage | None = None
) -> list[Any]:
    """Return the outputs of a job whose input may be behind a link."""
    current_usage.set(usage)
    lifecycle = Lifecycle()
    lifecycle.ready(lambda: False)
    pipeline = Pipeline(settings, lifecycle, Telemetry("model", CollectorRegistry()))
    job_handler = JobHandler(app, pipeline, settings, LinkedInputs(policy, settings))
    outputs = asyncio.run(collect(job_handler, job_input))
    assert pipeline.memory.held == 0
    return outputs


async def echo(scope: Any, receive: Receive, send: Send) -> None:
    """Answer with the route and the body."""
    body = json.loads((await receive())["body"])
    await answer(json.dumps({"path": scope["path"], "body": body}).encode())(scope, receive, send)


@pytest.mark.parametrize(
    ("held", "wrap", "path", "body"),
    [
        pytest.param(CHAT, None, "/v1/chat/completions", CHAT, id="messages"),
        pytest.param(openai(n=2), None, "/v1/chat/completions", {**CHAT, "n": 2}, id="the proxy's input"),
        pytest.param({"route": "/tokenize", "body": COMPLETION}, None, "/tokenize", COMPLETION, id="route"),
        pytest.param(COMPLETION, ("route", "body"), "/v1/completions", COMPLETION, id="the body of a route"),
        pytest.param(CHAT, ("openai_route", "openai_input"), "/v1/completions", CHAT, id="the body of the proxy"),
    ],
)
def test_an_input_behind_a_link_is_used_as_if_it_were_the_jobs(
    links: LinkServer, held: Json, wrap: tuple[str, str] | None, path: str, body: Json
) -> None:
    job_input: Json = {"input_url": links.hold("a.json", held)}
    if wrap:
        job_input = {wrap[0]: "/v1/completions", wrap[1]: job_input}
    usage = Usage()
    assert linked(job_input, echo, usage=usage) == [{"path": path, "body": body}]
    assert [fetch.size for fetch in usage.fetches] == [len(json.dumps(held))]


def test_the_form_of_a_stream_follows_from_the_input_behind_the_link(links: LinkServer) -> None:
    app, chat = stream(*map(sse.event, CHUNKS), sse.DONE), {**CHAT, "stream": True}
    objects = linked({"input_url": links.hold("chat", chat)}, app)
    assert [chunk for chunks in objects for chunk in chunks] == CHUNKS
    texts = linked({"input_url": links.hold("proxy", openai(stream=True))}, app)
    assert "".join(map(str, texts)) == (b"".join(map(sse.event, CHUNKS)) + sse.DONE).decode()
    body = {"openai_route": "/v1/chat/completions", "openai_input": {"input_url": f"{links.url}/held/chat"}}
    assert linked(body, app) == texts


@pytest.mark.parametrize(
    ("held", "code", "message"),
    [
        pytest.param(b"{", 400, "'input_url': the link's content is not valid JSON.", id="not JSON"),
        pytest.param([CHAT], 400, "'input_url': the link's content must be a JSON object.", id="a list"),
        pytest.param("\xff", 400, "must be a JSON object", id="a string"),
        pytest.param(b"\xff\xfe{\x00}\x00", 400, "is not UTF-8", id="another encoding"),
        pytest.param(b"[" * 101, 400, "'input_url': the link's content is nested 101 levels deep", id="deep"),
        pytest.param({"input_url": "https://x"}, 400, "must not have an 'input_url' too", id="a link again"),
        pytest.param({"route": "/a", "body": {"input_url": ""}}, 400, "an 'input_url' too", id="a link in its body"),
        pytest.param({**CHAT, "upload_url": "https://x"}, 400, "must stand beside 'input_url'", id="upload_url"),
        pytest.param({"batch": {"input": []}}, 400, "must stand in the job's own input", id="a batch"),
        pytest.param({"text": "x"}, 400, "which is not an accepted shape", id="no shape"),
        pytest.param({"prompt": "x" * 3000}, 413, "more bytes than MAX_REQUEST_BYTES=2000 allows.", id="too large"),
    ],
)
def test_a_file_that_is_no_input_fails_the_job(links: LinkServer, held: Any, code: int, message: str) -> None:
    (output,) = linked({"input_url": links.hold("file", held)}, echo, Settings(max_request_bytes=2000))
    assert error_of(output)["code"] == code
    assert message in error_of(output)["message"]


@pytest.mark.parametrize(
    ("job_input", "code", "message"),
    [
        pytest.param({"input_url": 1}, 400, "'input_url' must be a string", id="a number"),
        pytest.param({"input_url": "x", "messages": []}, 400, "'messages' must not stand beside it", id="not alone"),
        pytest.param({"input_url": "s3://b/k"}, 403, "'input_url': only https:, http:", id="another scheme"),
        pytest.param({"input_url": "nonsense"}, 403, "'input_url': only https:", id="no link"),
        pytest.param({**CHAT, "upload_url": 1}, 400, "'upload_url' must be a string", id="upload_url is a number"),
    ],
)
def test_a_wrong_link_fails_the_job(job_input: Json, code: int, message: str) -> None:
    (output,) = linked(job_input, echo)
    assert error_of(output)["code"] == code
    assert message in error_of(output)["message"]
    assert error_of(output)["param"] in job_input


def test_a_link_that_leads_nowhere_fails_the_job_and_is_logged_like_any_other(
    links: LinkServer, caplog: pytest.LogCaptureFixture
) -> None:
    usage, link = Usage(), f"{links.url}/nothing?token={SECRET}"
    with caplog.at_level(logging.INFO):
        (output,) = linked({"input_url": link}, echo, usage=usage)
    assert error_of(output)["message"] == "'input_url': the link's server answered with HTTP status 404."
    assert error_of(output)["code"] == 422
    assert "Job job-1 client_error" in caplog.text
    assert "nothing" not in caplog.text
    assert usage.rejections == ["refused_by_server"]


def test_a_link_into_the_private_network_is_not_followed(links: LinkServer) -> None:
    policy = Policy(ports=(links.server_port,))
    (output,) = linked({"input_url": links.hold("a", CHAT)}, echo, policy=policy)
    assert error_of(output)["message"] == "'input_url': the link does not lead to a public address."
    assert error_of(output)["code"] == 403
    assert not links.requests


def test_the_time_of_a_request_begins_after_its_input_is_fetched(links: LinkServer) -> None:
    job_input = {"input_url": links.hold("a", CHAT).replace("/held/", "/late/0.3/held/")}
    assert linked(job_input, echo, Settings(request_timeout=0.2)) == [{"path": "/v1/chat/completions", "body": CHAT}]


def test_an_input_waits_for_the_memory_that_other_requests_hold(links: LinkServer) -> None:
    settings = Settings(max_total_request_bytes=1000)
    lifecycle = Lifecycle()
    lifecycle.ready(lambda: False)
    pipeline = Pipeline(settings, lifecycle, Telemetry("model", CollectorRegistry()))
    job_handler = JobHandler(echo, pipeline, settings, LinkedInputs(OPEN, settings))
    link, too_large = (links.hold(str(size), {"prompt": "x" * size}) for size in (400, 1100))

    async def run() -> list[Any]:
        other = pipeline.memory.account()
        await other.take(800)
        collecting = asyncio.create_task(collect(job_handler, {"input_url": link}))
        await asyncio.to_thread(links.answered.wait)
        await asyncio.sleep(0.1)
        assert not collecting.done()
        other.close()
        return [*await collecting, *await collect(job_handler, {"input_url": too_large})]

    output, failed = asyncio.run(run())
    assert isinstance(output, dict)
    assert output["path"] == "/v1/completions"
    assert "MAX_TOTAL_REQUEST_BYTES=1000" in error_of(failed)["message"]


@pytest.mark.parametrize("ends", ["cancelled", "over"])
def test_a_fetch_ends_with_its_job_or_with_the_worker(links: LinkServer, ends: str) -> None:
    lifecycle = Lifecycle()
    lifecycle.ready(lambda: False)
    pipeline = Pipeline(DEFAULTS, lifecycle, Telemetry("model", CollectorRegistry()))
    job_handler = JobHandler(echo, pipeline, DEFAULTS, LinkedInputs(OPEN, DEFAULTS))
    job_input = {"input_url": links.hold("a", CHAT).replace("/held/", "/late/30/held/")}

    async def run() -> None:
        collecting = asyncio.create_task(collect(job_handler, job_input))
        await asyncio.to_thread(links.arrived.wait)
        if ends == "over":
            lifecycle.over.set()
            (output,) = await collecting
            assert error_of(output)["message"] == LEAVING
        else:
            collecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await collecting
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert pipeline.memory.held == 0


@pytest.mark.parametrize("link", ["https://example.com/put", None])
def test_the_link_for_a_result_does_not_reach_the_engine(link: str | None) -> None:
    assert linked({**CHAT, "upload_url": link}, echo) == [{"path": "/v1/chat/completions", "body": CHAT}]
    assert outputs(echo, {**openai(), "upload_url": link}) == [{"path": "/v1/chat/completions", "body": CHAT}]


def test_the_link_for_a_result_may_stand_beside_the_link_for_an_input(links: LinkServer) -> None:
    job_input = {"input_url": links.hold("a", CHAT), "upload_url": "https://example.com/put"}
    assert linked(job_input, echo) == [{"path": "/v1/chat/completions", "body": CHAT}]
