"""HTTP mode with the real engine over a real socket: answers, metrics, log and traces."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY, HttpWorker
from tests.support import media
from tests.support.collector import Collector
from tests.support.media import image_url
from tests.support.tiny import ROOT

MODEL = "tiny"
GREETING = "Hello! How can I help you?"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
ENDLESS = {"model": MODEL, "prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def http(http_worker: HttpWorker) -> Iterator[httpx.Client]:
    with http_worker.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(http_worker: HttpWorker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http_worker.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def user(text: str, *urls: str) -> Any:
    """Return a user's message with the images and videos at `urls`."""
    kinds = ["video_url" if url.startswith("data:video") else "image_url" for url in urls]
    parts = [{"type": kind, kind: {"url": url}} for kind, url in zip(kinds, urls, strict=True)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def log_lines(worker: HttpWorker, text: str = "") -> list[dict[str, Any]]:
    # The worker may be writing the last line.
    *lines, _ = worker.log.read_text().split("\n")
    return [json.loads(line) for line in lines if line.startswith("{") and text in line]


def job_line(worker: HttpWorker, request_id: str) -> dict[str, Any]:
    """Wait for the only log line that ends a request, and return it."""
    for _ in range(100):
        lines = [line for line in log_lines(worker, request_id) if "outcome" in line]
        if lines:
            (line,) = lines
            return line
        time.sleep(0.05)
    pytest.fail(f"The log has no line for the end of request {request_id}.")


def gauges(http: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_ping_answers_204_until_the_model_is_loaded(http_worker: HttpWorker) -> None:
    assert http_worker.pings[0] == 204
    assert set(http_worker.pings[:-1]) == {204}
    assert http_worker.pings[-1] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_answered(client: openai.OpenAI, stream: bool) -> None:
    if not stream:
        assert client.chat.completions.create(**CHAT).choices[0].message.content == GREETING
        return
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == GREETING
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 10


def test_a_message_with_an_image_and_a_video_is_answered(client: openai.OpenAI) -> None:
    film = media.data_url(media.film("red", "blue"), "video/mp4")
    completion = client.chat.completions.create(model=MODEL, messages=user("What is this?", image_url("green"), film))
    text = completion.choices[0].message.content or ""
    assert "green" in text
    assert "red to blue" in text


def test_the_other_routes_answer(http: httpx.Client, http_worker: HttpWorker) -> None:
    assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
    tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "Hello"}).json()["tokens"]
    assert http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"] == "Hello"
    answer = http.post("/v1/responses", json={"model": MODEL, "input": "Hello"}).json()
    assert answer["output"][-1]["content"][0]["text"] == GREETING
    body = {"model": MODEL, "max_tokens": 40, "messages": CHAT["messages"]}
    message = httpx.post(f"{http_worker.url}/v1/messages", json=body, headers={"x-api-key": API_KEY}, timeout=60).json()
    assert message["content"][-1]["text"] == GREETING


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"content": b"{bad", "headers": {"content-type": "application/json"}}, 400, id="malformed JSON"),
        pytest.param({"content": b"{}", "headers": {"content-type": "text/plain"}}, 400, id="content type"),
        pytest.param({"content": b""}, 400, id="empty body"),
        pytest.param({"json": []}, 400, id="a list"),
        pytest.param({"json": CHAT | {"model": "gpt-9"}}, 404, id="unknown model"),
        pytest.param({"json": CHAT | {"max_tokens": "many"}}, 400, id="wrong type"),
        pytest.param({"json": CHAT | {"max_tokens": 10**9}}, 400, id="too many tokens"),
    ],
)
def test_a_wrong_request_gets_an_error_and_the_worker_continues(http: httpx.Client, fields: Any, status: int) -> None:
    answer = http.post("/v1/chat/completions", **fields)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert "Traceback" not in answer.text
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_client_that_disconnects_from_its_stream_frees_the_engine(
    http: httpx.Client, http_worker: HttpWorker
) -> None:
    headers = {"x-request-id": "disconnecting-client"}
    with http.stream("POST", "/v1/completions", json=ENDLESS, headers=headers) as answer:
        parts = answer.iter_bytes()
        next(parts)
    line = job_line(http_worker, "disconnecting-client")
    assert line["outcome"] == "cancelled"
    assert 0 < line["output_tokens"] < 1900
    http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 1})
    assert gauges(http)["vllm:num_requests_running"] == 0


def test_a_request_that_times_out_frees_the_engine(http: httpx.Client, http_worker: HttpWorker) -> None:
    """Only this request takes longer than the worker's REQUEST_TIMEOUT."""
    body = {**ENDLESS, "stream": False, "n": 128, "temperature": 1}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "too-long"})
    assert answer.status_code == 504
    line = job_line(http_worker, "too-long")
    assert line["outcome"] == "timeout"
    assert line["output_tokens"] < 128 * 1900
    http.post("/v1/completions", json={"model": MODEL, "prompt": "Hello", "max_tokens": 1})
    assert gauges(http)["vllm:num_requests_running"] == 0


def test_health_and_info_describe_the_worker_and_its_engine(http: httpx.Client) -> None:
    health = http.get("/health").json()
    assert (health["status"], health["jobs"], health["requests_running"]) == ("ready", 0, 0.0)
    assert 0 <= health["kv_cache_usage"] <= 1
    info = http.get("/info").json()
    assert info["engine"]["versions"]["vllm"] == "0.32.0"
    assert info["engine"]["served_names"] == [MODEL]
    assert info["engine"]["max_model_len"] == 2048
    assert info["engine"]["media_limits"] == {"image": 5, "video": 2}
    assert {"imports", "engine", "attach", "total"} <= info["startup_seconds"].keys()
    assert info["startup_seconds"]["total"] > info["startup_seconds"]["engine"] > 1
    assert info["settings"]["hf_token"] == "***"


def test_the_metrics_of_worker_and_engine_form_one_exposition(http: httpx.Client, http_worker: HttpWorker) -> None:
    body = CHAT | {"messages": user("What is this?", image_url("red"))}
    http.post("/v1/chat/completions", json=body, headers={"x-request-id": "measured"})
    # The metrics change shortly after the answer.
    job_line(http_worker, "measured")
    text = http.get("/metrics").text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    declared = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    assert len(declared) == len(set(declared))
    samples = {(sample.name, *sorted(sample.labels.values())) for family in families for sample in family.samples}
    assert ("worker_jobs_total", "/v1/chat/completions", "image", "ok") in samples
    assert ("worker_media_total", "image") in samples
    assert ("worker_startup_seconds", "engine") in samples
    assert {"vllm:num_requests_running", "vllm:generation_tokens", "worker_ready", "worker_build_info"} <= set(names)


def test_a_job_is_logged_as_one_line_of_json(http: httpx.Client, http_worker: HttpWorker) -> None:
    headers = {"x-request-id": "one-line"}
    body = CHAT | {"messages": user("What is this?", image_url("red"), image_url("blue")), "stream": True}
    answer = http.post("/v1/chat/completions", json=body, headers=headers).text
    assert '"id":"chatcmpl-one-line"' in answer
    line = job_line(http_worker, "one-line")
    assert line["modalities"] == {"text": 1, "image": 2}
    assert (line["route"], line["stream"], line["status"]) == ("/v1/chat/completions", True, 200)
    assert (line["outcome"], line["finish_reason"]) == ("ok", "stop")
    assert line["input_tokens"] > 10
    assert line["output_tokens"] > 5
    assert 0 < line["ttft_seconds"] < line["total_seconds"]
    assert line["tokens_per_second"] > 0
    assert 0 <= line["queue_seconds"] < line["total_seconds"]


def test_the_start_is_logged_as_one_line(http_worker: HttpWorker) -> None:
    (line,) = (line for line in log_lines(http_worker) if "startup_seconds" in line)
    assert {"python", "weights", "imports", "download", "engine", "attach", "total"} <= line["startup_seconds"].keys()
    assert line["weights"].startswith("on disk: ")
    assert line["compile_cache"] is False


def test_the_engine_logs_in_the_same_format(http_worker: HttpWorker) -> None:
    lines = log_lines(http_worker)
    assert {line["logger"].partition(".")[0] for line in lines} >= {"worker", "vllm"}
    assert len({line["pid"] for line in lines if line["logger"].startswith("vllm.")}) >= 2
    assert all({"level", "logger", "pid", "message", "timestamp"} <= line.keys() for line in lines)
    assert not re.search(r"^(INFO|WARNING|ERROR|\(EngineCore)", http_worker.log.read_text(), re.MULTILINE)


def test_the_log_holds_no_secret_and_no_prompt(http: httpx.Client, http_worker: HttpWorker) -> None:
    prompt = "the word is xylophone"
    http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 2})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": prompt}], "temperature": prompt})
    http.post("/v1/chat/completions", json={"messages": user(prompt, "http://127.0.0.1:9/x.png?sig=xylophone")})
    http.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong-key-xylophone"})
    log = http_worker.log.read_text()
    assert "xylophone" not in log
    assert "no-log-may-hold" not in log
    assert GREETING not in log


def test_the_engines_span_is_a_child_of_the_jobs_span(http: httpx.Client, collector: Collector) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"x-request-id": "traced", "traceparent": f"00-{trace}-{caller}-01"}
    http.post("/v1/chat/completions", json=CHAT, headers=headers)
    for _ in range(100):
        spans = {span.name: span for span in collector.spans if span.trace_id.hex() == trace}
        if len(spans) >= 2:
            break
        time.sleep(0.1)
    job = spans.pop("job")
    assert job.parent_span_id.hex() == caller
    assert {attribute.key: attribute.value.string_value for attribute in job.attributes}.items() >= {
        ("request_id", "traced"),
        ("outcome", "ok"),
    }
    (engine,) = spans.values()
    assert engine.parent_span_id == job.span_id


def test_the_health_check_asks_a_real_worker(http_worker: HttpWorker) -> None:
    assert httpx.get(f"{http_worker.url}/ping").status_code == 200
    environ = {"PATH": os.environ["PATH"], "PORT": str(http_worker.port)}
    subprocess.run([sys.executable, "builder/healthcheck.py"], cwd=ROOT, env=environ, check=True)
