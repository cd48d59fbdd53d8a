"""`/ping`, `/health`, `/info` and `/metrics` over real sockets, in every state of the worker."""

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.serving import ServedWorker, serving


def test_ping_and_health_show_the_state() -> None:
    with serving(ready=False) as worker:

        def statuses() -> tuple[int, int, str]:
            health = worker.get("/health")
            return worker.get("/ping").status_code, health.status_code, health.json()["status"]

        assert statuses() == (204, 503, "starting")
        worker.become_ready()
        assert statuses() == (200, 200, "ready")
        worker.lifecycle.stopping.set()
        assert statuses() == (503, 503, "draining")
        worker.lifecycle.ready(engine_is_dead=lambda: True)
        assert statuses() == (503, 503, "dead")
        worker.lifecycle.ready(engine_is_dead=lambda: False)
        worker.lifecycle.refuse("MODEL_NAME='x': no such model")
        assert statuses() == (503, 503, "refused")


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_head_answers_like_get_without_a_body(path: str) -> None:
    with serving(worker_api_key="key") as worker, httpx.Client(base_url=worker.url, timeout=10) as client:
        for _ in range(2):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content, head.headers["content-length"]) == (
                get.status_code, b"", get.headers["content-length"],
            )  # fmt: skip
        assert client.head("/metrics", headers={"authorization": "Bearer key"}).status_code == 405


def test_info_hides_keys() -> None:
    with serving(worker_api_key="hush-hush", vllm_extra_args="--api-key hush-hush") as worker:
        info = worker.get("/info", headers={"authorization": "Bearer hush-hush"})
        assert info.json()["settings"]["worker_api_key"] == "***"
        assert info.json()["request_memory_bytes"] == {"held": 0, "limit": worker.memory.limit}
        assert "hush" not in info.text


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[ServedWorker, httpx.Client, Any]]:
    """A worker, a client of it and its OpenAPI document."""
    with serving() as worker, httpx.Client(base_url=worker.url, timeout=10) as client:
        yield worker, client, client.get("/openapi.json").json()


def test_the_openapi_document_lists_the_workers_own_routes(fuzzed: tuple[ServedWorker, httpx.Client, Any]) -> None:
    assert fuzzed[2]["paths"].keys() == {"/ping", "/health", "/info", "/metrics"}


@settings(max_examples=300, deadline=None)
@given(
    path=st.sampled_from(["/ping", "/health", "/info", "/metrics"]),
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "TRACE"]),
    query=st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3),
    headers=st.dictionaries(
        st.sampled_from(["accept", "content-type", "x-request-id", "traceparent", "authorization", "range"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40).map(str.strip),
        max_size=3,
    ),
    body=st.binary(max_size=100),
    state=st.sampled_from(["starting", "ready", "draining", "failed", "dead", "refused"]),
)
def test_every_response_matches_the_openapi_document(
    fuzzed: tuple[ServedWorker, httpx.Client, Any],
    path: str,
    method: str,
    query: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    state: Any,
) -> None:
    worker, client, document = fuzzed
    worker.lifecycle._state = state
    response = client.request(method, path, params=query, headers=headers, content=body)
    if method == "HEAD" and path in ("/ping", "/health"):
        assert response.status_code == client.get(path).status_code
        assert not response.content
        return
    if method != "GET":
        assert response.status_code == 405
        assert response.headers["allow"] == "GET"
        return
    documented = document["paths"][path]["get"]["responses"]
    assert str(response.status_code) in documented
    content = documented[str(response.status_code)].get("content", {})
    if schema := content.get("application/json", {}).get("schema"):
        jsonschema.validate(response.json(), schema | {"components": document["components"]})
