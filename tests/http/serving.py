"""A gate and its HTTP server on a local port, with a scripted engine, for tests."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from worker.batch.service import BatchService
from worker.http import batch_routes
from worker.http.gate import Gate
from worker.http.own_routes import OwnRoutes
from worker.http.protocol import LIMITS, Limits
from worker.http.server import HttpServer
from worker.lifecycle import Lifecycle
from worker.request.asgi import App, Receive, Send
from worker.request.pipeline import Pipeline
from worker.settings.settings import Settings
from worker.settings.sources import Variables
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import StartupPhases

CHAT = "/v1/chat/completions"
EVENT_STREAM = [(b"content-type", b"text/event-stream")]


async def echo(scope: Any, receive: Receive, send: Send) -> None:
    """Answer with the path, the body's size and the headers of the request."""
    body = (await receive())["body"]
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer = json.dumps({"path": scope["path"], "bytes": len(body), "headers": headers}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": answer})


async def begin_stream(send: Send) -> None:
    """Begin a stream with one event."""
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})


class Endless:
    """Streams until its client disconnects."""

    def __init__(self, chunk: bytes = b'data: {"n": 1}\n\n', pause: float = 0.01) -> None:
        self.chunk = chunk
        self.pause = pause
        self.disconnected = threading.Event()

    async def __call__(self, _scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        writing = asyncio.create_task(self._write(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.disconnected.set()

    async def _write(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": self.chunk, "more_body": True})
            await asyncio.sleep(self.pause)


class ServedWorker:
    """The parts of a worker behind its HTTP server."""

    def __init__(self, engine: App, concurrency: int, settings: Settings, body_seconds: float, limits: Limits) -> None:
        registry = CollectorRegistry()
        self.lifecycle = Lifecycle()
        self.telemetry = Telemetry("model", registry)
        pipeline = Pipeline(settings, self.lifecycle, self.telemetry)
        own_routes = OwnRoutes(self.lifecycle, self.telemetry, settings, StartupPhases(registry), pipeline.memory)
        self.memory = pipeline.memory
        self.pipeline = pipeline
        self.settings = settings
        self.batches = BatchService.of(settings, self.lifecycle)
        routes = batch_routes.routes(self.batches, settings)
        self.gate = Gate(
            own_routes, self.lifecycle, self.telemetry, settings, pipeline, batches=routes, body_seconds=body_seconds
        )
        self.engine = engine
        self.concurrency = concurrency
        self.server = HttpServer(self.gate, [0], "127.0.0.1", limits)
        (self.port,) = self.server.ports

    def become_ready(self) -> None:
        self.gate.open(self.engine, self.concurrency)
        self.lifecycle.ready(lambda: False)

    def end_requests(self) -> None:
        """Stop the worker and end its running requests with an error."""

        async def end() -> None:
            self.lifecycle.stopping.set()
            self.lifecycle.over.set()

        self.server.run(end())

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self.server._server.server_state.connections)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10, **options)

    def post(self, path: str = CHAT, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=10, **({"json": {}} | options))

    def outcomes(self) -> list[str]:
        """Return the outcomes of the jobs that have ended. Wait 1 s for the first: a job ends after its response."""
        for _ in range(50):
            if outcomes := self._outcomes():
                return outcomes
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
    limits: Limits = LIMITS,
    variables: dict[str, str] | None = None,
    **settings: Any,
) -> Iterator[ServedWorker]:
    """Serve a worker in HTTP mode, with `settings` by field name and the `variables` of vLLM's flags."""
    read = Settings.model_validate({"worker_mode": "http", **settings})
    read._variables = Variables(variables or {}, {})
    worker = ServedWorker(engine, concurrency, read, body_seconds, limits)
    with worker.server:
        if ready:
            worker.become_ready()
        yield worker


@contextmanager
def open_stream(worker: ServedWorker) -> Iterator[bytes]:
    """Start a stream and yield its first bytes. The end of the block disconnects."""
    with httpx.stream("POST", f"{worker.url}{CHAT}", json={}) as response:
        # The iterator needs a name: the stream closes once the iterator is deleted.
        parts = response.iter_bytes()
        yield next(parts)


@contextmanager
def upload(worker: ServedWorker, header: str, body: bytes = b"") -> Iterator[socket.socket]:
    """Connect, and send a request's head, with one more header, and the beginning of its body."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=10) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode() + body)
        yield connection


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send `data`, or as much of it as the server takes before it closes the connection."""
    with suppress(ConnectionError):
        connection.sendall(data)


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection, or resets it."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the OpenAI error object. Every error response of the gate has one, and a request id."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    assert response.headers["x-request-id"]
    return dict(error)


def wait_until(description: str, condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"Still not true after 30 s: {description}")
