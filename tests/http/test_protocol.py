"""The limits of a connection over real sockets: heads, deadlines, number, clients that do not read, refused bodies."""

import http.client
import json
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest

from tests.http.serving import (
    CHAT,
    EVENT_STREAM,
    Endless,
    ServedWorker,
    echo,
    error_of,
    open_stream,
    read_all,
    send_all,
    serving,
    upload,
    wait_until,
)
from worker.http.protocol import Limits, Waiting
from worker.request.asgi import Receive, Send

PING = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSED_SOON = Limits(head_seconds=0.4, send_seconds=0.4, discard_seconds=0.4)


def connect(worker: ServedWorker) -> socket.socket:
    return socket.create_connection(("127.0.0.1", worker.port), timeout=20)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedWorker]:
    """A ready worker with default limits, whose engine answers with the request."""
    with serving() as worker:
        yield worker


# ---- Heads


@pytest.mark.parametrize(
    ("start", "flood"),
    [
        pytest.param(b"GET /ping HTTP/1.1\r\n", b"a: b\r\n", id="many short headers"),
        pytest.param(b"GET /ping HTTP/1.1\r\nhost: x\r\na: ", b"b" * 65_536, id="one header without end"),
        pytest.param(b"GET /", b"a" * 65_536, id="a path without end"),
        pytest.param(b"GET /ping HTTP/1.1\r\n", b"a" * 65_536, id="a header name without end"),
    ],
)
def test_a_head_without_end_is_refused_and_the_connection_closed(
    served: ServedWorker, start: bytes, flood: bytes
) -> None:
    with connect(served) as connection:
        connection.sendall(start)
        for _ in range(100):
            send_all(connection, flood * (65_536 // len(flood)))
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == 431
    assert served.get("/ping").status_code == 200
    assert b'worker_refused_total{status="431"}' in generate_latest(served.telemetry.registry)


@pytest.mark.parametrize(("headers", "status"), [(190, 200), (201, 431), (5000, 431)])
def test_the_number_of_headers_is_bounded(served: ServedWorker, headers: int, status: int) -> None:
    response = served.post(headers={f"a{number}": "b" for number in range(headers)})
    assert response.status_code == status
    assert status == 200 or "200 headers" in error_of(response)["message"]


def test_a_head_of_60_kb_and_one_that_arrives_byte_by_byte_are_accepted(served: ServedWorker) -> None:
    assert served.post(headers={"a": "b" * 60_000}).status_code == 200
    with connect(served) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in PING:
            connection.sendall(bytes([byte]))
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("content", [b"x" * 5_000_000, [b"x", b"x" * 70_000, b"x" * 4_929_999]])
def test_large_bodies_are_not_affected(served: ServedWorker, content: bytes | list[bytes]) -> None:
    answer = served.post(json=None, content=content if isinstance(content, bytes) else iter(content))
    assert answer.json()["bytes"] == 5_000_000


def test_trailers_are_bounded_and_no_headers_of_the_request(served: ServedWorker) -> None:
    with upload(served, "Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\nx-late: 1\r\n\r\n") as connection:
        assert b"x-late" not in connection.recv(65536)
    for trailers in (b"a: b\r\n" * 100_000, b"a: " + b"b" * 600_000):
        with upload(served, "Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n") as connection:
            send_all(connection, trailers)
            assert read_all(connection) == b""
    wait_until("no request is left", lambda: served.gate.running == 0)


def test_64_kb_that_are_not_http_get_one_400(served: ServedWorker) -> None:
    for start in (b"\x00", b"GET /ping HTTP/1.1\r\n\x00"):
        with connect(served) as connection:
            send_all(connection, start + b"a" * (65_536 - len(start)))
            assert re.findall(rb"HTTP/1.1 (\d+) ", read_all(connection)) == [b"400"]


def test_line_ends_without_a_request_are_bounded(served: ServedWorker) -> None:
    with connect(served) as connection:
        send_all(connection, b"\r\n" * 500_000)
        assert read_all(connection) == b""


def test_pipelined_requests_are_answered_in_order_but_their_number_is_bounded(served: ServedWorker) -> None:
    with connect(served) as connection:
        connection.sendall(PING + b"GET /v1/nothing HTTP/1.1\r\n\r\n" + b"GET /ping HTTP/1.0\r\n\r\n")
        assert re.findall(rb"HTTP/1.1 (\d+) ", read_all(connection)) == [b"200", b"404", b"200"]
    with connect(served) as connection:
        send_all(connection, PING * 10_000)
        assert read_all(connection).count(b"HTTP/1.1 200") < 100


# ---- Deadlines


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="an empty line"),
        pytest.param(b"POST / HT", id="half a request line"),
        pytest.param(b"POST / HTTP/1.1\r\nhost: x\r\n", id="half the headers"),
        pytest.param(PING + b"GET /pi", id="half of a second request"),
    ],
)
def test_connections_without_a_complete_head_are_closed(sent: bytes) -> None:
    with serving(limits=CLOSED_SOON) as worker, ExitStack() as stack:
        connections = [stack.enter_context(connect(worker)) for _ in range(50)]
        for connection in connections:
            connection.sendall(sent)
        for connection in connections:
            assert read_all(connection).count(b"HTTP/1.1 200") == sent.count(PING)
        wait_until("no connection is left", lambda: worker.connections == 0)


def test_a_trickle_does_not_extend_the_deadline() -> None:
    with serving(limits=CLOSED_SOON) as worker, connect(worker) as connection:
        connection.sendall(PING)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        while worker.connections and time.monotonic() - began < 20:
            send_all(connection, b"\r\n")
            time.sleep(0.05)
        assert worker.connections == 0


def test_the_deadline_ends_with_the_head() -> None:
    async def slow(_scope: Any, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        time.sleep(0.6)  # noqa: ASYNC251 - longer than the deadline
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    with serving(slow, limits=CLOSED_SOON) as worker, httpx.Client(base_url=worker.url, timeout=20) as client:

        def slow_body() -> Iterator[bytes]:
            yield b"{"
            time.sleep(0.6)
            yield b"}"

        for _ in range(2):
            assert client.post(CHAT, content=slow_body()).status_code == 200
            # An idle connection has the longer limit of a kept-alive one.
            time.sleep(0.6)
        assert worker.connections == 1


# ---- The number of connections


def test_idle_connections_make_room_for_new_ones() -> None:
    with serving(limits=Limits(connections=5)) as worker, ExitStack() as stack:
        idle = [stack.enter_context(connect(worker)) for _ in range(20)]
        for _ in range(3):
            assert worker.get("/ping").status_code == 200
            assert worker.connections <= 5
        for connection in idle[:15]:
            assert read_all(connection) == b""


def test_slow_uploads_make_room_too_but_only_when_no_connection_is_idle() -> None:
    with serving(limits=Limits(connections=4)) as worker, ExitStack() as stack:
        uploads = [stack.enter_context(upload(worker, "Content-Length: 9", b"{")) for _ in range(3)]
        for _ in range(3):
            stack.enter_context(connect(worker))
        assert worker.get("/ping").status_code == 200
        for connection in uploads:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
        stack.enter_context(upload(worker, "Content-Length: 9", b"{"))
        stack.enter_context(upload(worker, "Content-Length: 9", b"{"))
        assert worker.get("/ping").status_code == 200
        uploads[0].settimeout(20)
        assert read_all(uploads[0]) == b""


def test_a_connection_too_many_gets_503_and_running_requests_go_on() -> None:
    with serving(Endless(), limits=Limits(connections=3)) as worker, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(open_stream(worker))
        for _ in range(10):
            refused = worker.get("/ping")
            assert refused.status_code == 503
            assert "no connection left" in error_of(refused)["message"]
            assert worker.connections <= 4
        assert worker.gate.running == 3
        stack.close()
        wait_until("there is room again", lambda: worker.get("/ping").status_code == 200)


def test_the_connections_leave_half_of_the_open_files_to_others() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        rooms = [Waiting(Limits()).make_room({*range(connections)}) for connections in (299, 300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert rooms == [True, False]


# ---- Clients that do not read


def test_a_client_that_does_not_read_its_stream_is_cut_off() -> None:
    engine = Endless(chunk=b"data: " + b"x" * 100_000 + b"\n\n", pause=0)
    with serving(engine, limits=CLOSED_SOON) as worker, upload(worker, "Content-Length: 2", b"{}"):
        assert engine.disconnected.wait(timeout=20)
        wait_until("the connection is closed", lambda: worker.connections == 0)
        wait_until("the job counts as cancelled", lambda: worker.outcomes() == ["cancelled"])


def test_a_client_that_reads_slowly_is_not_cut_off() -> None:
    engine = Endless(chunk=b"x" * 100_000, pause=0)
    with serving(engine, limits=CLOSED_SOON) as worker, upload(worker, "Content-Length: 2", b"{}") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        for _ in range(10):
            time.sleep(0.1)
            for _ in range(100):
                connection.recv(100_000)
        assert worker.connections == 1


@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive"])
def test_a_complete_response_that_nobody_reads_is_thrown_away(header: str) -> None:
    async def large(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        await send({"type": "http.response.body", "body": bytes(50_000_000)})

    with (
        serving(large, limits=CLOSED_SOON) as worker,
        upload(worker, f"{header}\r\nContent-Length: 2", b"{}") as connection,
    ):
        wait_until("the request is answered", lambda: worker.outcomes() == ["ok"])
        wait_until("the connection is closed", lambda: worker.connections == 0)
        assert len(read_all(connection)) < 50_000_000


def test_the_last_bytes_of_a_response_wait_only_for_a_while() -> None:
    """Also if there are too few of them to pause the app."""

    async def engine(_scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        (connection,) = worker.server._server.server_state.connections
        while not connection.transport.get_write_buffer_size():
            await send({"type": "http.response.body", "body": bytes(20_000), "more_body": True})
        await send({"type": "http.response.body"})

    with serving(engine, limits=CLOSED_SOON) as worker, upload(worker, "Connection: close\r\nContent-Length: 2", b"{}"):
        wait_until("the request is answered", lambda: worker.outcomes() == ["ok"])
        wait_until("the connection is closed", lambda: worker.connections == 0)


def test_a_response_is_complete_although_its_client_closes_its_half() -> None:
    with serving(echo) as worker, upload(worker, "Connection: close\r\nContent-Length: 2", b"{}") as connection:
        assert b'"bytes": 2' in read_all(connection)


def test_the_app_sees_the_disconnect_of_a_client_with_pipelined_requests() -> None:
    engine = Endless()
    with serving(engine) as worker:
        with upload(worker, "Content-Length: 2", b"{}" + PING + PING) as connection:
            assert connection.recv(65536)
            wait_until("the stream runs", lambda: worker.gate.running == 1)
        assert engine.disconnected.wait(timeout=20)


# ---- Refused bodies


@pytest.mark.parametrize("header", [{}, {"Connection": "close"}])
@pytest.mark.parametrize(
    ("settings", "status"),
    [
        pytest.param({}, 413, id="too large"),
        pytest.param({"worker_api_key": "key"}, 401, id="without a key"),
    ],
)
def test_a_client_that_writes_before_it_reads_sees_why_it_is_refused(
    settings: dict[str, Any], status: int, header: dict[str, str]
) -> None:
    with serving(**settings) as worker:
        client = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=20)
        client.request("POST", CHAT, body=b"x" * 40_000_000, headers=header)
        response = client.getresponse()
        assert (response.status, json.loads(response.read())["error"]["code"]) == (status, status)
        client.close()


def test_a_connection_whose_refused_body_is_complete_serves_the_next_request() -> None:
    limits = Limits(discard_seconds=0.4, discard_bytes=4_000_000)
    with serving(worker_api_key="key", limits=limits) as worker:
        client = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=20)
        for _ in range(3):
            for headers, status in (({}, 401), ({"authorization": "Bearer key"}, 200)):
                client.request("POST", CHAT, body=b"x" * 3_000_000, headers=headers)
                response = client.getresponse()
                assert (response.status, response.will_close) == (status, False)
                response.read()
            time.sleep(0.6)
        client.close()


@pytest.mark.parametrize(
    ("limits", "more"),
    [
        pytest.param(Limits(discard_seconds=0.4), lambda: b"x", id="too long"),
        pytest.param(Limits(discard_bytes=1_000_000, discard_seconds=60), lambda: b"x" * 100_000, id="too large"),
    ],
)
@pytest.mark.parametrize("header", ["Content-Length: 99999999", "Connection: close\r\nTransfer-Encoding: chunked"])
def test_a_refused_body_is_not_read_for_ever(limits: Limits, more: Callable[[], bytes], header: str) -> None:
    with serving(worker_api_key="key", limits=limits) as worker:
        chunk = f"{len(more()):x}\r\n".encode() if "chunked" in header else b""
        with upload(worker, header) as connection:
            for _ in range(200):
                if not worker.connections:
                    break
                send_all(connection, chunk + more() + (b"\r\n" if chunk else b""))
                time.sleep(0.02)
            wait_until("the connection is closed", lambda: worker.connections == 0)


def test_the_server_stops_although_clients_hold_connections() -> None:
    with ExitStack() as stack:
        with serving(worker_api_key="key") as worker:
            for _ in range(20):
                stack.enter_context(connect(worker)).sendall(b"POST / HT")
                stack.enter_context(upload(worker, "Content-Length: 9", b"{"))
            worker.get("/ping")
            began = time.monotonic()
        assert time.monotonic() - began < 10
