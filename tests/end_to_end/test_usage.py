"""Token counts: an answer, its log line and the metrics have the same ones as the engine, for every route."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import TEAM_KEY, HttpWorker
from tests.end_to_end.test_http import ENDLESS, job_line, user
from tests.support.media import image_url

USER = [{"role": "user", "content": "Hello"}]
IMAGE = user("What is this?", image_url("green"))
REQUESTS = {
    "chat": ("/v1/chat/completions", {"messages": USER}),
    "chat-image": ("/v1/chat/completions", {"messages": IMAGE}),
    "chat-stream": (
        "/v1/chat/completions",
        {"messages": USER, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat-batch": ("/v1/chat/completions/batch", {"messages": [USER, USER]}),
    "completions": ("/v1/completions", {"prompt": "Hello", "max_tokens": 5}),
    "two-prompts": ("/v1/completions", {"prompt": ["Hello", "Once upon"], "max_tokens": 5}),
    "responses": ("/v1/responses", {"input": "Hello"}),
    "responses-stream": ("/v1/responses", {"input": "Hello", "stream": True}),
    "messages": ("/v1/messages", {"messages": USER, "max_tokens": 20}),
    "tokenize": ("/tokenize", {"prompt": "Hello"}),
}


@pytest.fixture(scope="module")
def http(http_worker: HttpWorker) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {TEAM_KEY}"}
    with httpx.Client(base_url=http_worker.url, headers=headers, timeout=60) as client:
        yield client


def counted(http: httpx.Client) -> Counter[str]:
    """Return the tokens so far: the engine's, and those of the named key."""
    counts: Counter[str] = Counter()
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "worker_tokens_total" and sample.labels["key"] == "team-a":
                counts[f"worker {sample.labels['direction']}"] += int(sample.value)
            elif sample.name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total"):
                counts[f"engine {'input' if 'prompt' in sample.name else 'output'}"] += int(sample.value)
    return counts


def usage_of(answer: str) -> dict[str, Any]:
    """Return the last usage in a body or a stream."""
    bodies = [
        json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line[-1:] in "}]" and "{" in line
    ]
    # The last event of `/v1/responses` holds the whole response.
    return next((body["usage"] for body in reversed([b.get("response", b) for b in bodies]) if body.get("usage")), {})


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_its_log_line_and_the_metrics_have_the_engines_token_counts(
    http: httpx.Client, http_worker: HttpWorker, name: str
) -> None:
    path, fields = REQUESTS[name]
    before = counted(http)
    answer = http.post(path, json={"model": "tiny", **fields}, headers={"x-request-id": f"usage-{name}"})
    assert answer.status_code == 200
    line = job_line(http_worker, f"usage-{name}")
    grown = counted(http) - before
    assert line["key"] == "team-a"
    assert (line["input_tokens"], line["output_tokens"]) == (grown["engine input"], grown["engine output"])
    assert (line["input_tokens"], line["output_tokens"]) == (grown["worker input"], grown["worker output"])
    if usage := usage_of(answer.text):
        of_input = usage.get("prompt_tokens", usage.get("input_tokens"))
        of_output = usage.get("completion_tokens", usage.get("output_tokens"))
        assert (line["input_tokens"], line["output_tokens"]) == (of_input, of_output)
    assert bool(usage) == (name != "tokenize")
    assert bool(usage) == bool(line["output_tokens"])


def test_the_tokens_of_a_stream_that_its_client_leaves_are_counted(http: httpx.Client, http_worker: HttpWorker) -> None:
    with http.stream("POST", "/v1/completions", json=ENDLESS, headers={"x-request-id": "usage-left"}) as answer:
        next(answer.iter_bytes())
    line = job_line(http_worker, "usage-left")
    assert line["input_tokens"] > 0
    assert 0 < line["output_tokens"] < 1900


def test_several_answers_to_one_prompt_count_the_prompt_once(http: httpx.Client, http_worker: HttpWorker) -> None:
    """As in OpenAI's usage. The engine's own metric counts it for each answer."""
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "n": 3, "temperature": 1}
    answer = http.post("/v1/completions", json=body, headers={"x-request-id": "usage-n"}).json()
    line = job_line(http_worker, "usage-n")
    assert line["input_tokens"] == answer["usage"]["prompt_tokens"]
    assert line["output_tokens"] == answer["usage"]["completion_tokens"]
