"""The worker gives the same responses as `vllm serve`, over HTTP and from the queue.

Every upgrade of vLLM must pass: `make conformance`, or with an earlier release `make conformance VLLM=0.31.0`.
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
    """A response."""

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
        # The first request for log probabilities compiles code and may exceed this worker's REQUEST_TIMEOUT.
        body = {"model": "tiny", "prompt": "Once", "max_tokens": 1, "logprobs": 2}
        while client.post("/v1/completions", json=body).status_code == 504:
            pass
        yield client


cases = pytest.mark.parametrize("case", [*ANSWERED, *WRONG], ids=lambda case: case.name)


@cases
def test_http_responses_are_those_of_vllm_serve(expected: httpx.Client, over_http: httpx.Client, case: Case) -> None:
    answer, reference = ask(over_http, case).canonical(), ask(expected, case).canonical()
    if reference[2] == {"detail": "Not Found"}:
        # If the model lacks the route, FastAPI answers for vLLM. The worker's answer has the form of all other errors.
        assert (answer[0], answer[2]["error"]["type"]) == (reference[0], "NotFoundError")
    else:
        assert answer == reference


@cases
def test_job_outputs_are_the_responses_of_vllm_serve(expected: httpx.Client, endpoint: Endpoint, case: Case) -> None:
    answer = ask(expected, case)
    if case.stream:
        job_input = {"openai_route": case.path, "openai_input": case.body}
    else:
        job_input = {"route": case.path, "body": case.body, "method": case.method}
    result = httpx.post(f"{endpoint.url}/runsync", json={"input": job_input}, timeout=60).json()
    status, content_type, body = answer.canonical()
    if answer.status >= 400:
        assert_same_error(result, status, body, case)
    elif case.stream:
        assert result["status"] == "COMPLETED"
        assert canonical.stream("".join(result["output"]).encode()) == body
    else:
        assert result["status"] == "COMPLETED"
        assert (200, [canonical.value(chunk) for chunk in result["output"]]) == (status, [body]), content_type


def assert_same_error(result: dict[str, Any], status: int, body: Any, case: Case) -> None:
    """Check that the job failed with vLLM's error object or, if it streams, sent an event with vLLM's body."""
    if case.stream:
        (event, *_), *other_parts = [part.split("\n\n") for part in result["output"]]
        assert not other_parts
        assert canonical.value(json.loads(event.partition("data: ")[2])) == body
    else:
        assert result["status"] == "FAILED"
        error = canonical.value(json.loads(result["error"]))
        # If the model lacks the route, FastAPI answers, and its body has another form.
        assert error.items() >= body.get("error", {"code": status}).items()


HELLO = {"id": "a", "choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]}
LO = {"id": "b", "choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": None}]}
END = {"id": "b", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
WHOLE = {"id": "c", "choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]}


def streamed(*events: Any) -> list[Any]:
    return canonical.stream(b"".join(map(sse.event, events)) + sse.DONE)


def test_streams_with_different_cuts_are_equal() -> None:
    assert streamed(HELLO, LO, END) == streamed(WHOLE, END)


@pytest.mark.parametrize(
    "other", [[HELLO, END], [LO, HELLO, END], [WHOLE], [WHOLE, {**END, "usage": None}], [WHOLE, LO, END]]
)
def test_streams_with_any_other_difference_are_not_equal(other: list[Any]) -> None:
    assert streamed(*other) != streamed(WHOLE, END)
