"""The time limits of requests to the platform, with a scripted HTTP session, on a virtual clock; its connections."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any, Self

import aiohttp
import pytest

from tests.support.clock import run_on_virtual_clock
from tests.support.local_server import LocalServer
from tests.support.proxy import Proxy
from worker.queue.transport import (
    ANSWER_BYTES,
    ANSWER_SECONDS,
    BODY_SECONDS,
    POLL_SECONDS,
    RESUMED_POLL_SECONDS,
    RESUMED_POST_SECONDS,
    Answer,
    Connections,
    HttpTransport,
    NoAnswerError,
)
from worker.resume import Resumes


class Session:
    """Answers with 200 and `body`: the head after `head` seconds, and the body `rest` seconds later."""

    def __init__(self, head: float, rest: float, body: bytes = b"[]", fails: bool = False) -> None:
        self.head = head
        self.rest = rest
        self.body = body
        self.fails = fails
        self.pieces = 0
        """How often the body was read."""
        self.status = 200
        self.content = SimpleNamespace(readany=self.read)

    async def get(self, *_: Any, **__: Any) -> Self:
        await asyncio.sleep(self.head)
        return self

    def post(self, *_: Any, **__: Any) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        await asyncio.sleep(self.rest)
        if self.fails:
            raise aiohttp.ClientPayloadError
        self.pieces += 1
        return self.body


def get(
    head: float,
    rest: float = 0.0,
    stop_at: float | None = None,
    fails: bool = False,
    resumed_at: float | None = None,
) -> Answer | None:
    """Return the answer to a long poll."""
    session: Any = Session(head, rest, fails=fails)

    async def run() -> Answer | None:
        stopping, resumes, call_later = asyncio.Event(), Resumes(), asyncio.get_running_loop().call_later
        if stop_at is not None:
            call_later(stop_at, stopping.set)
        if resumed_at is not None:
            call_later(resumed_at, resumes.resumed, 5.0)
        answer = await HttpTransport(session, resumes).get("http://x/", stopping)
        if answer is None and resumed_at is not None:
            assert asyncio.get_running_loop().time() == resumed_at + RESUMED_POLL_SECONDS
        return answer

    return run_on_virtual_clock(run())


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        pytest.param(0.0, 0.0, id="at once"),
        pytest.param(POLL_SECONDS - 0.1, 10.0, id="it begins just in time"),
        pytest.param(10.0, BODY_SECONDS - 0.1, id="a slow body"),
    ],
)
def test_an_answer_is_returned_however_late_its_body_ends(head: float, rest: float) -> None:
    assert get(head, rest) == Answer(200, b"[]")


def test_a_poll_without_an_answer_ends() -> None:
    assert get(POLL_SECONDS + 1) is None


def test_a_poll_ends_when_the_worker_is_stopped() -> None:
    assert get(30.0, stop_at=10.0) is None


def test_an_answer_that_has_begun_is_read_to_its_end_when_the_worker_is_stopped() -> None:
    assert get(5.0, rest=10.0, stop_at=10.0) == Answer(200, b"[]")


@pytest.mark.parametrize(("rest", "fails"), [(BODY_SECONDS + 1, False), (1.0, True)])
def test_an_incomplete_answer_is_an_error(rest: float, fails: bool) -> None:
    with pytest.raises(NoAnswerError):
        get(1.0, rest, fails=fails)


@pytest.mark.parametrize(
    ("session", "pieces"),
    [
        pytest.param(Session(0, rest=ANSWER_SECONDS * 10), 0, id="an answer that does not end in time"),
        pytest.param(Session(0, rest=0, body=bytes(ANSWER_BYTES // 4)), 4, id="an answer that is too long"),
        pytest.param(Session(0, rest=0, fails=True), 0, id="a connection that breaks after the status"),
        pytest.param(Session(0, rest=0, body=b""), 1, id="an empty answer"),
    ],
)
def test_a_post_that_got_a_status_succeeds(session: Any, pieces: int) -> None:
    assert run_on_virtual_clock(HttpTransport(session).post("http://x/", {}, b"")) == 200
    assert session.pieces == pieces


def test_a_poll_ends_soon_after_a_resume() -> None:
    assert get(POLL_SECONDS - 1, resumed_at=10.0) is None


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        pytest.param(5.0, 5.0 + RESUMED_POST_SECONDS - 0.1, id="its head had arrived before the freeze"),
        pytest.param(10.0 + RESUMED_POLL_SECONDS / 2, BODY_SECONDS - 1, id="it begins just after the resume"),
    ],
)
def test_an_answer_that_arrives_around_a_resume_is_not_lost(head: float, rest: float) -> None:
    assert get(head, rest, resumed_at=10.0) == Answer(200, b"[]")


def test_an_answer_whose_rest_is_on_a_dead_connection_is_given_up_soon() -> None:
    with pytest.raises(NoAnswerError):
        get(5.0, 5.0 + RESUMED_POST_SECONDS + 0.1, resumed_at=10.0)


class _Posts:
    """A session whose posts are answered after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.status = 200
        self.content = SimpleNamespace(readany=self.read)

    def post(self, *_: Any, **__: Any) -> Self:
        return self

    async def __aenter__(self) -> Self:
        await asyncio.sleep(self.seconds)
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("seconds", "is_answered"),
    [
        pytest.param(10 + RESUMED_POST_SECONDS - 0.1, True, id="an answer soon after the resume"),
        pytest.param(10 + RESUMED_POST_SECONDS + 0.1, False, id="a dead connection"),
    ],
)
def test_a_post_waits_for_a_few_seconds_after_a_resume(seconds: float, is_answered: bool) -> None:
    session: Any = _Posts(seconds)

    async def run() -> int:
        resumes = Resumes()
        asyncio.get_running_loop().call_later(10, resumes.resumed, 5.0)
        return await HttpTransport(session, resumes).post("http://x/", {}, b"")

    if is_answered:
        assert run_on_virtual_clock(run()) == 200
    else:
        with pytest.raises(NoAnswerError):
            run_on_virtual_clock(run())


class _Handler(BaseHTTPRequestHandler):
    """Answers a post once `may_answer` is set."""

    protocol_version = "HTTP/1.1"
    received, may_answer = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.received.set()
        self.may_answer.wait()
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_idle_connections_are_closed_at_a_resume_and_those_in_use_are_kept() -> None:
    async def run(proxy: Proxy) -> None:
        connections, url = Connections(), f"http://127.0.0.1:{proxy.port}/"
        async with aiohttp.ClientSession(connector=connections) as session:
            transport = HttpTransport(session)
            posting = asyncio.create_task(transport.post(url, {}, b"x"))
            await asyncio.to_thread(_Handler.received.wait)
            connections.close_idle()
            _Handler.may_answer.set()
            assert await posting == await transport.post(url, {}, b"x") == 200
            assert proxy.opened == 1
            proxy.lose_connections()
            connections.close_idle()
            async with asyncio.timeout(10):
                assert await transport.post(url, {}, b"x") == 200
            assert proxy.opened == 2

    with LocalServer(_Handler) as server, Proxy(server.server_port) as proxy:
        asyncio.run(run(proxy))
