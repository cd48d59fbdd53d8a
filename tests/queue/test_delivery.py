"""How long a result is tried, against a session that fails as it is told."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from worker.queue import delivery
from worker.queue.delivery import Delivery


class Session:
    """Fails so many times, then takes what it is given."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.posts = 0

    @asynccontextmanager
    async def post(self, *_: Any, **__: Any) -> Any:
        self.posts += 1
        if self.posts <= self.failures:
            raise aiohttp.ClientConnectionError
        yield SimpleNamespace(status=200)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the seconds that pass with each look at the clock, and make waiting a matter of no time."""
    step, now = [1.0], [0.0]

    def monotonic() -> float:
        now[0] += step[0]
        return now[0]

    async def sleep(_seconds: float) -> None:
        pass

    monkeypatch.setattr(delivery, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(delivery, "asyncio", SimpleNamespace(sleep=sleep))
    return step


def posts(failures: int) -> int:
    session: Any = Session(failures)
    asyncio.run(Delivery(session, "http://x/$ID?", "http://x/$ID?", lambda: None).done("job", {"output": []}))
    return int(session.posts)


def test_a_result_outlasts_a_worker_that_was_frozen(clock: list[float]) -> None:
    clock[0] = 600.0
    assert posts(1) == 2


def test_a_result_that_nobody_takes_is_given_up(clock: list[float]) -> None:
    assert 100 < posts(10**6) < 200
    clock[0] = 600.0
    assert posts(10**6) == delivery.DEADLINE_SECONDS / delivery.ATTEMPT_SECONDS
