"""The gate and its server over real sockets, with scripted engines: what is let through, and what is not."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tests.support.ports import free_port
from worker.errors import LEAVING, ConfigurationError
from worker.http.gate import Gate
from worker.http.own_routes import OwnRoutes
from worker.http.server import HttpServer
from worker.lifecycle import Lifecycle
from worker.request.asgi import App, Receive, Send
from worker.request.pipeline import Pipeline
from worker.settings.settings import Settings
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import StartupPhases

CHAT = "/v1/chat/completions"


async def echo(scope: Any, receive: Receive, send: Send) -> None:
    """Answer with what arrived."""
    body = (await receive())["body"]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer = json.dumps({"path": scope["path"], "bytes": len(body), "headers": headers}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": answer})


class Endless:
    """Streams until its client leaves."""

    def __init__(self, chunk: bytes = b'data: {"n": 1}\n\n', pause: float = 0.01) -> None:
        self.chunk = chunk
        self.pause = pause
        self.left = threading.Event()

    async def __call__(self, _scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        writing = asyncio.create_task(self._write(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.left.set()

    async def _write(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": self.chunk, "more_body": True})
            await asyncio.sleep(self.pause)


class Worker:
    """A served gate."""

    def __init__(self, engine: App, concurrency: int, chosen: Settings, **gate: Any) -> None:
        registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.telemetry = Telemetry("model", registry)
        own_routes = OwnRoutes(self.lifecycle, self.telemetry, chosen, StartupPhases(registry))
        pipeline = Pipeline(chosen, self.lifecycle, self.telemetry)
        self.memory = pipeline.memory
        self.gate = Gate(own_routes, self.lifecycle, self.telemetry, chosen, pipeline, **gate)
        self.engine = engine
        self.concurrency = concurrency
        self.port = 0
        self.server: HttpServer | None = None

    def ready(self) -> None:
        self.gate.open(self.engine, self.concurrency)
        self.lifecycle.ready(lambda: False)

    def end(self) -> None:
        async def end() -> None:
            self.lifecycle.stopping.set()
            self.lifecycle.over.set()

        if self.server is not None:
            self.server.run(end())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10, **options)

    def post(self, path: str = CHAT, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=10, **({"json": {}} | options))

    def outcomes(self) -> list[str]:
        """Return the outcomes of the jobs that have ended, as soon as there are any: an answer is sent before."""
        for _ in range(50):
            if found := self._outcomes():
                return found
            time.sleep(0.02)
        return []

    def _outcomes(self) -> list[str]:
        families = self.telemetry.registry.collect()
        return [
            sample.labels["outcome"]
            for family in families
            for sample in family.samples
            if sample.name == "worker_jobs_total"
            for _ in range(int(sample.value))
        ]


@contextmanager
def serving(
    engine: App = echo,
    concurrency: int = 4,
    *,
    ready: bool = True,
    body_seconds: float = 60.0,
    **given_settings: Any,
) -> Iterator[Worker]:
    chosen = Settings.model_validate({"worker_mode": "http", **given_settings})
    worker = Worker(engine, concurrency, chosen, body_seconds=body_seconds)
    with HttpServer(worker.gate, [0], host="127.0.0.1") as server:
        (worker.port,) = server.ports
        if ready:
            worker.ready()
        worker.server = server
        yield worker


@contextmanager
def open_stream(worker: Worker) -> Iterator[bytes]:
    """Start a stream and give its first bytes; leave it at the end of the block."""
    with httpx.stream("POST", f"{worker.url}{CHAT}", json={}) as answer:
        # An iterator that is let go of closes the stream.
        parts = answer.iter_bytes()
        yield next(parts)


@pytest.fixture(scope="module")
def plain() -> Iterator[Worker]:
    with serving() as worker:
        yield worker


def error(answer: httpx.Response) -> dict[str, Any]:
    """Return OpenAI's error object, which every refusal must carry."""
    value = answer.json()["error"]
    assert value.keys() == {"message", "type", "param", "code"}
    assert value["code"] == answer.status_code
    assert answer.headers["x-request-id"]
    return dict(value)


def test_a_request_reaches_the_engine_as_it_is(plain: Worker) -> None:
    seen = plain.post(json={"a": 1}, headers={"x-extra": "yes"}).json()
    assert (seen["path"], seen["bytes"], seen["headers"]["x-extra"]) == (CHAT, 7, "yes")


def test_the_requests_id_is_taken_or_made(plain: Worker) -> None:
    answer = plain.post(headers={"X-Request-ID": "mine"})
    assert (answer.headers["x-request-id"], answer.json()["headers"]["x-request-id"]) == ("mine", "mine")
    made = plain.post().headers["x-request-id"]
    assert len(made) == 32
    assert made != plain.post().headers["x-request-id"]


def test_states() -> None:
    with serving(ready=False) as worker:
        assert worker.get("/ping").status_code == 204
        assert (worker.get("/health").status_code, worker.get("/health").json()["status"]) == (503, "starting")
        refused = worker.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "loading its model" in error(refused)["message"]
        worker.ready()
        assert worker.get("/ping").status_code == 200
        assert (worker.get("/health").status_code, worker.get("/health").json()["status"]) == (200, "ready")
        assert worker.post().status_code == 200
        worker.lifecycle.stopping.set()
        assert worker.get("/ping").status_code == 503
        assert "is shutting down" in error(worker.post())["message"]
        worker.lifecycle.ready(engine_is_dead=lambda: True)
        assert (worker.get("/ping").status_code, worker.get("/health").json()["status"]) == (503, "dead")
        assert "has died" in error(worker.post())["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/nothing", 404, id="unknown"),
        pytest.param("POST", "/v1/load_lora_adapter", 404, id="control route"),
        pytest.param("POST", "/v1/../v1/load_lora_adapter", 404, id="dots"),
        pytest.param("GET", CHAT, 405, id="wrong method"),
        pytest.param("DELETE", "/health", 405, id="wrong method of the worker's own"),
        pytest.param("POST", "/v1/models", 405, id="post to a get route"),
    ],
)
def test_what_is_not_offered(plain: Worker, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{plain.url}{path}")
    assert answer.status_code == status
    error(answer)
    assert status != 405 or answer.headers["allow"] in ("GET", "POST")


def test_control_routes_can_be_allowed() -> None:
    with serving(allow_control_routes=True) as worker:
        assert worker.post("/v1/load_lora_adapter").status_code == 200


def test_a_worker_of_the_queue_offers_only_its_own_routes() -> None:
    with serving(worker_mode="queue") as worker:
        assert "Available routes: /ping, /health, /info, /metrics." in error(worker.post())["message"]
        assert worker.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        pytest.param({}, CHAT, 401, id="none"),
        pytest.param({"authorization": "Bearer wrong"}, CHAT, 401, id="wrong"),
        pytest.param({"authorization": "Bearer one,two"}, CHAT, 401, id="both at once"),
        pytest.param({"authorization": "Basic one"}, CHAT, 401, id="another scheme"),
        pytest.param({"authorization": "Bearer two"}, CHAT, 200, id="the second"),
        pytest.param({"x-api-key": "one"}, CHAT, 200, id="Anthropic's header"),
        pytest.param({}, "/info", 401, id="info"),
        pytest.param({}, "/metrics", 401, id="metrics"),
        pytest.param({}, "/ping", 200, id="ping"),
        pytest.param({}, "/health", 200, id="health"),
    ],
)
def test_keys(headers: dict[str, str], path: str, status: int) -> None:
    with serving(worker_api_key="one, two") as worker:
        answer = worker.post(headers=headers) if path == CHAT else worker.get(path, headers=headers)
        assert answer.status_code == status
        assert status != 401 or "WORKER_API_KEY" in error(answer)["message"]


def test_no_key_is_told() -> None:
    with serving(worker_api_key="hush-hush", vllm_extra_args="--api-key hush-hush") as worker:
        info = worker.get("/info", headers={"authorization": "Bearer hush-hush"})
        assert info.json()["settings"]["worker_api_key"] == "***"
        assert "hush" not in info.text


def test_a_large_body_is_refused_before_it_is_read(plain: Worker) -> None:
    with socket.create_connection(("127.0.0.1", plain.port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 30000001\r\n\r\n{{".encode())
        answer = _all_of(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"MAX_REQUEST_BYTES=30000000" in answer


def test_a_large_body_of_unknown_length_is_refused() -> None:
    with serving(max_request_bytes=1000) as worker:
        answer = worker.post(json=None, content=iter([b"x" * 600, b"x" * 600]))
        assert answer.status_code == 413
        error(answer)
        assert worker.post(json=None, content=b"x" * 1000).status_code == 200


def test_a_full_worker_refuses_at_once() -> None:
    engine = Endless()
    with serving(engine, concurrency=2, max_queue=1) as worker, ExitStack() as streams:
        for _ in range(3):
            streams.enter_context(open_stream(worker))
        refused = worker.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "3 requests" in error(refused)["message"]
        assert worker.get("/health").json()["jobs"] == 3
    assert sorted(worker.outcomes()) == ["cancelled"] * 3


def test_a_client_that_leaves_a_stream_ends_it() -> None:
    engine = Endless()
    with serving(engine) as worker:
        with open_stream(worker) as first:
            assert first.startswith(b"data:")
        assert engine.left.wait(timeout=10)
        _wait_for(lambda: worker.outcomes() == ["cancelled"])


def test_a_client_that_stops_reading_holds_up_nobody_else() -> None:
    engine = Endless(chunk=b"data: " + b"x" * 100_000 + b"\n\n", pause=0)
    with serving(engine) as worker, socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        _wait_for(lambda: worker.gate.running == 1)
        time.sleep(0.3)
        assert worker.get("/health").json()["jobs"] == 1
        connection.close()
        assert engine.left.wait(timeout=10)


def test_slow_requests_hold_up_nobody_else(plain: Worker) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", plain.port), timeout=10))
            connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert plain.post().status_code == 200
        assert plain.get("/ping").status_code == 200


def test_a_body_that_does_not_come_is_given_up() -> None:
    with (
        serving(body_seconds=0.1) as worker,
        socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection,
    ):
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{".encode())
        assert _all_of(connection).startswith(b"HTTP/1.1 408")


def test_five_hundred_connections_at_once(plain: Worker) -> None:
    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=plain.url, limits=limits, timeout=60) as client:
            answers = await asyncio.gather(*(client.post(CHAT, json={}) for _ in range(500)))
        return [answer.status_code for answer in answers]

    statuses = asyncio.run(run())
    assert len(statuses) == 500
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) > 0
    assert plain.get("/ping").status_code == 200


def test_a_body_that_is_cut_never_runs() -> None:
    bodies: list[bytes] = []

    async def engine(_scope: Any, receive: Receive, send: Send) -> None:
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with serving(engine) as worker:
        for request in (b"Content-Length: 900\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"):
            with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
                connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\n" + request)
        assert worker.post().status_code == 200
        _wait_for(lambda: sorted(worker.outcomes()) == ["cancelled", "cancelled", "ok"])
    assert bodies == [b"{}"]


def test_the_memory_of_bodies_that_arrive_is_bounded() -> None:
    with serving(max_total_request_bytes=1_000_000) as worker, ExitStack() as stack:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n".encode()
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10))
            connection.sendall(head + b"x" * 700_000)
            _wait_for(lambda: worker.memory.held == 700_000)
        assert b"MAX_TOTAL_REQUEST_BYTES=1000000" in _all_of(connection)
        assert worker.post().status_code == 200


def test_a_body_that_is_announced_but_not_sent_takes_no_memory() -> None:
    with serving(max_total_request_bytes=1_000_000) as worker, ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=10))
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n{{".encode())
        assert worker.post(json=None, content=b"x" * 900_000).status_code == 200


def test_the_memory_of_bodies_that_wait_is_bounded() -> None:
    async def waiting(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        await receive()

    with (
        serving(waiting, concurrency=100, max_total_request_bytes=20_000_000) as worker,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(worker.post, json=None, content=bytes(19_000_000)) for _ in range(8)]
        _wait_for(lambda: sum(one.done() for one in asked) == 7 and worker.gate.running == 1)
        assert (worker.gate.running, worker.memory.held) == (1, 19_000_000)
        worker.end()
        assert sorted(one.result().status_code for one in asked) == [429] * 7 + [503]
        assert (worker.gate.running, worker.memory.held) == (0, 0)


@pytest.mark.parametrize("named", ["x" * 129, "with space", "t\tab", "é"])
def test_an_odd_request_id_is_replaced(plain: Worker, named: str) -> None:
    assert len(plain.post(headers={"x-request-id": named.encode("latin-1")}).headers["x-request-id"]) == 32


def test_only_a_browsers_preflight_goes_without_a_key() -> None:
    preflight = {"origin": "http://page.example", "access-control-request-method": "POST"}
    with serving(worker_api_key="key") as worker:
        assert httpx.options(f"{worker.url}{CHAT}").status_code == 401
        assert httpx.options(f"{worker.url}{CHAT}", headers={"authorization": "Bearer key"}).status_code == 405
        assert httpx.options(f"{worker.url}{CHAT}", headers=preflight).status_code == 200
        assert worker.outcomes() == []


def test_a_request_whose_time_is_up_is_left_by_its_client() -> None:
    """Being cancelled would not do: vLLM runs a request's handler in a task of its own."""
    told = threading.Event()

    async def handler(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()

        async def wait_for_client() -> None:
            if (await receive())["type"] == "http.disconnect":
                told.set()

        await asyncio.create_task(wait_for_client())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with serving(handler, request_timeout=0.2) as worker:
        assert worker.post().status_code == 504
        assert told.wait(timeout=10)


def test_refusals_are_counted() -> None:
    with serving(worker_api_key="key") as worker:
        worker.post()
        assert 'worker_refused_total{status="401"} 1.0' in generate_latest(worker.telemetry.registry).decode()


def test_garbage_is_no_request(plain: Worker) -> None:
    with socket.create_connection(("127.0.0.1", plain.port), timeout=10) as connection:
        connection.sendall(b"\x00\xff\x00 nonsense\r\n\r\n")
        assert _all_of(connection).startswith(b"HTTP/1.1 400")
    assert plain.post().status_code == 200


def test_a_websocket_is_refused(plain: Worker) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "x"}
    assert plain.get("/v1/realtime", headers=upgrade).status_code in (400, 403, 404, 426)


@pytest.mark.parametrize("streaming", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_a_request_that_takes_too_long(streaming: bool) -> None:
    async def silent(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        await asyncio.sleep(60)

    with serving(Endless() if streaming else silent, request_timeout=0.2) as worker:
        answer = worker.post()
        if streaming:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"code": 504' in answer.text
        else:
            assert answer.status_code == 504
            assert "REQUEST_TIMEOUT=0.2" in error(answer)["message"]
        assert worker.outcomes() == ["timeout"]


@pytest.mark.parametrize("begun", [pytest.param(True, id="in the stream"), pytest.param(False, id="before the answer")])
def test_an_engine_that_breaks(begun: bool) -> None:
    async def broken(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        if begun:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise LookupError("a secret of the engine")

    with serving(broken) as worker:
        answer = worker.post()
        assert "secret" not in answer.text
        assert "Its log has the cause" in answer.text
        assert begun or error(answer)["code"] == 500
        assert worker.outcomes() == ["engine_error"]
        assert worker.get("/health").json()["last_error"]["status"] == 500


def test_the_drain_waits_for_what_runs() -> None:
    engine = Endless()
    with serving(engine) as worker:
        with open_stream(worker):
            began = time.monotonic()
            asyncio.run(worker.gate.drained(seconds=0.2))
            assert time.monotonic() - began >= 0.2
        assert engine.left.wait(timeout=10)
        asyncio.run(worker.gate.drained(seconds=10))
        assert worker.gate.running == 0


@pytest.mark.parametrize("begun", [pytest.param(True, id="streams"), pytest.param(False, id="not yet begun")])
def test_what_still_runs_in_the_end_is_told_why(begun: bool) -> None:
    async def silent(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        if begun:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await receive()

    with serving(silent) as worker, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(worker.post)
        while not worker.gate.running:
            time.sleep(0.01)
        worker.end()
        answer = asked.result()
        assert LEAVING in answer.text
        assert answer.status_code == (200 if begun else 503)
        assert not begun or answer.text.endswith("data: [DONE]\n\n")
        assert worker.outcomes() == ["engine_error"]


def test_a_worker_that_cannot_start_says_why_to_everybody() -> None:
    with serving(ready=False) as worker:
        worker.lifecycle.refuse("MODEL_NAME='x': no such model")
        assert worker.get("/ping").status_code == 503
        assert worker.get("/health").json()["status"] == "refused"
        for answer in (worker.post(), worker.get("/v1/models"), worker.get("/nothing")):
            assert answer.status_code == 503
            assert "MODEL_NAME='x': no such model" in error(answer)["message"]


def test_an_upload_that_ends_while_the_worker_stops_starts_nothing() -> None:
    with serving() as worker, socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{".encode())
        _wait_for(lambda: worker.memory.held == 1)
        worker.lifecycle.stopping.set()
        connection.sendall(b"}")
        assert b"shutting down" in connection.recv(65536)


def test_several_ports_are_served_alike() -> None:
    with serving() as worker, HttpServer(worker.gate, [0, free_port()], host="127.0.0.1") as server:
        assert [httpx.get(f"http://127.0.0.1:{port}/ping").status_code for port in server.ports] == [200, 200]


def test_a_port_in_use_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigurationError, match="cannot be opened: Address already in use"),
    ):
        HttpServer(echo, [taken.getsockname()[1]], host="127.0.0.1")


def test_the_document_names_the_workers_own_routes(plain: Worker) -> None:
    assert plain.get("/openapi.json").json()["paths"].keys() == {"/ping", "/health", "/info", "/metrics"}


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(["/ping", "/health", "/info", "/metrics"]),
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "TRACE"]),
    query=st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3),
    headers=st.dictionaries(
        st.sampled_from(["accept", "content-type", "x-request-id", "traceparent", "authorization", "range"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).map(str.strip),
        max_size=3,
    ),
    body=st.binary(max_size=100),
    state=st.sampled_from(["starting", "ready", "draining", "failed", "dead", "refused"]),
)
def test_the_own_routes_keep_to_their_document(
    fuzzed: tuple[Worker, httpx.Client, Any],
    path: str,
    method: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    state: Any,
) -> None:
    worker, client, document = fuzzed
    worker.lifecycle._state = state
    answer = client.request(method, path, params=query, headers=headers, content=body)
    if method != "GET":
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET"
        return
    documented = document["paths"][path]["get"]["responses"]
    assert str(answer.status_code) in documented
    content = documented[str(answer.status_code)].get("content", {})
    if schema := content.get("application/json", {}).get("schema"):
        jsonschema.validate(answer.json(), schema | {"components": document["components"]})


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Worker, httpx.Client, Any]]:
    with serving() as worker, httpx.Client(base_url=worker.url, timeout=10) as client:
        yield worker, client, client.get("/openapi.json").json()


def _all_of(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def _wait_for(condition: Any) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to that")
