"""The time limits of requests to the platform, with a scripted HTTP session, on a virtual clock."""

import asyncio
from types import SimpleNamespace
from typing import Any, Self

import aiohttp
import pytest

from tests.support.clock import run_on_virtual_clock
from worker.queue.transport import (
    ANSWER_BYTES,
    ANSWER_SECONDS,
    BODY_SECONDS,
    POLL_SECONDS,
    Answer,
    HttpTransport,
    NoAnswerError,
)


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


def get(head: float, rest: float = 0.0, stop_at: float | None = None, fails: bool = False) -> Answer | None:
    """Return the answer to a long poll."""
    session: Any = Session(head, rest, fails=fails)

    async def run() -> Answer | None:
        stopping = asyncio.Event()
        if stop_at is not None:
            asyncio.get_running_loop().call_later(stop_at, stopping.set)
        return await HttpTransport(session).get("http://x/", stopping)

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
