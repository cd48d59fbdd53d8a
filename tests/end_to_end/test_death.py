"""Workers whose engine dies under them, or says nothing any more, with requests in flight."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from standin import StandinServer, Status, WorkerProcess, worker_environment
from tests.conftest import wait_until_ready
from tests.support import tiny
from tests.support.ports import free_port
from worker.errors import ENGINE_DIED

COMMAND = [sys.executable, "handler.py"]
ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}


def engines(worker: WorkerProcess) -> list[psutil.Process]:
    """Return the engine's process, if it is there."""
    found = []
    for one in psutil.Process(worker.pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [one] if one.name().startswith("VLLM::EngineCor") else []
    return found


@pytest.fixture
def frozen() -> Iterator[list[psutil.Process]]:
    """Let processes that a test has stopped be killed."""
    stopped: list[psutil.Process] = []
    yield stopped
    for process in stopped:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=2)[1]


def test_a_worker_whose_engine_is_killed_fails_its_jobs_and_leaves(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with StandinServer() as server, log.open("wb") as output:
        environ = {**tiny.environment(), **worker_environment(server.port)}
        with WorkerProcess(COMMAND, environ, output) as worker:
            wait_until_ready(server, worker, log)
            jobs = [
                server.call(server.platform.submit, {"input": body})
                for body in (
                    ENDLESS,
                    {**ENDLESS, "stream": False},
                    {"openai_route": "/v1/completions", "openai_input": ENDLESS},
                )
            ]
            server.wait_until(lambda _: jobs[0].chunks and jobs[2].chunks and jobs[1].status is Status.IN_PROGRESS)
            family = psutil.Process(worker.pid).children(recursive=True)
            began = time.monotonic()
            engines(worker)[0].kill()
            assert worker.wait(timeout=20) == 1
            assert time.monotonic() - began < 5
            assert gone(family)
        assert [job.status for job in jobs] == [Status.FAILED, Status.FAILED, Status.COMPLETED]
        for job in jobs[:2]:
            assert json.loads(job.error)["message"] == ENGINE_DIED
        assert ENGINE_DIED in jobs[2].chunks[-1]
        assert server.platform.records.duplicate_dones == []
    assert log.read_text().splitlines()[-1].startswith("The engine has died")


def test_an_engine_that_says_nothing_any_more_counts_as_dead(tmp_path: Path, frozen: list[psutil.Process]) -> None:
    log, port = tmp_path / "log", free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {**tiny.environment(), "PORT": str(port), "ENGINE_STALL_TIMEOUT": "2"}
    with log.open("wb") as output, WorkerProcess(COMMAND, environ, output) as worker, ThreadPoolExecutor(1) as pool:
        while _ping(url) != 200:
            time.sleep(0.2)
        # An engine without requests may be silent.
        time.sleep(3)
        assert _ping(url) == 200
        with httpx.stream("POST", f"{url}/v1/completions", json=ENDLESS, timeout=30) as answer:
            parts = answer.iter_text()
            next(parts)
            (engine,) = engines(worker)
            frozen += [engine, *engine.children(recursive=True)]
            for process in reversed(frozen):
                process.suspend()
            waiting = pool.submit(httpx.post, f"{url}/v1/completions", json={**ENDLESS, "stream": False}, timeout=30)
            rest = "".join(parts)
        assert ENGINE_DIED in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert waiting.result().status_code == 503
        assert _ping(url) != 200
        assert worker.wait(timeout=10) == 1
        assert gone(frozen)


def _ping(url: str) -> int:
    try:
        return httpx.get(f"{url}/ping", timeout=10).status_code
    except httpx.TransportError:
        return 0


def test_a_worker_that_is_stopped_while_it_loads_leaves_nothing_behind() -> None:
    with StandinServer() as server:
        environ = {**tiny.environment(), **worker_environment(server.port)}
        with WorkerProcess(COMMAND, environ, None) as worker:
            process = psutil.Process(worker.pid)
            for _ in range(600):
                if engines(worker):
                    break
                time.sleep(0.1)
            family = process.children(recursive=True)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=20) == 0
            assert gone(family)
