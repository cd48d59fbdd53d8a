"""One line as a request through the pipeline, with a scripted app."""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from tests.support.batches import KEY, line
from tests.support.clock import run_on_virtual_clock
from worker.batch import asking
from worker.batch.asking import Asker
from worker.batch.runner import NotAnsweredError
from worker.errors import JobError, Json, MemoryBusyError, MemoryExceededError
from worker.lifecycle import Lifecycle
from worker.request.asgi import Receive, Send
from worker.request.pipeline import Pipeline
from worker.settings import Settings
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import current_usage

JSON = "application/json"
Answer = tuple[int, str, bytes] | JobError


class ScriptedApp:
    """Gives these answers, one after the other; the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[dict[bytes, bytes], Json]] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.requests.append((dict(scope["headers"]), json.loads((await receive())["body"])))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, JobError):
            raise answer
        status, content_type, body = answer
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type.encode())]}
        )
        await send({"type": "http.response.body", "body": body})


def ask(app: ScriptedApp, priority: int | None = None, state: str = "ready") -> tuple[int, Any]:
    """Ask one line of a worker in this state."""

    async def run() -> tuple[int, Any]:
        lifecycle = Lifecycle()
        lifecycle.ready(lambda: state == "dead")
        if state == "draining":
            lifecycle.stopping.set()
        pipeline = Pipeline(Settings(), lifecycle, Telemetry("model", CollectorRegistry()))
        before = current_usage.get()
        answer = await asyncio.create_task(Asker(app, pipeline, KEY, priority).ask(line(7)))
        assert current_usage.get() is before
        return answer

    return run_on_virtual_clock(run())


@pytest.mark.parametrize(
    ("status", "content_type", "body", "expected"),
    [
        pytest.param(200, JSON, b'{"id": "x"}', (200, {"id": "x"}), id="an answer"),
        pytest.param(400, JSON, b'{"error": {"code": 400}}', (400, {"error": {"code": 400}}), id="an error"),
        pytest.param(200, JSON, b'{"error": {"code": 422}}', (422, {"error": {"code": 422}}), id="an error with 200"),
        pytest.param(200, "text/plain", b"Hello", (200, {"content_type": "text/plain", "text": "Hello"}), id="text"),
        pytest.param(
            200, "image/png", b"\xff", (200, {"content_type": "image/png", "base64": "/w=="}), id="other data"
        ),
    ],
)
def test_the_answer_has_the_status_and_the_body(status: int, content_type: str, body: bytes, expected: Any) -> None:
    assert ask(ScriptedApp((status, content_type, body))) == expected


@pytest.mark.parametrize(("priority", "header"), [(None, None), (100, b"100"), (-1, b"-1")])
def test_the_request_has_the_id_of_its_result_and_the_priority(priority: int | None, header: bytes | None) -> None:
    app = ScriptedApp((200, JSON, b"{}"))
    ask(app, priority)
    ((headers, body),) = app.requests
    assert headers[b"x-request-id"] == f"batch_req_{KEY}_7".encode()
    assert headers.get(asking.PRIORITY_HEADER.encode()) == header
    assert "priority" not in body


def test_lines_are_logged_for_debugging_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "worker.telemetry.jobs"):
        ask(ScriptedApp((200, JSON, b"{}")))
    assert {record.levelname for record in caplog.records if record.name == "worker.telemetry.jobs"} == {"DEBUG"}


def busy(times: int) -> Sequence[Answer]:
    return [MemoryBusyError(1, 2)] * times


def test_a_line_that_found_no_memory_is_asked_again() -> None:
    app = ScriptedApp(*busy(30), (200, JSON, b"{}"))
    assert ask(app) == (200, {})
    assert len(app.requests) == 31


def test_a_line_that_needs_too_much_memory_is_asked_once() -> None:
    app = ScriptedApp(MemoryExceededError(5))
    assert ask(app)[0] == 413
    assert len(app.requests) == 1


def test_a_failure_of_the_worker_is_the_answer_while_it_is_ready() -> None:
    app: Any = ScriptedApp((500, JSON, b'{"error": {"code": 500}}'))
    assert ask(app)[0] == 500


@pytest.mark.parametrize("state", ["draining", "dead"])
def test_a_line_has_no_answer_if_the_worker_leaves(state: str) -> None:
    with pytest.raises(NotAnsweredError):
        ask(ScriptedApp((500, JSON, b'{"error": {"code": 500}}')), state=state)
    assert ask(ScriptedApp((200, JSON, b"{}")), state=state) == (200, {})
