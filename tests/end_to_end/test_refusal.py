"""A worker that can never start, because its settings are wrong, reports the cause to its callers."""

import signal
import sys
import time
from pathlib import Path

import httpx
import pytest

from standin import StandinServer, WorkerProcess, worker_environment
from tests.support import tiny
from tests.support.ports import free_port

COMMAND = [sys.executable, "handler.py"]
WRONG = {"MAX_CONCURRENCY": "many"}


def test_jobs_fail_with_the_cause() -> None:
    with StandinServer() as server, WorkerProcess(COMMAND, worker_environment(server.port) | WRONG) as worker:
        url = server.endpoint_url
        for body in ({"prompt": "Hello"}, {"anything": 1}):
            result = httpx.post(f"{url}/runsync", json={"input": body}, timeout=30).json()
            assert result["status"] == "FAILED"
            assert "MAX_CONCURRENCY='many'" in result["error"]
        stream = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        text = httpx.post(f"{url}/openai/v1/chat/completions", json=stream, timeout=30).text
        assert "MAX_CONCURRENCY='many'" in text
        assert text.endswith("data: [DONE]\n\n")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=10) == 0


def test_http_requests_fail_with_the_cause() -> None:
    port = free_port()
    with WorkerProcess(COMMAND, {"PORT": str(port), **WRONG}) as worker:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url)
        assert httpx.get(f"{url}/ping").status_code == 503
        answer = httpx.post(f"{url}/v1/chat/completions", json={})
        assert answer.status_code == 503
        assert "MAX_CONCURRENCY='many'" in answer.json()["error"]["message"]
        worker.send_signal(signal.SIGINT)
        assert worker.wait(timeout=10) == 0


def _wait_for(url: str) -> None:
    for _ in range(100):
        try:
            httpx.get(f"{url}/ping")
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    pytest.fail("The worker did not open its port within 10 s.")


@pytest.mark.parametrize("environ", [{"STARTUP_FAILURE": "exit"}, {"PORT": "x"}], ids=["by setting", "no port"])
def test_a_worker_that_cannot_report_the_cause_exits(environ: dict[str, str], tmp_path: Path) -> None:
    with StandinServer() as server, (tmp_path / "log").open("wb") as log:
        with WorkerProcess(COMMAND, {**worker_environment(server.port), **WRONG, **environ}, log) as worker:
            assert worker.wait(timeout=30) == 2
        assert server.platform.records.takes == []
    assert "MAX_CONCURRENCY='many'" in (tmp_path / "log").read_text()


def test_a_caller_gets_the_reason_why_a_model_does_not_load() -> None:
    """vLLM writes the reason only to the log of its engine's process."""
    with StandinServer() as server:
        environ = {**worker_environment(server.port), **tiny.environment(), "NUM_GPU_BLOCKS_OVERRIDE": "1"}
        with WorkerProcess(COMMAND, environ):
            result = httpx.post(f"{server.endpoint_url}/runsync", json={"input": {"prompt": "?"}}, timeout=120).json()
    assert result["status"] == "FAILED"
    assert "memory for the cache" in result["error"]
    assert "Lower MAX_MODEL_LEN" in result["error"]
