"""CORS headers on the worker's own answers, over real sockets, compared with those of Starlette's middleware."""

from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from tests.http.serving import CHAT, Endless, echo, open_stream, serving
from worker.request.asgi import Receive, Send

PAGE = "https://page.example"
PREFLIGHT = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
ONE_PAGE = {"ALLOWED_ORIGINS": f'["{PAGE}"]'}


@pytest.mark.parametrize(
    ("variables", "origin", "allowed"),
    [
        pytest.param({}, PAGE, None, id="no origin by default"),
        pytest.param(ONE_PAGE, PAGE, PAGE, id="an allowed origin"),
        pytest.param(ONE_PAGE, "https://other.example", None, id="another origin"),
        pytest.param({"ALLOWED_ORIGINS": '["*"]'}, PAGE, "*", id="all origins"),
        pytest.param({"ALLOWED_ORIGINS": '["*"]'}, None, None, id="no browser"),
        pytest.param(
            {"VLLM_EXTRA_ARGS": '--seed 1 --allowed_origins=["*"]'.replace('"', '\\"')}, PAGE, "*", id="extra"
        ),
        pytest.param({"ALLOWED_ORIGINS": "not JSON"}, PAGE, None, id="a wrong value"),
    ],
)
def test_errors_have_the_headers_that_the_flags_of_vllm_ask_for(
    variables: dict[str, str], origin: str | None, allowed: str | None
) -> None:
    with serving(variables=variables, worker_api_key="key") as worker:
        refused = worker.post(headers={} if origin is None else {"origin": origin})
        assert refused.status_code == 401
        assert refused.headers.get("access-control-allow-origin") == allowed


def test_credentials_name_the_origin() -> None:
    with serving(variables={"ALLOWED_ORIGINS": '["*"]', "ALLOW_CREDENTIALS": "true"}, worker_api_key="key") as worker:
        headers = worker.post(headers={"origin": PAGE}).headers
        assert headers["access-control-allow-origin"] == PAGE
        assert headers["access-control-allow-credentials"] == "true"


def test_every_error_of_the_worker_can_be_read_by_a_browser() -> None:
    origin = {"origin": PAGE}
    with serving(Endless(), concurrency=1, max_queue=0, variables=ONE_PAGE, max_request_bytes=99) as worker:
        refused = [
            worker.get("/nothing", headers=origin),
            worker.get(CHAT, headers=origin),
            worker.post(json=None, content=b"x" * 100, headers=origin),
            worker.post(json=None, content=iter([b"x" * 60] * 2), headers=origin),
            worker.get("/ping", headers={**origin, **{f"x-{number}": "y" for number in range(250)}}),
        ]
        with open_stream(worker):
            refused.append(worker.post(headers=origin))
        worker.lifecycle.stopping.set()
        refused.append(worker.post(headers=origin))
    assert [response.status_code for response in refused] == [404, 405, 413, 413, 431, 429, 503]
    assert {response.headers["access-control-allow-origin"] for response in refused} == {PAGE}


def test_a_browser_may_ask_before_its_request_while_the_model_is_loading() -> None:
    with serving(ready=False, variables=ONE_PAGE, worker_api_key="key") as worker:
        answer = httpx.options(f"{worker.url}{CHAT}", headers=PREFLIGHT)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        assert answer.headers["access-control-allow-headers"] == "authorization"
        assert httpx.options(f"{worker.url}{CHAT}", headers={**PREFLIGHT, "origin": "https://x.example"}).is_error


def test_headers_of_vllms_middleware_are_left_as_they_are() -> None:
    async def engine(scope: Any, receive: Receive, send: Send) -> None:
        await CORSMiddleware(echo, allow_origins=["*"])(scope, receive, send)

    with serving(engine, variables=ONE_PAGE) as worker:
        headers = worker.post(headers={"origin": PAGE}).headers
        assert headers.get_list("access-control-allow-origin") == ["*"]
