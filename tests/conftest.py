"""Workers with the real engine, for the whole session: one behind a stand-in for RunPod's platform, one over HTTP."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from standin import StandinServer, Status, WorkerProcess, worker_environment
from tests.support import tiny
from tests.support.collector import Collector
from tests.support.links import Server
from tests.support.ports import free_port
from worker.errors import LEAVING

START_SECONDS = 180
GRACE_SECONDS = 2.5
"""What the queue's jobs are given when the worker is stopped."""


@dataclass(frozen=True)
class Endpoint:
    """A RunPod endpoint with one worker."""

    server: StandinServer
    worker: WorkerProcess
    log: Path
    metrics_port: int

    @property
    def url(self) -> str:
        return self.server.endpoint_url


@pytest.fixture(scope="session")
def endpoint() -> Iterator[Endpoint]:
    """Start `handler.py` as the platform would; ready at its first request for jobs."""
    with tempfile.TemporaryDirectory() as folder, StandinServer() as server:
        log, metrics_port = Path(folder) / "worker.log", free_port()
        environment = {
            **tiny.environment(),
            **worker_environment(server.port),
            "METRICS_PORT": str(metrics_port),
            # The tests' own servers are on loopback.
            "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
        }
        with log.open("wb") as output, WorkerProcess([sys.executable, "handler.py"], environment, output) as worker:
            wait_until_ready(server, worker, log)
            served = Endpoint(server, worker, log, metrics_port)
            yield served
            _stop_while_a_job_runs(served)


def _stop_while_a_job_runs(served: Endpoint) -> None:
    """Tell the worker to stop: what runs gets some time, then the reason, and no process stays behind."""
    platform = served.server.platform
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    short, *long = [
        served.server.call(platform.submit, {"input": {**body, "max_tokens": tokens}}) for tokens in (10, *[1900] * 40)
    ]
    served.server.wait_until(lambda _: all(job.chunks for job in long))
    family = psutil.Process(served.worker.pid).children(recursive=True)
    began = time.monotonic()
    served.worker.send_signal(signal.SIGTERM)
    assert served.worker.wait(timeout=20) == 0
    assert time.monotonic() - began < GRACE_SECONDS + 5
    assert short.status is Status.COMPLETED
    assert {job.status for job in long} <= {Status.COMPLETED, Status.FAILED}
    assert all(LEAVING in job.error for job in long if job.status is Status.FAILED)
    assert any(job.status is Status.FAILED for job in long)
    assert not psutil.wait_procs(family, timeout=2)[1]


def wait_until_ready(server: StandinServer, worker: WorkerProcess, log: Path) -> None:
    """Wait for the worker's first request for jobs."""
    for _ in range(START_SECONDS):
        with suppress(TimeoutError):
            return server.wait_until(lambda platform: platform.records.takes, timeout=1)
        with suppress(subprocess.TimeoutExpired):
            code = worker.wait(timeout=0)
            pytest.fail(f"The worker ended with {code} before it was ready:\n{log.read_text()[-4000:]}")
    pytest.fail(f"The worker was not ready after {START_SECONDS} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def links() -> Iterator[Server]:
    """Serve pictures and films, on loopback."""
    with Server() as server:
        yield server


API_KEY = "key-that-no-log-may-hold"


@dataclass
class HttpWorker:
    """A worker in HTTP mode."""

    port: int
    worker: WorkerProcess
    log: Path
    collector: Collector
    pings: list[int] = field(default_factory=list)
    """The answers of `/ping` until the worker was ready."""

    key: str = API_KEY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=60)


@pytest.fixture(scope="session")
def http_worker() -> Iterator[HttpWorker]:
    """Start `handler.py` in HTTP mode; ready when its `/ping` says so."""
    with tempfile.TemporaryDirectory() as folder, Collector() as collector:
        log, port = Path(folder) / "worker.log", free_port()
        environment = {
            **tiny.environment(),
            "PORT": str(port),
            "WORKER_API_KEY": API_KEY,
            "HF_TOKEN": "hf_token-that-no-log-may-hold",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "REQUEST_TIMEOUT": "5",
            "MEDIA_ALLOW_PRIVATE_NETWORKS": "true",
            "MEDIA_FETCH_TIMEOUT": "2",
            "ALLOWED_LOCAL_MEDIA_PATH": folder,
        }
        with log.open("wb") as output, WorkerProcess([sys.executable, "handler.py"], environment, output) as worker:
            served = HttpWorker(port, worker, log, collector)
            _ping_until_ready(served)
            yield served
            _leave_in_order(served)


def _leave_in_order(served: HttpWorker) -> None:
    """Tell the worker to stop while a stream runs: the stream is finished, and the exit code says that all is well."""
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with served.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        parts = answer.iter_text()
        next(parts)
        served.worker.send_signal(signal.SIGTERM)
        assert "".join(parts).endswith("data: [DONE]\n\n")
    assert served.worker.wait(timeout=30) == 0


def _ping_until_ready(served: HttpWorker) -> None:
    for _ in range(5 * START_SECONDS):
        time.sleep(0.2)
        with suppress(httpx.TransportError):
            served.pings.append(httpx.get(f"{served.url}/ping", timeout=10).status_code)
            if served.pings[-1] == 200:
                return
        with suppress(subprocess.TimeoutExpired):
            code = served.worker.wait(timeout=0)
            pytest.fail(f"The worker ended with {code} before it was ready:\n{served.log.read_text()[-4000:]}")
    pytest.fail(f"The worker was not ready after {START_SECONDS} s:\n{served.log.read_text()[-4000:]}")
