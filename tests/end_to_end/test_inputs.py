"""docs/inputs.md: every request of the page gets the answer of the page."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from standin import Behaviour
from tests.conftest import Endpoint, OneAtATime, run_endpoint, run_speech_worker
from tests.end_to_end.conftest import run_adapter_worker
from tests.support import audio_model, examples
from tests.support.examples import Example
from tests.support.links import Server
from tests.support.tiny import ROOT

PAGE = (ROOT / "docs/inputs.md").read_text()
EXAMPLES = sorted(examples.read(PAGE), key=lambda example: (example.model, example.line))
"""Sorted by model, so that each worker starts once."""
LINK = re.compile(r"https://example\.com/([a-z0-9_-]+)\.(png|mp4|json|wav|pdf)")
BEHAVIOURS = {"png": "picture", "mp4": "film", "json": "chat", "wav": "speech", "pdf": "document"}
TIMEOUT = 60


class Workers:
    """Endpoints by kind of model."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    def endpoint(self, model: str) -> Endpoint:
        """Return an endpoint whose worker has a model of this kind."""
        others: OneAtATime = self._request.getfixturevalue("other_workers")
        match model:
            case "chat":
                endpoint: Endpoint = self._request.getfixturevalue("endpoint")
                return endpoint
            case "speech":
                return others.get("speech", run_speech_worker).endpoint
            case "adapters":
                return others.get("adapters", run_adapter_worker).endpoint
            case "embedding":
                return others.get("embedding", run_embedding_worker)
            case _:
                return others.get("audio", run_audio_worker)


def run_embedding_worker(folder: Path) -> AbstractContextManager[Endpoint]:
    return run_endpoint(folder, RUNNER="pooling", CONVERT="embed", MEDIA_ALLOW_PRIVATE_NETWORKS="true")


def run_audio_worker(folder: Path) -> AbstractContextManager[Endpoint]:
    return run_endpoint(folder, **audio_model.create(folder))


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Workers:
    return Workers(request)


def prepared(text: str, links: Server) -> str:
    """Return a text of the page with links to the tests' own server, and the name of the tests' models."""
    text = LINK.sub(lambda link: f"{links.url}/{BEHAVIOURS[link[2]]}/{link[1]}", text)
    return text.replace('"MODEL"', '"tiny"')


def value_of(response: httpx.Response) -> Any:
    """Return a response's JSON, or the data of its events."""
    response.raise_for_status()
    is_stream = response.headers["content-type"].startswith("text/event-stream")
    return examples.events(response.text) if is_stream else response.json()


def streamed(client: httpx.Client, job_id: str) -> Any:
    """Return what all calls of `/stream/ID` return together."""
    parts: list[Any] = []
    while True:
        answer = client.get(f"stream/{job_id}").json()
        parts += answer["stream"]
        if answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            return {"status": answer["status"], "stream": parts}


@contextmanager
def accepted_results(endpoint: Endpoint, example: Example) -> Iterator[None]:
    """Let the platform refuse results above 1 MB, instead of 20 MB, for an example of a large result."""
    platform = endpoint.server.platform
    before = platform.behaviour
    if '"upload_url"' in example.request:
        platform.behaviour = Behaviour(done_post_limit=1_000_000)
    try:
        yield
    finally:
        platform.behaviour = before
        # Another test checks that no other test leaves any.
        platform.records.oversized_posts.clear()


@pytest.mark.parametrize("example", [pytest.param(example, id=f"line {example.line}") for example in EXAMPLES])
def test_a_request_gets_the_answer_of_the_page(workers: Workers, links: Server, example: Example) -> None:
    endpoint = workers.endpoint(example.model)
    with httpx.Client(base_url=endpoint.url, timeout=TIMEOUT) as client, accepted_results(endpoint, example):
        body = json.loads(prepared(example.request, links))
        real = {"": value_of(client.post(example.path, json=body))}
        if example.path == "run":
            real["stream"] = streamed(client, real[""]["id"])
            result = client.get(f"status/{real['']['id']}").json()
            assert result["output"] == [part["output"] for part in real["stream"]["stream"]]
    assert example.answers
    for way, answer in example.answers.items():
        shown = json.loads(prepared(json.dumps(answer), links))
        assert not list(examples.differences(examples.whole(shown), examples.whole(real[way])))
    if example.path == "runsync":
        check_usage(endpoint, real[""])


def check_usage(endpoint: Endpoint, job: dict[str, Any]) -> None:
    """Check that the tokens in a job's answer are those of its log line."""
    output = job.get("output")
    usage = output[0].get("usage") if isinstance(output, list) and isinstance(output[0], dict) else None
    if not usage or usage.get("type") == "duration":
        return
    of_input = usage.get("prompt_tokens", usage.get("input_tokens"))
    of_output = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    lines = endpoint.log.read_text().rpartition("\n")[0].splitlines()
    (line,) = (json.loads(line) for line in lines if f'"request_id": "{job["id"]}"' in line and '"outcome"' in line)
    assert (line["input_tokens"], line["output_tokens"]) == (of_input, of_output)


def test_the_stream_of_a_failed_job_ends_with_the_error(workers: Workers) -> None:
    with httpx.Client(base_url=workers.endpoint("chat").url, timeout=TIMEOUT) as client:
        job = client.post("run", json={"input": {"prompt": "Hello", "model": "gpt-9", "stream": True}}).json()
        answer = streamed(client, job["id"])
        result = client.get(f"status/{job['id']}").json()
    ((last,),) = (part["output"] for part in answer["stream"][-1:])
    assert (answer["status"], result["status"]) == ("FAILED", "FAILED")
    assert last["error"] == json.loads(result["error"])


def test_the_page_has_an_example_for_each_kind_of_input() -> None:
    assert {example.model for example in EXAMPLES} == {"chat", "embedding", "audio", "speech", "adapters"}
    assert {example.path for example in EXAMPLES} == {"runsync", "run", "openai/v1/chat/completions"}
    for word in (
        "image_url",
        "video_url",
        "audio_url",
        "input_file",
        "tools",
        "response_format",
        "/v1/embeddings",
        "/v1/rerank",
        "input_url",
    ):
        assert any(word in example.request for example in EXAMPLES), word


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        pytest.param({"a": 1}, {"b": 1}, id="a missing key"),
        pytest.param({"a": 1}, {"a": 2}, id="another number"),
        pytest.param({"a": 1}, {"a": "1"}, id="text instead of a number"),
        pytest.param({"a": 0.5}, {"a": "0.5"}, id="text instead of a fraction"),
        pytest.param({"a": None}, {"a": False}, id="false instead of null"),
        pytest.param(["x"], ["x", "y"], id="a longer list"),
        pytest.param(["x", "y", "…"], ["x"], id="a list shorter than the part shown"),
        pytest.param("Hello…", "Goodbye", id="another text"),
        pytest.param({"a": {"b": [{"c": "x"}]}}, {"a": {"b": [{"c": "y"}]}}, id="a difference deep inside"),
        pytest.param({"created": 1}, {"created": "now"}, id="a time that is text"),
    ],
)
def test_a_different_answer_is_noticed(shown: Any, real: Any) -> None:
    assert len(list(examples.differences(shown, real))) == 1


def test_a_shortened_answer_matches() -> None:
    shown = {"id": "sync-…", "list": [1, "…"], "score": 0.3, "created": 1}
    assert not list(
        examples.differences(shown, {"id": "sync-7", "list": [1, 2], "score": 0.4, "created": 2, "more": 1})
    )


def test_chunks_may_be_cut_anywhere() -> None:
    def chunk(text: str, **fields: Any) -> Any:
        return {"choices": [{"index": 0, "delta": {"content": text}, **fields}]}

    one = examples.whole({"output": [[chunk("Hello", finish_reason="stop")]]})
    assert one == examples.whole({"output": [[chunk("He")], [chunk("l"), chunk("lo", finish_reason="stop")]]})


def test_an_unmarked_json_example_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1: "):
        examples.read("```json\n{}\n```\n")
