"""One worker with the real engine for the whole session, behind a stand-in for RunPod's platform."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny
from tests.standin import StandinServer, WorkerProcess, worker_environment

START_SECONDS = 180


@dataclass(frozen=True)
class Endpoint:
    """A RunPod endpoint with one worker."""

    server: StandinServer
    worker: WorkerProcess
    log: Path

    @property
    def url(self) -> str:
        return self.server.endpoint_url


@pytest.fixture(scope="session")
def endpoint() -> Iterator[Endpoint]:
    """Start `handler.py` as the platform would; ready at its first request for jobs."""
    with tempfile.TemporaryDirectory() as folder, StandinServer() as server:
        log = Path(folder) / "worker.log"
        environment = {**tiny.environment(), **worker_environment(server.port)}
        with log.open("wb") as output, WorkerProcess([sys.executable, "handler.py"], environment, output) as worker:
            _wait_until_ready(server, worker, log)
            yield Endpoint(server, worker, log)


def _wait_until_ready(server: StandinServer, worker: WorkerProcess, log: Path) -> None:
    for _ in range(START_SECONDS):
        with suppress(TimeoutError):
            return server.wait_until(lambda platform: platform.records.takes, timeout=1)
        with suppress(subprocess.TimeoutExpired):
            code = worker.wait(timeout=0)
            pytest.fail(f"The worker ended with {code} before it was ready:\n{log.read_text()[-4000:]}")
    pytest.fail(f"The worker was not ready after {START_SECONDS} s:\n{log.read_text()[-4000:]}")
