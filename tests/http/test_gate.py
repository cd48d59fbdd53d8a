"""The gate over real sockets, with scripted engines: which requests reach the engine, and how others are refused."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest

from tests.http.serving import (
    CHAT,
    Endless,
    ServedWorker,
    begin_stream,
    error_of,
    open_stream,
    read_all,
    serving,
    upload,
    wait_until,
)
from worker.errors import LEAVING
from worker.request.asgi import Receive, Send


@pytest.fixture(scope="module")
def echoing() -> Iterator[ServedWorker]:
    """A ready worker with default settings, whose engine answers with the request."""
    with serving() as worker:
        yield worker


def test_a_request_reaches_the_engine_unchanged(echoing: ServedWorker) -> None:
    received = echoing.post(json={"a": 1}, headers={"x-extra": "yes"}).json()
    assert (received["path"], received["bytes"], received["headers"]["x-extra"]) == (CHAT, 7, "yes")


# ---- Request ids


def test_the_engine_and_the_response_have_the_callers_request_id(echoing: ServedWorker) -> None:
    response = echoing.post(headers={"X-Request-ID": "caller-1"})
    assert (response.headers["x-request-id"], response.json()["headers"]["x-request-id"]) == ("caller-1", "caller-1")


def test_a_request_without_an_id_gets_a_new_one(echoing: ServedWorker) -> None:
    request_id = echoing.post().headers["x-request-id"]
    assert len(request_id) == 32
    assert request_id != echoing.post().headers["x-request-id"]


@pytest.mark.parametrize("request_id", ["x" * 129, "with space", "t\tab", "é"])
def test_an_invalid_request_id_is_replaced(echoing: ServedWorker, request_id: str) -> None:
    response = echoing.post(headers={"x-request-id": request_id.encode("latin-1")})
    assert len(response.headers["x-request-id"]) == 32


# ---- States


def test_requests_are_refused_unless_the_worker_is_ready() -> None:
    with serving(ready=False) as worker:
        refused = worker.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "loading its model" in error_of(refused)["message"]
        worker.become_ready()
        assert worker.post().status_code == 200
        worker.lifecycle.stopping.set()
        assert "is shutting down" in error_of(worker.post())["message"]
        worker.lifecycle.ready(engine_is_dead=lambda: True)
        assert "has died" in error_of(worker.post())["message"]


def test_a_worker_with_wrong_settings_gives_every_caller_the_reason() -> None:
    with serving(ready=False) as worker:
        worker.lifecycle.refuse("MODEL_NAME='x': no such model")
        for response in (worker.post(), worker.get("/v1/models"), worker.get("/nothing")):
            assert response.status_code == 503
            assert "MODEL_NAME='x': no such model" in error_of(response)["message"]


def test_an_upload_that_completes_after_the_stop_is_refused() -> None:
    with serving() as worker, upload(worker, "Content-Length: 2", b"{") as connection:
        wait_until("the first byte of the body is received", lambda: worker.memory.held == 1)
        worker.lifecycle.stopping.set()
        connection.sendall(b"}")
        assert b"shutting down" in connection.recv(65536)


# ---- Routes and keys


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/nothing", 404, id="unknown route"),
        pytest.param("POST", "/v1/load_lora_adapter", 404, id="control route"),
        pytest.param("POST", "/v1/../v1/load_lora_adapter", 404, id="control route with dots"),
        pytest.param("GET", CHAT, 405, id="GET to a POST route"),
        pytest.param("POST", "/v1/models", 405, id="POST to a GET route"),
        pytest.param("DELETE", "/health", 405, id="DELETE to the worker's own route"),
    ],
)
def test_other_routes_and_methods_are_refused(echoing: ServedWorker, method: str, path: str, status: int) -> None:
    response = httpx.request(method, f"{echoing.url}{path}")
    assert response.status_code == status
    assert error_of(response)["message"]
    assert status != 405 or response.headers["allow"] in ("GET", "POST")


def test_control_routes_can_be_allowed() -> None:
    with serving(allow_control_routes=True) as worker:
        assert worker.post("/v1/load_lora_adapter").status_code == 200


def test_a_queue_worker_offers_only_its_own_routes() -> None:
    with serving(worker_mode="queue") as worker:
        assert "Available routes: /ping, /health, /info, /metrics." in error_of(worker.post())["message"]
        assert worker.get("/metrics").status_code == 200


def test_a_websocket_is_refused(echoing: ServedWorker) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "x"}
    assert echoing.get("/v1/realtime", headers=upgrade).status_code in (400, 403, 404, 426)


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        pytest.param({}, CHAT, 401, id="no key"),
        pytest.param({"authorization": "Bearer wrong"}, CHAT, 401, id="wrong key"),
        pytest.param({"authorization": "Bearer one,two"}, CHAT, 401, id="the whole list of keys"),
        pytest.param({"authorization": "Basic one"}, CHAT, 401, id="another scheme"),
        pytest.param({"authorization": "Bearer two"}, CHAT, 200, id="the second key"),
        pytest.param({"x-api-key": "one"}, CHAT, 200, id="Anthropic's header"),
        pytest.param({}, "/info", 401, id="info without a key"),
        pytest.param({}, "/metrics", 401, id="metrics without a key"),
        pytest.param({}, "/ping", 200, id="ping without a key"),
        pytest.param({}, "/health", 200, id="health without a key"),
    ],
)
def test_all_routes_but_ping_and_health_need_a_valid_key(headers: dict[str, str], path: str, status: int) -> None:
    with serving(worker_api_key="one, two") as worker:
        response = worker.post(headers=headers) if path == CHAT else worker.get(path, headers=headers)
        assert response.status_code == status
        assert status != 401 or "WORKER_API_KEY" in error_of(response)["message"]


@pytest.mark.parametrize(("key", "name"), [("one", "ann"), ("two", None)])
def test_the_log_line_of_a_request_has_the_name_of_its_key(
    key: str, name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), serving(worker_api_key="ann:one, two") as worker:
        assert worker.post(headers={"x-api-key": f"ann:{key}"}).status_code == 401
        assert worker.post(headers={"x-api-key": key}).status_code == 200
    (line,) = (vars(record) for record in caplog.records if "outcome" in vars(record))
    assert line["key"] == name


def test_a_cors_preflight_needs_no_key_but_other_options_requests_do() -> None:
    preflight = {"origin": "http://page.example", "access-control-request-method": "POST"}
    with serving(worker_api_key="key") as worker:
        assert httpx.options(f"{worker.url}{CHAT}").status_code == 401
        assert httpx.options(f"{worker.url}{CHAT}", headers={"authorization": "Bearer key"}).status_code == 405
        assert httpx.options(f"{worker.url}{CHAT}", headers=preflight).status_code == 200
        assert worker.outcomes() == []


def test_refused_requests_are_counted() -> None:
    with serving(worker_api_key="key") as worker:
        worker.post()
        assert 'worker_refused_total{status="401"} 1.0' in generate_latest(worker.telemetry.registry).decode()


# ---- Request bodies


def test_a_body_whose_declared_length_exceeds_the_limit_is_refused_unread(echoing: ServedWorker) -> None:
    with upload(echoing, "Content-Length: 30000001", b"{") as connection:
        response = read_all(connection)
    assert response.startswith(b"HTTP/1.1 413")
    assert b"MAX_REQUEST_BYTES=30000000" in response


def test_a_body_of_undeclared_length_is_refused_once_it_exceeds_the_limit() -> None:
    with serving(max_request_bytes=1000) as worker:
        response = worker.post(json=None, content=iter([b"x" * 600, b"x" * 600]))
        assert response.status_code == 413
        assert error_of(response)["message"]
        assert worker.post(json=None, content=b"x" * 1000).status_code == 200


def test_a_stalled_upload_gets_408() -> None:
    with serving(body_seconds=0.1) as worker, upload(worker, "Content-Length: 9", b"{") as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_an_incomplete_body_never_reaches_the_engine() -> None:
    bodies: list[bytes] = []

    async def engine(_scope: Any, receive: Receive, send: Send) -> None:
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with serving(engine) as worker:
        with upload(worker, "Content-Length: 900", b"{"), upload(worker, "Transfer-Encoding: chunked", b"2\r\n{}\r\n"):
            pass
        assert worker.post().status_code == 200
        wait_until("all three jobs end", lambda: sorted(worker.outcomes()) == ["cancelled", "cancelled", "ok"])
    assert bodies == [b"{}"]


def test_an_upload_waits_while_others_hold_the_memory() -> None:
    with (
        serving(max_total_request_bytes=1_000_000) as worker,
        upload(worker, "Content-Length: 900000", b"x" * 700_000) as first,
    ):
        wait_until("the worker holds the first body", lambda: worker.memory.held == 700_000)
        with upload(worker, "Content-Length: 900000", b"x" * 700_000) as second:
            wait_until("the worker holds a part of the second", lambda: worker.memory.held > 900_000)
            first.close()
            second.sendall(b"x" * 200_000)
            assert second.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_declared_body_takes_no_memory_before_it_arrives() -> None:
    with serving(max_total_request_bytes=1_000_000) as worker, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(upload(worker, "Content-Length: 900000", b"{"))
        assert worker.post(json=None, content=b"x" * 900_000).status_code == 200


def test_the_memory_of_the_bodies_of_running_requests_is_bounded() -> None:
    async def waiting(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        await receive()

    with (
        serving(waiting, concurrency=100, max_total_request_bytes=20_000_000) as worker,
        ThreadPoolExecutor(8) as pool,
    ):
        posts = [pool.submit(worker.post, json=None, content=b"x" * 19_000_000) for _ in range(8)]
        wait_until("one request runs; the others wait or are refused", lambda: worker.gate.running == 1)
        assert 19_000_000 <= worker.memory.held <= 20_000_000
        worker.end_requests()
        assert {post.result().status_code for post in posts} <= {429, 503}
        wait_until("no memory is held", lambda: (worker.gate.running, worker.memory.held) == (0, 0))


# ---- Load and disconnects


def test_a_full_worker_answers_429() -> None:
    with serving(Endless(), concurrency=2, max_queue=1) as worker, ExitStack() as streams:
        for _ in range(3):
            streams.enter_context(open_stream(worker))
        refused = worker.post()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "3 requests" in error_of(refused)["message"]
        assert worker.get("/health").json()["jobs"] == 3
    assert sorted(worker.outcomes()) == ["cancelled"] * 3


def test_500_requests_at_once_are_answered_or_refused(echoing: ServedWorker) -> None:
    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=echoing.url, limits=limits, timeout=60) as client:
            responses = await asyncio.gather(*(client.post(CHAT, json={}) for _ in range(500)))
        return [response.status_code for response in responses]

    statuses = asyncio.run(run())
    assert len(statuses) == 500
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) > 0
    assert echoing.get("/ping").status_code == 200


def test_200_slow_uploads_do_not_delay_other_requests(echoing: ServedWorker) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(upload(echoing, "Content-Length: 9", b"{"))
        assert echoing.post().status_code == 200
        assert echoing.get("/ping").status_code == 200


def test_a_client_that_does_not_read_its_stream_does_not_delay_others() -> None:
    engine = Endless(chunk=b"data: " + b"x" * 100_000 + b"\n\n", pause=0)
    with serving(engine) as worker, upload(worker, "Content-Length: 2", b"{}") as connection:
        wait_until("the stream runs", lambda: worker.gate.running == 1)
        time.sleep(0.3)
        assert worker.get("/health").json()["jobs"] == 1
        connection.close()
        assert engine.disconnected.wait(timeout=10)


def test_the_engine_sees_the_disconnect_of_a_client() -> None:
    engine = Endless()
    with serving(engine) as worker:
        with open_stream(worker) as first:
            assert first.startswith(b"data:")
        assert engine.disconnected.wait(timeout=10)
        wait_until("the job counts as cancelled", lambda: worker.outcomes() == ["cancelled"])


# ---- Time limits and errors


def test_the_engine_sees_a_disconnect_when_a_request_times_out() -> None:
    """Cancelling the app would not be enough: vLLM runs a request's handler in a task of its own."""
    disconnected = threading.Event()

    async def handler(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()

        async def wait_for_client() -> None:
            if (await receive())["type"] == "http.disconnect":
                disconnected.set()

        await asyncio.create_task(wait_for_client())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with serving(handler, request_timeout=0.2) as worker:
        assert worker.post().status_code == 504
        assert disconnected.wait(timeout=10)


def test_a_stream_that_times_out_ends_with_an_error_event() -> None:
    with serving(Endless(), request_timeout=0.2) as worker:
        response = worker.post()
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"code": 504' in response.text
        assert worker.outcomes() == ["timeout"]


def test_a_request_that_times_out_before_its_response_gets_504() -> None:
    async def silent(_scope: Any, receive: Receive, _send: Send) -> None:
        await receive()
        await asyncio.sleep(60)

    with serving(silent, request_timeout=0.2) as worker:
        response = worker.post()
        assert response.status_code == 504
        assert "REQUEST_TIMEOUT=0.2" in error_of(response)["message"]
        assert worker.outcomes() == ["timeout"]


BEGUN = pytest.mark.parametrize(
    "begun", [pytest.param(True, id="during the stream"), pytest.param(False, id="before the response")]
)


@BEGUN
def test_an_exception_of_the_engine_is_reported_without_its_message(begun: bool) -> None:
    async def broken(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        if begun:
            await begin_stream(send)
        raise LookupError("a secret of the engine")

    with serving(broken) as worker:
        response = worker.post()
        assert "secret" not in response.text
        assert "Its log has the cause" in response.text
        assert begun or error_of(response)["code"] == 500
        assert worker.outcomes() == ["engine_error"]
        assert worker.get("/health").json()["last_error"]["status"] == 500


# ---- Shutdown


def test_drained_waits_for_running_requests() -> None:
    engine = Endless()
    with serving(engine) as worker:
        with open_stream(worker):
            began = time.monotonic()
            asyncio.run(worker.gate.drained(seconds=0.2))
            assert time.monotonic() - began >= 0.2
        assert engine.disconnected.wait(timeout=10)
        asyncio.run(worker.gate.drained(seconds=10))
        assert worker.gate.running == 0


@BEGUN
def test_a_request_that_runs_at_the_end_of_the_worker_gets_an_error(begun: bool) -> None:
    async def silent(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        if begun:
            await begin_stream(send)
        await receive()

    with serving(silent) as worker, ThreadPoolExecutor(1) as pool:
        post = pool.submit(worker.post)
        wait_until("the request runs", lambda: worker.gate.running == 1)
        worker.end_requests()
        response = post.result()
        assert LEAVING in response.text
        assert response.status_code == (200 if begun else 503)
        assert not begun or response.text.endswith("data: [DONE]\n\n")
        assert worker.outcomes() == ["engine_error"]


# ---- Input that is not HTTP


def test_bytes_that_are_not_http_get_400(echoing: ServedWorker) -> None:
    with socket.create_connection(("127.0.0.1", echoing.port), timeout=10) as connection:
        connection.sendall(b"\x00\xff\x00 nonsense\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 400")
    assert echoing.post().status_code == 200
