"""handler.py as a person runs it: one local job, the SDK's test server, and settings that are wrong."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from standin import WorkerProcess
from tests.support import tiny
from tests.support.media import image_url
from tests.support.tiny import ROOT

HANDLER = [sys.executable, "handler.py"]


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run handler.py to its end with the embedded model, or what `environ` says instead."""
    env = {**os.environ, **tiny.environment(), **environ}
    return subprocess.run([*HANDLER, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def said(result: dict[str, Any]) -> str:
    text: str = result["output"][0]["choices"][0]["message"]["content"]
    return text


def test_the_repositorys_test_input_is_answered() -> None:
    done = run()
    result = json.loads(done.stdout)
    assert (done.returncode, result["status"], said(result)) == (0, "COMPLETED", "The image is red."), done.stderr
    assert not re.findall(r"Traceback|Task exception", done.stderr)


def test_a_local_job_that_fails_ends_with_1() -> None:
    done = run("--test_input", '{"input": {"messages": [], "stream": true}}')
    result = json.loads(done.stdout)
    assert (done.returncode, result["status"]) == (1, "FAILED"), done.stderr
    assert json.loads(result["error"])["code"] == 400


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        pytest.param(["--test_input", "{input: 1}"], {}, "--test_input is no JSON", id="test input"),
        pytest.param([], {"MODEL_NAME": "/no/such"}, "MODEL_NAME='/no/such': no such folder", id="model"),
        pytest.param([], {"MAX_CONCURRENCY": "many"}, "MAX_CONCURRENCY='many': ", id="worker setting"),
        pytest.param([], {"MAX_MODEL_LEN": "long"}, "MAX_MODEL_LEN='long': ", id="engine setting"),
        pytest.param([], {"MAX_MODEL_LEN": "100000000"}, "max_model_len", id="engine setting, too large"),
    ],
)
def test_a_mistake_stops_the_start_with_one_sentence(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    done = run(*arguments, **environ)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def test_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the SDK's test server over the real engine."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        command = [*HANDLER, "--rp_serve_api", "--rp_api_port", "8765"]
        with WorkerProcess(command, tiny.environment(), output) as worker:
            for _ in range(180):
                try:
                    httpx.get("http://127.0.0.1:8765/openapi.json")
                except httpx.TransportError:
                    time.sleep(1)
                else:
                    yield "http://127.0.0.1:8765"
                    return
            pytest.fail(f"{worker.pid} was not ready:\n{log.read_text()[-4000:]}")


QUESTION = {"prompt": "What is this?", "image": image_url("blue")}


def test_runsync_on_the_test_server(test_server: str) -> None:
    result = httpx.post(f"{test_server}/runsync", json={"input": QUESTION}, timeout=60).json()
    assert (result["status"], said(result)) == ("COMPLETED", "The image is blue.")


@pytest.mark.parametrize("path", ["runsync", "run"])
def test_an_error_on_the_test_server_is_failed(test_server: str, path: str) -> None:
    result = httpx.post(f"{test_server}/{path}", json={"input": {"text": "?"}}, timeout=60).json()
    if path == "run":
        result = httpx.post(f"{test_server}/status/{result['id']}", timeout=60).json()
    assert result["status"] == "FAILED"
    assert json.loads(result["error"])["code"] == 400


def test_a_stream_on_the_test_server(test_server: str) -> None:
    job = httpx.post(f"{test_server}/run", json={"input": {**QUESTION, "stream": True}}, timeout=60).json()
    result = httpx.post(f"{test_server}/stream/{job['id']}", timeout=60).json()
    assert result["status"] == "COMPLETED"
    chunks = [chunk for part in result["stream"] for chunk in part["output"]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "The image is blue."


def test_the_repositorys_handler_starts_the_sdk_literally() -> None:
    assert "runpod.serverless.start(" in Path(ROOT / "handler.py").read_text()
