"""handler.py on the command line: one local job, the SDK's test server, and wrong settings."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from standin import WorkerProcess
from tests.conftest import COMMAND, stop, wait_until_ready
from tests.support import tiny
from tests.support.media import image_url
from tests.support.ports import free_port
from tests.support.tiny import ROOT


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run handler.py to its end with the embedded model and the variables of `environ`."""
    env = {**os.environ, **tiny.environment(), **environ}
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def answer_text(result: dict[str, Any]) -> str:
    text: str = result["output"][0]["choices"][0]["message"]["content"]
    return text


def test_test_input_json_is_answered() -> None:
    completed = run()
    result = json.loads(completed.stdout)
    assert (completed.returncode, result["status"], answer_text(result)) == (0, "COMPLETED", "The image is red."), (
        completed.stderr
    )
    assert not re.findall(r"Traceback|Task exception", completed.stderr)


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        pytest.param(["--test_input", "{input: 1}"], {}, "--test_input is not valid JSON", id="test input"),
        pytest.param([], {"MODEL_NAME": "/no/such"}, "MODEL_NAME='/no/such': no such folder", id="model"),
        pytest.param([], {"MAX_CONCURRENCY": "many"}, "MAX_CONCURRENCY='many': ", id="worker setting"),
        pytest.param([], {"MAX_MODEL_LEN": "long"}, "MAX_MODEL_LEN='long': ", id="engine setting"),
        pytest.param([], {"MAX_MODEL_LEN": "100000000"}, "max_model_len", id="engine setting, too large"),
    ],
)
def test_a_wrong_setting_or_input_stops_the_start_with_a_message(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    completed = run(*arguments, **environ)
    assert (completed.returncode, completed.stdout) == (2, ""), completed.stderr
    assert message in completed.stderr.splitlines()[-1]
    assert "Traceback" not in completed.stderr


@pytest.fixture(scope="module")
def sdk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the SDK's test server, which runs the real engine."""
    log, port = tmp_path_factory.mktemp("sdk_server") / "log", free_port()
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            httpx.get(f"{url}/openapi.json")
        except httpx.TransportError:
            return False
        return True

    command = [*COMMAND, "--rp_serve_api", "--rp_api_port", str(port)]
    with log.open("wb") as output, WorkerProcess(command, tiny.environment(), output) as worker:
        wait_until_ready(worker, log, is_ready)
        yield url
        stop(worker)


QUESTION = {"prompt": "What is this?", "image": image_url("blue")}


def test_the_sdks_server_answers_runsync(sdk_server: str) -> None:
    result = httpx.post(f"{sdk_server}/runsync", json={"input": QUESTION}, timeout=60).json()
    assert (result["status"], answer_text(result)) == ("COMPLETED", "The image is blue.")


@pytest.mark.parametrize("path", ["runsync", "run"])
def test_the_sdks_server_reports_an_error_as_a_failed_job(sdk_server: str, path: str) -> None:
    result = httpx.post(f"{sdk_server}/{path}", json={"input": {"text": "?"}}, timeout=60).json()
    if path == "run":
        result = httpx.post(f"{sdk_server}/status/{result['id']}", timeout=60).json()
    assert result["status"] == "FAILED"
    assert json.loads(result["error"])["code"] == 400


def test_the_sdks_server_streams(sdk_server: str) -> None:
    job = httpx.post(f"{sdk_server}/run", json={"input": {**QUESTION, "stream": True}}, timeout=60).json()
    result = httpx.post(f"{sdk_server}/stream/{job['id']}", timeout=60).json()
    assert result["status"] == "COMPLETED"
    chunks = [chunk for part in result["stream"] for chunk in part["output"]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "The image is blue."


def test_handler_py_holds_the_call_that_github_deployments_look_for() -> None:
    assert "runpod.serverless.start(" in (ROOT / "handler.py").read_text()
