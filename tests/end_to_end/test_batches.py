"""Batches with the real engine: as jobs of an endpoint, and from the command line."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from standin import Job, Status
from tests.conftest import Endpoint, engine_processes
from tests.support import tiny
from tests.support.batches import jsonl
from tests.support.links import Server
from tests.support.media import image_url
from tests.support.tiny_batches import (
    CHAT,
    COMPLETIONS,
    GREETING,
    LONG,
    chat,
    check_pictures,
    command,
    line,
    pictures,
    seconds_until_idle,
    text_of,
)


def submit(endpoint: Endpoint, batch: Any) -> Job:
    return endpoint.server.call(endpoint.server.platform.submit, {"input": {"batch": batch}})


def output(endpoint: Endpoint, job: Job) -> Any:
    endpoint.server.wait_until(lambda _: job.ended, 100)
    assert (job.status, job.error) == (Status.COMPLETED, None)
    (value,) = job.output
    return value


def test_the_lines_of_a_batch_are_answered_as_the_same_requests_alone(endpoint: Endpoint, links: Server) -> None:
    bodies = {
        "text": (CHAT, chat("Hello")),
        "image": (CHAT, chat("What is this?", image_url("red"))),
        "link": (CHAT, chat("What is this?", f"{links.url}/picture/blue")),
        "completion": (COMPLETIONS, {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}),
        "tokens": ("/tokenize", {"prompt": "Hello"}),
        "too long": (CHAT, {**chat("Hello"), "max_tokens": 100_000}),
        "no link": (CHAT, chat("What is this?", f"{links.url}/status/404")),
        "other model": ("/v1/embeddings", {"model": "tiny", "input": "Hello"}),
    }
    items = [line(custom_id, body, url) for custom_id, (url, body) in bodies.items()]
    value = output(endpoint, submit(endpoint, {"input": [*items, line("stream", {"stream": True})]}))
    results = {result["custom_id"]: result for result in value["results"]}
    assert (value["completed"], value["failed"]) == (5, 4)
    assert text_of(results["text"]) == GREETING
    assert (text_of(results["image"]), text_of(results["link"])) == ("The image is red.", "The image is blue.")
    assert results["stream"]["error"]["code"] == "invalid_request"
    other = results["other model"]["response"]
    message = "The loaded model does not support '/v1/embeddings'."
    assert (other["status_code"], other["body"]["error"]["message"]) == (404, message)
    for custom_id, (route, body) in bodies.items():
        alone = httpx.post(f"{endpoint.url}/runsync", json={"input": {"route": route, "body": body}}, timeout=60).json()
        response = results[custom_id]["response"]
        if alone["status"] == "FAILED":
            error = json.loads(alone["error"])
            assert (response["status_code"], response["body"]["error"]["message"]) == (error["code"], error["message"])
            continue
        (expected,) = alone["output"]
        for each in (expected, response["body"]):
            for field in ("id", "created"):
                each.pop(field, None)
        # Byte for byte, with the order of the fields.
        assert json.dumps(response["body"]) == json.dumps(expected)
    tokens = sum(result["response"]["body"]["usage"]["completion_tokens"] for result in value["results"][:4])
    assert value["tokens"]["output"] == tokens


def test_progress_is_shown_and_a_cancelled_batch_frees_the_engine(endpoint: Endpoint) -> None:
    long = [line(f"long {number}", LONG, COMPLETIONS) for number in range(50)]
    job = submit(endpoint, {"input": [line("short", chat("Hello")), *long], "concurrency": 8})
    endpoint.server.wait_until(lambda _: job.output and job.output.get("done"), 60)
    assert (job.status, job.output["total"]) == (Status.IN_PROGRESS, 51)
    url = f"http://127.0.0.1:{endpoint.metrics_port}"
    health = httpx.get(f"{url}/health").json()
    assert (health["batch"]["job"], health["batch"]["status"]) == (job.id, "running")
    assert health["jobs"] <= 8
    text = httpx.get(f"{url}/metrics").text
    assert "worker_batch_total 51.0" in text
    assert 'worker_batch_lines_total{outcome="completed"}' in text
    # Lines leave room for other jobs.
    answer = httpx.post(f"{endpoint.url}/runsync", json={"input": chat("Hello")}, timeout=60).json()
    assert answer["output"][0]["choices"][0]["message"]["content"] == GREETING
    began = time.monotonic()
    endpoint.server.call(endpoint.server.platform.cancel, job)
    # `make batch-kills` checks that this takes less than a second.
    assert seconds_until_idle(began, url, *engine_processes(endpoint.worker)) < 5
    assert httpx.get(f"{url}/health").json()["batch"] is None
    log = endpoint.log.read_text()
    assert f"Job batch_req_{job.id}" not in log


def run_command(source: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **tiny.environment()}
    return subprocess.run(
        command(source, target),
        cwd=tiny.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command_answers_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(pictures(200)))
    process = run_command(source, target)
    assert process.returncode == 0, process.stderr[-3000:]
    (summary,) = process.stdout.splitlines()
    assert summary.startswith("200 lines: 200 completed, 0 failed; ")
    check_pictures(target, 200)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        pytest.param("<html>", ("in.jsonl", "out.jsonl"), "The input is no batch.", id="no batch"),
        pytest.param("{}", ("none.jsonl", "out.jsonl"), "does not exist", id="no file"),
        pytest.param("{}", ("in.jsonl", "no/folder/out.jsonl"), "its folder does not exist", id="no folder"),
        pytest.param("{}", ("in.jsonl", "in.jsonl"), "exists and has content that is no batch's", id="the input"),
    ],
)
def test_wrong_files_end_the_command_before_the_model_is_loaded(
    tmp_path: Path, content: str, arguments: tuple[str, str], message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    process = run_command(*(tmp_path / name for name in arguments))
    assert (process.returncode, message in process.stderr.splitlines()[-1]) == (2, True), process.stderr
    assert "vllm" not in process.stderr
