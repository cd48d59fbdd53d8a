"""Workers that receive SIGTERM: with requests in flight, and while the model is loading."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from standin import StandinServer, Status, WorkerProcess, worker_environment
from tests.conftest import COMMAND, engine_processes, have_ended, run_endpoint, run_http_worker
from tests.support import tiny
from tests.support.collector import Collector
from tests.support.ports import free_port
from worker.errors import LEAVING

GRACE_SECONDS = 2.5
"""How long the worker lets jobs of the queue run after SIGTERM."""
STREAM: dict[str, Any] = {"prompt": "Once", "ignore_eos": True, "stream": True}


def test_a_queue_worker_completes_short_jobs_and_fails_long_ones(tmp_path: Path) -> None:
    with run_endpoint(tmp_path, METRICS_PORT=str(free_port())) as endpoint:
        server, worker = endpoint.server, endpoint.worker
        short, *long = [
            server.call(server.platform.submit, {"input": {**STREAM, "max_tokens": tokens}})
            for tokens in (10, *[1900] * 40)
        ]
        server.wait_until(lambda _: all(job.chunks for job in long))
        children = psutil.Process(worker.pid).children(recursive=True)
        began = time.monotonic()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 0, endpoint.log.read_text()
        assert time.monotonic() - began < GRACE_SECONDS + 5
        assert have_ended(children)
    assert short.status is Status.COMPLETED
    assert {job.status for job in long} <= {Status.COMPLETED, Status.FAILED}
    assert any(job.status is Status.FAILED for job in long)
    assert all(LEAVING in job.error for job in long if job.status is Status.FAILED)


def test_an_http_worker_completes_its_stream(tmp_path: Path, collector: Collector) -> None:
    with run_http_worker(tmp_path, **collector.environment) as http_worker, http_worker.client() as client:
        with client.stream("POST", "/v1/completions", json={**STREAM, "max_tokens": 200}) as response:
            parts = response.iter_text()
            next(parts)
            http_worker.worker.send_signal(signal.SIGTERM)
            assert "".join(parts).endswith("data: [DONE]\n\n")
        assert http_worker.worker.wait(timeout=30) == 0, http_worker.log.read_text()


def test_a_queue_worker_that_is_loading_ends_all_its_processes() -> None:
    with StandinServer() as server:
        environment = {**tiny.environment(), **worker_environment(server.port)}
        with WorkerProcess(COMMAND, environment) as worker:
            for _ in range(600):
                if engine_processes(worker):
                    break
                time.sleep(0.1)
            else:
                pytest.fail("The worker started no engine process within 60 s.")
            children = psutil.Process(worker.pid).children(recursive=True)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=20) == 0
            assert have_ended(children)


def test_an_http_worker_exits_while_it_is_loading() -> None:
    environment = tiny.environment() | {"PORT": str(free_port())}
    with WorkerProcess(COMMAND, environment, subprocess.DEVNULL) as worker:
        # Loading takes longer than this.
        time.sleep(2)
        worker.send_signal(signal.SIGTERM)
        # 143 is SIGTERM before the worker has installed its signal handlers.
        assert worker.wait(timeout=20) in (0, 143)
