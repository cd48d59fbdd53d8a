"""Workers with the real engine: context managers that start one, and fixtures that share one for the whole session."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from prometheus_client import REGISTRY

from standin import StandinServer, WorkerProcess, worker_environment
from tests.support import speech, tiny
from tests.support.collector import Collector
from tests.support.links import Server
from tests.support.ports import free_port
from tests.support.proxy import Proxy

COMMAND = [sys.executable, "handler.py"]
Worker = TypeVar("Worker")
API_KEY = "key-that-no-log-may-hold"
TEAM_KEY = "named-key-that-no-log-may-hold"
REQUEST_SECONDS = 10
"""`REQUEST_TIMEOUT` of the workers that tests share over HTTP."""
START_SECONDS = 300
"""A start takes 15 to 35 s on an idle machine with two cores, and has taken 80 s on a busy one."""


@dataclass(frozen=True)
class Endpoint:
    """A RunPod endpoint: the stand-in for the platform, and one worker, which connects to it through `proxy`."""

    server: StandinServer
    proxy: Proxy
    worker: WorkerProcess
    log: Path
    metrics_port: int
    """0 without METRICS_PORT."""

    @property
    def url(self) -> str:
        return self.server.endpoint_url


@dataclass(frozen=True)
class HttpWorker:
    """A worker in HTTP mode."""

    port: int
    worker: WorkerProcess
    log: Path
    pings: list[int] = field(default_factory=list)
    """The statuses of `/ping` until the worker was ready."""
    key: str = API_KEY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60)

    def ping(self) -> int:
        """Return the status of `/ping`, or 0 if the connection fails."""
        try:
            return httpx.get(f"{self.url}/ping", timeout=10).status_code
        except httpx.TransportError:
            return 0


@contextmanager
def run_endpoint(folder: Path, command: Sequence[str] = COMMAND, **environment: str) -> Iterator[Endpoint]:
    """Run a worker behind a stand-in for RunPod's platform. It is ready at its first request for jobs."""
    log = folder / "worker.log"
    with StandinServer() as server, Proxy(server.port) as proxy, log.open("wb") as output:
        environment = {**tiny.environment(), **worker_environment(proxy.port), **environment}
        with WorkerProcess(command, environment, output) as worker:
            wait_until_ready(worker, log, lambda: bool(server.platform.records.takes))
            yield Endpoint(server, proxy, worker, log, int(environment.get("METRICS_PORT", "0")))
            stop(worker)


@contextmanager
def run_http_worker(folder: Path, **environment: str) -> Iterator[HttpWorker]:
    """Run `handler.py` in HTTP mode. It is ready when `/ping` answers 200."""
    port, log = free_port(), folder / "worker.log"
    environment = {**tiny.environment(), "PORT": str(port), "WORKER_API_KEY": API_KEY, **environment}
    with log.open("wb") as output, WorkerProcess(COMMAND, environment, output) as worker:
        http_worker = HttpWorker(port, worker, log)

        def is_ready() -> bool:
            status = http_worker.ping()
            if status:
                http_worker.pings.append(status)
            return status == 200

        wait_until_ready(worker, log, is_ready)
        yield http_worker
        stop(worker)


def both_ways(port: int) -> list[str]:
    """Return the command of a worker that answers jobs, and requests over HTTP on a port."""
    return [sys.executable, "-m", "tests.support.both_ways", str(port)]


class OneAtATime:
    """Runs workers with other models, which are shared by tests, one at a time: each needs 4 GB of memory."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._running = ExitStack()
        self._name = ""
        self._worker: Any = None

    def get(self, name: str, run: Callable[[Path], AbstractContextManager[Worker]]) -> Worker:
        """Return the worker of this name. If another one runs, it is stopped, and `run` starts this one."""
        if name != self._name:
            self.stop()
            self._worker = self._running.enter_context(run(self._folders.mktemp(name)))
            self._name = name
        worker: Worker = self._worker
        return worker

    def stop(self) -> None:
        """Stop the worker that runs."""
        self._name = ""
        self._running.close()


def wait_until_ready(worker: WorkerProcess, log: Path, is_ready: Callable[[], bool]) -> None:
    """Wait for `is_ready`. The test fails if the worker ends or START_SECONDS pass first."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if is_ready():
            return
        with suppress(subprocess.TimeoutExpired):
            code = worker.wait(timeout=0.2)
            pytest.fail(f"The worker ended with exit code {code} before it was ready:\n{log.read_text()[-4000:]}")
    pytest.fail(f"The worker was not ready after {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def stop(worker: WorkerProcess) -> None:
    """Stop the worker as the platform does. Leaving the context of `WorkerProcess` kills it if it does not end."""
    worker.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        worker.wait(timeout=20)


def engine_processes(worker: WorkerProcess) -> list[psutil.Process]:
    """Return the process of the worker's engine, or nothing before it exists."""
    processes = []
    for process in psutil.Process(worker.pid).children():
        with suppress(psutil.NoSuchProcess):
            processes += [process] if process.name().startswith("VLLM::EngineCor") else []
    return processes


def have_ended(processes: list[psutil.Process]) -> bool:
    """Return whether all processes end within 2 s. Those whose parent has not asked for their exit code count."""
    for process in psutil.wait_procs(processes, timeout=2)[1]:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@pytest.fixture(scope="session")
def links() -> Iterator[Server]:
    """An HTTP server for images and videos."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """The OpenTelemetry collector of `http_worker`."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """An endpoint with a worker, shared by all tests."""
    # Private networks are allowed because the tests' own servers are on 127.0.0.1.
    environment = {"METRICS_PORT": str(free_port()), "MEDIA_ALLOW_PRIVATE_NETWORKS": "true"}
    with run_endpoint(tmp_path_factory.mktemp("endpoint"), **environment) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def http_worker(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[HttpWorker]:
    """A worker in HTTP mode, shared by all tests."""
    folder = tmp_path_factory.mktemp("http_worker")
    environment = {
        "WORKER_API_KEY": f"{API_KEY},team-a:{TEAM_KEY}",
        "HF_TOKEN": "hf_token-that-no-log-may-hold",
        "REQUEST_TIMEOUT": str(REQUEST_SECONDS),
        "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
        "MEDIA_FETCH_TIMEOUT": "2",
        "ALLOWED_LOCAL_MEDIA_PATH": str(folder),
        "BATCH_FOLDER": str(folder / "batches"),
        **collector.environment,
    }
    with run_http_worker(folder, **environment) as http_worker:
        yield http_worker


@dataclass(frozen=True)
class SpeechWorker:
    """A worker with the tiny speech model, for jobs of an endpoint and for requests over HTTP."""

    endpoint: Endpoint
    url: str

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60)


@contextmanager
def run_speech_worker(folder: Path) -> Iterator[SpeechWorker]:
    """Run a worker with the tiny speech model."""
    port = free_port()
    environment = {
        **speech.ENVIRONMENT,
        "WORKER_API_KEY": API_KEY,
        "REQUEST_TIMEOUT": str(REQUEST_SECONDS),
        "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
        "MAX_AUDIO_BYTES": str(speech.LARGEST_BYTES),
        "VLLM_MAX_AUDIO_DECODE_DURATION_S": str(speech.LONGEST_SECONDS),
    }
    command = both_ways(port)
    with run_endpoint(folder, command, **environment) as endpoint:
        worker = SpeechWorker(endpoint, f"http://127.0.0.1:{port}")
        # The first request for log probabilities compiles code and may exceed REQUEST_TIMEOUT.
        files, data = {"file": speech.wav("1")}, {"response_format": "verbose_json"}
        with worker.client() as client:
            while client.post("/v1/audio/transcriptions", files=files, data=data).status_code == 504:
                pass
        yield worker


@pytest.fixture(scope="session")
def other_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneAtATime]:
    """The workers with other models than the shared ones."""
    workers = OneAtATime(tmp_path_factory)
    yield workers
    workers.stop()


@pytest.fixture(scope="module")
def speech_worker(other_workers: OneAtATime) -> SpeechWorker:
    """A worker with the tiny speech model."""
    return other_workers.get("speech", run_speech_worker)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Remove the metrics that a test adds to Prometheus' global registry."""
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
