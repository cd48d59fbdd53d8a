"""How often the worker tries to post a result, with a scripted HTTP session, on a virtual clock."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp

from tests.support.clock import run_on_virtual_clock
from worker.queue import delivery
from worker.queue.delivery import Delivery


class Session:
    """Fails `failures` times, each time after `seconds`, then accepts every post."""

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures = failures
        self.seconds = seconds
        self.posts = 0

    @asynccontextmanager
    async def post(self, *_: Any, **__: Any) -> Any:
        self.posts += 1
        if self.posts <= self.failures:
            await asyncio.sleep(self.seconds)
            raise aiohttp.ClientConnectionError
        yield SimpleNamespace(status=200, read=_read)


async def _read() -> bytes:
    return b"{}"


def attempts(failures: int, seconds: float = 0.0) -> int:
    """Return how many times the worker posts one result."""
    session: Any = Session(failures, seconds)
    sending = Delivery(session, "http://x/$ID?", "http://x/$ID?", lambda: None).done("job", {"output": []})
    run_on_virtual_clock(sending)
    return int(session.posts)


def test_a_result_is_posted_again_after_the_worker_was_suspended() -> None:
    assert attempts(failures=1, seconds=600) == 2


def test_posting_stops_at_the_deadline() -> None:
    assert 10 < attempts(failures=10**6) < 40
    assert attempts(failures=10**6, seconds=600) == delivery.DEADLINE_SECONDS / delivery.ATTEMPT_SECONDS
