"""Progress that is posted to the platform, with a scripted transport."""

import asyncio
import json
import logging
from collections.abc import Mapping

import pytest

from tests.support.clock import run_on_virtual_clock
from worker.errors import Json
from worker.queue.platform import PROGRESS_SECONDS, Platform, Urls
from worker.queue.transport import Answer, NoAnswerError

URLS = Urls("take?", "take-batch?", None, "stream/$ID?gpu=x", "done/$ID?gpu=x")


class ScriptedTransport:
    """Answers every post in the same way: with a status, with an error, or never (None)."""

    def __init__(self, answer: int | NoAnswerError | None) -> None:
        self._answer = answer
        self.posts: list[tuple[str, Json]] = []

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:
        raise NotImplementedError

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        assert headers["X-Request-ID"] == "job-1"
        self.posts.append((url, json.loads(body)))
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, NoAnswerError):
            raise self._answer
        assert self._answer is not None
        return self._answer


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        pytest.param(200, None, id="accepted"),
        pytest.param(500, "HTTP 500", id="refused"),
        pytest.param(NoAnswerError("reset"), "reset", id="a broken connection"),
        pytest.param(None, "TimeoutError", id="no answer"),
    ],
)
def test_progress_is_posted_once_and_a_failure_is_only_logged(
    answer: int | NoAnswerError | None, problem: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    transport = ScriptedTransport(answer)

    async def run() -> float:
        clock = asyncio.get_running_loop().time
        began = clock()
        await Platform(transport, URLS, asyncio.Event(), 900).progress("job-1", {"percent": 50})
        return clock() - began

    with caplog.at_level(logging.INFO):
        assert run_on_virtual_clock(run()) <= PROGRESS_SECONDS
    assert transport.posts == [
        ("done/job-1?gpu=x&isStream=false", {"status": "IN_PROGRESS", "output": {"percent": 50}})
    ]
    messages = [record.message for record in caplog.records]
    assert messages == ([f"Job job-1: the platform did not accept its progress ({problem})"] if problem else [])
