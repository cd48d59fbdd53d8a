"""The worker around a scripted engine: the order of the steps in which it becomes ready, and what callers see."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from worker.errors import Json
from worker.memory import Budget
from worker.request.asgi import App, Receive, Request, Send, exchange
from worker.settings import Settings
from worker.telemetry.usage import EngineLoad
from worker.worker import Worker


class ScriptedEngine:
    """Has the interface that `Worker.attach` uses, and records the worker's state at each use."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.is_dead = False
        self.steps: list[tuple[str, str]] = []
        self.statuses_while_attaching: list[int] = []

    async def attach(self, _memory: Budget) -> App:
        self._record("attach")
        self.statuses_while_attaching = [(await call(self._worker.gate, path))[0] for path in ("/ping", "/v1/models")]
        return models

    def describe(self) -> Json:
        self._record("describe")
        return {"served_names": ["tiny"]}

    def current_load(self) -> EngineLoad:
        """`Worker.attach` calls this when it opens the gate."""
        self._record("open the gate")
        return EngineLoad(capacity=3)

    def _record(self, step: str) -> None:
        self.steps.append((step, self._worker.lifecycle.state))


async def models(scope: Any, receive: Receive, send: Send) -> None:
    await receive()
    body = json.dumps({"engine": scope["path"]}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def call(app: App, path: str) -> tuple[int, Any]:
    """Return the status of a GET request, and the body if it is JSON."""
    async with exchange(app, Request("GET", path)) as response:
        body = await response.read_all()
    return response.status, json.loads(body) if body.startswith(b"{") else None


@pytest.fixture
def worker(tmp_path: Path, clean_registry: None) -> Worker:  # noqa: ARG001
    """A worker in HTTP mode with a scripted engine."""
    worker = Worker(Settings.model_validate({"worker_mode": "http"}), tmp_path / "cause.txt")
    engine: Any = ScriptedEngine(worker)
    worker._engine = engine
    return worker


def engine_of(worker: Worker) -> ScriptedEngine:
    engine: Any = worker.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


def test_the_worker_becomes_ready_only_after_the_gate_is_open(worker: Worker) -> None:
    asyncio.run(worker.attach())
    engine = engine_of(worker)
    assert engine.steps == [("attach", "starting"), ("describe", "starting"), ("open the gate", "starting")]
    assert engine.statuses_while_attaching == [204, 503]
    assert worker.lifecycle.state == "ready"


def test_the_own_routes_describe_the_engine_once_it_is_attached(worker: Worker) -> None:
    async def run() -> None:
        assert (await call(worker.gate, "/ping"))[0] == 204
        assert (await call(worker.gate, "/health"))[1]["status"] == "starting"
        assert (await call(worker.gate, "/info"))[1]["engine"] is None
        await worker.attach()
        assert (await call(worker.gate, "/ping"))[0] == 200
        assert (await call(worker.gate, "/health"))[1]["status"] == "ready"
        info = (await call(worker.gate, "/info"))[1]
        assert info["engine"]["served_names"] == ["tiny"]
        assert info["startup_seconds"].keys() == {"python", "attach", "total"}
        engine_of(worker).is_dead = True
        assert (await call(worker.gate, "/ping"))[0] == 503
        assert (await call(worker.gate, "/health"))[1]["status"] == "dead"

    asyncio.run(run())


def test_the_attached_app_answers_the_routes_of_worker_and_engine(worker: Worker) -> None:
    async def run() -> None:
        for app in (await worker.attach(), worker.gate):
            assert await call(app, "/v1/models") == (200, {"engine": "/v1/models"})
            assert (await call(app, "/health"))[1]["status"] == "ready"

    asyncio.run(run())


def test_an_engine_that_cannot_attach_leaves_the_worker_not_ready(worker: Worker) -> None:
    class FailingEngine(ScriptedEngine):
        async def attach(self, _memory: Budget) -> App:
            raise ValueError("no chat template")

    engine: Any = FailingEngine(worker)
    worker._engine = engine
    with pytest.raises(ValueError, match="no chat template"):
        asyncio.run(worker.attach())
    assert worker.lifecycle.state == "starting"
    assert worker.own_routes.engine is None
