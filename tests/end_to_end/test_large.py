"""Large inputs and results with the real engine, from the queue and over HTTP."""

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from standin import Behaviour, Job
from tests.conftest import Endpoint, HttpWorker
from tests.support import media
from tests.support.s3 import LinkServer, S3Server, s3_server

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
ANSWER = "Hello! How can I help you?"
LARGE = {"prompt": ["Once upon a time"] * 64, "max_tokens": 32, "logprobs": 20, "ignore_eos": True}
"""The answer has more than 1 MB."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def files() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


def finished(endpoint: Endpoint, job_input: Any, **request: Any) -> Job:
    job = endpoint.server.call(endpoint.server.platform.submit, {"input": job_input, **request})
    endpoint.server.wait_until(lambda _: job.ended, 60)
    assert job.error is None
    return job


def test_a_large_answer_of_the_engine_is_stored(endpoint: Endpoint, s3: S3Server, files: LinkServer) -> None:
    platform = endpoint.server.platform
    before, platform.behaviour = platform.behaviour, Behaviour(done_post_limit=1_000_000, done_refusal_status=400)
    try:
        with s3.locked():
            stored = finished(endpoint, LARGE, s3Config=s3.config)
        uploaded = finished(endpoint, {**LARGE, "upload_url": f"{files.url}/up/1?Signature=x"})
    finally:
        platform.behaviour = before
        # Another test checks that no other test leaves any.
        platform.records.oversized_posts.clear()
    for job, content in (
        (stored, httpx.get(stored.output["result_url"]).content),
        (uploaded, files.uploads["/up/1"]),
    ):
        assert len(json.loads(content)[0]["choices"]) == 64
        assert job.output["bytes"] == len(content)
        assert job.output["sha256"] == hashlib.sha256(content).hexdigest()
    assert uploaded.output["result_url"] == f"{files.url}/up/1"


def test_an_input_behind_a_link_is_answered_from_the_queue(endpoint: Endpoint, files: LinkServer) -> None:
    link = files.hold("job.json", CHAT)
    (answer,) = finished(endpoint, {"input_url": link}).output
    assert answer["choices"][0]["message"]["content"] == ANSWER
    (answer,) = finished(endpoint, {"route": "/v1/chat/completions", "body": {"input_url": link}}).output
    assert answer["choices"][0]["message"]["content"] == ANSWER


def test_a_body_behind_a_link_is_answered_over_http(http_worker: HttpWorker, files: LinkServer) -> None:
    with http_worker.client() as client:
        body = {"input_url": files.hold("body.json", CHAT)}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        body = {"input_url": files.hold("tokens.json", {"prompt": "Hello"})}
        assert client.post("/tokenize", json=body).json()["count"] == 1
        body = {"input_url": files.hold("stream.json", {**CHAT, "stream": True})}
        assert client.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("held", "status", "message"),
    [
        pytest.param(b"[]", 400, "'input_url': the link's content must be a JSON object.", id="a list"),
        pytest.param({"input_url": "https://x"}, 400, "must not have an 'input_url' too", id="a link again"),
        pytest.param({"prompt": "Hello"}, 400, "messages", id="the body of another route"),
        pytest.param(b"[" * 200, 400, "'input_url': the link's content is nested", id="nested too deeply"),
        pytest.param(None, 422, "'input_url': the link's server answered with HTTP status 404.", id="nothing"),
    ],
)
def test_a_wrong_body_behind_a_link_is_refused(
    http_worker: HttpWorker, files: LinkServer, held: Any, status: int, message: str
) -> None:
    link = f"{files.url}/nothing" if held is None else files.hold("wrong.json", held)
    with http_worker.client() as client:
        answer = client.post("/v1/chat/completions", json={"input_url": link})
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text


def test_errors_name_the_parts_of_the_body_behind_the_link(http_worker: HttpWorker, files: LinkServer) -> None:
    image = base64.b64encode(media.picture("red")[:20]).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    with http_worker.client() as client:
        link = files.hold("image.json", {"messages": messages})
        answer = client.post("/v1/chat/completions", json={"input_url": link})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[1]"
