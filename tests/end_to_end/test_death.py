"""Workers whose engine dies or hangs, with requests in flight."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from standin import Status
from tests.conftest import engine_processes, have_ended, run_endpoint, run_http_worker
from worker.errors import ENGINE_DIED

STREAM: dict[str, Any] = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}


@pytest.fixture
def suspended() -> Iterator[list[psutil.Process]]:
    """Processes that the test suspends. They are resumed at its end."""
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def test_a_worker_whose_engine_is_killed_fails_its_jobs_and_exits(tmp_path: Path) -> None:
    with run_endpoint(tmp_path) as endpoint:
        server, worker = endpoint.server, endpoint.worker
        inputs = [
            STREAM,
            {**STREAM, "stream": False},
            {"openai_route": "/v1/completions", "openai_input": STREAM},
        ]
        jobs = [server.call(server.platform.submit, {"input": job_input}) for job_input in inputs]
        server.wait_until(lambda _: jobs[0].chunks and jobs[2].chunks and jobs[1].status is Status.IN_PROGRESS)
        children = psutil.Process(worker.pid).children(recursive=True)
        began = time.monotonic()
        engine_processes(worker)[0].kill()
        assert worker.wait(timeout=20) == 1
        assert time.monotonic() - began < 5
        assert have_ended(children)
    assert [job.status for job in jobs] == [Status.FAILED, Status.FAILED, Status.COMPLETED]
    for job in jobs[:2]:
        assert json.loads(job.error)["message"] == ENGINE_DIED
    assert ENGINE_DIED in jobs[2].chunks[-1]
    assert server.platform.records.duplicate_dones == []
    assert endpoint.log.read_text().splitlines()[-1].startswith("The engine has died")


def test_an_engine_that_hangs_counts_as_dead(tmp_path: Path, suspended: list[psutil.Process]) -> None:
    with (
        run_http_worker(tmp_path, ENGINE_STALL_TIMEOUT="2") as http_worker,
        http_worker.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        # Longer than the timeout: an engine without requests sends nothing, and is not dead.
        time.sleep(3)
        assert http_worker.ping() == 200
        with client.stream("POST", "/v1/completions", json=STREAM) as response:
            parts = response.iter_text()
            next(parts)
            (engine,) = engine_processes(http_worker.worker)
            suspended += [engine, *engine.children(recursive=True)]
            for process in reversed(suspended):
                process.suspend()
            waiting = pool.submit(client.post, "/v1/completions", json={**STREAM, "stream": False})
            rest = "".join(parts)
        assert ENGINE_DIED in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert waiting.result().status_code == 503
        assert http_worker.ping() != 200
        assert http_worker.worker.wait(timeout=10) == 1
        assert have_ended(suspended)
