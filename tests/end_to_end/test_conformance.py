"""The gate for every upgrade of vLLM: the worker answers as `vllm serve` does, over HTTP and from the queue.

`make conformance`, and with an earlier release `make conformance VLLM=0.31.0`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import Server, vllm_serve
from tests.conformance import canonical
from tests.conformance.cases import ANSWERED, WRONG, Case
from tests.conftest import Endpoint, HttpWorker
from worker.request import sse


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    content_type: str
    data: bytes

    def canonical(self) -> Any:
        is_stream = self.content_type.startswith("text/event-stream")
        return self.status, self.content_type, canonical.stream(self.data) if is_stream else canonical.body(self.data)


@pytest.fixture(scope="module")
def reference() -> Iterator[Server]:
    """Run vLLM's own server."""
    with tempfile.TemporaryDirectory() as folder, vllm_serve(Path(folder) / "log") as server:
        yield server


def ask(client: httpx.Client, case: Case) -> Answer:
    answer = client.request(case.method, case.path, json=case.body)
    return Answer(answer.status_code, answer.headers.get("content-type", ""), answer.content)


@pytest.fixture(scope="module")
def expected(reference: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=reference.base_url.removesuffix("/v1"), timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def over_http(http_worker: HttpWorker) -> Iterator[httpx.Client]:
    with http_worker.client() as client:
        # What computes log probabilities is compiled at the first request for them, which outlasts this worker's limit.
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 1, "logprobs": 2}
        while client.post("/v1/completions", json=body).status_code == 504:
            pass
        yield client


cases = pytest.mark.parametrize("case", [*ANSWERED, *WRONG], ids=lambda case: case.name)


@cases
def test_over_http(expected: httpx.Client, over_http: httpx.Client, case: Case) -> None:
    assert ask(over_http, case).canonical() == ask(expected, case).canonical()


@cases
def test_from_the_queue(expected: httpx.Client, endpoint: Endpoint, case: Case) -> None:
    answer = ask(expected, case)
    if case.stream:
        job_input = {"openai_route": case.path, "openai_input": case.body}
    else:
        job_input = {"route": case.path, "body": case.body, "method": case.method}
    result = httpx.post(f"{endpoint.url}/runsync", json={"input": job_input}, timeout=60).json()
    status, content_type, told = answer.canonical()
    if answer.status >= 400:
        assert_same_error(result, status, told, case)
    elif case.stream:
        assert result["status"] == "COMPLETED"
        assert canonical.stream("".join(result["output"]).encode()) == told
    else:
        assert result["status"] == "COMPLETED"
        assert (200, [canonical.value(one) for one in result["output"]]) == (status, [told]), content_type


def assert_same_error(result: dict[str, Any], status: int, told: Any, case: Case) -> None:
    """An error fails the job with vLLM's error object; in a stream's text it is an event with vLLM's body."""
    if case.stream:
        (event, *_), *rest = [part.split("\n\n") for part in result["output"]]
        assert not rest
        assert canonical.value(json.loads(event.partition("data: ")[2])) == told
    else:
        assert result["status"] == "FAILED"
        error = canonical.value(json.loads(result["error"]))
        # What FastAPI answers itself, where the model has no such route, has another form.
        assert error.items() >= told.get("error", {"code": status}).items()


HELLO = {"id": "a", "choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}
LO = {"id": "b", "choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": None}]}
END = {"id": "b", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
WHOLE = {"id": "c", "choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]}


def streamed(*events: Any) -> list[Any]:
    return canonical.stream(b"".join(map(sse.event, events)) + sse.DONE)


def test_where_a_stream_was_cut_makes_no_difference() -> None:
    assert streamed(HELLO, LO, END) == streamed(WHOLE, END)


@pytest.mark.parametrize(
    "other", [[HELLO, END], [LO, HELLO, END], [WHOLE], [WHOLE, {**END, "usage": None}], [WHOLE, LO, END]]
)
def test_anything_else_does(other: list[Any]) -> None:
    assert streamed(*other) != streamed(WHOLE, END)
