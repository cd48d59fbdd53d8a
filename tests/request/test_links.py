"""Bodies behind links over HTTP, with a local server. tests/queue/test_handler.py has those of jobs."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.s3 import LinkServer
from worker.errors import JobError, MediaTooLargeError, RefusedLinkError
from worker.media.fetch import Policy
from worker.memory import Budget, current_account
from worker.request.asgi import Request
from worker.request.links import LinkedInputs
from worker.settings import Settings

OPEN = Policy(seconds=5, private_networks=True)
CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[LinkServer]:
    with LinkServer() as server:
        yield server


def rewritten(
    body: bytes, path: str = CHAT, content_type: str = "application/json", policy: Policy = OPEN, limit: int = 1_000_000
) -> tuple[dict[str, str], bytes, int]:
    """Return the headers and the body that the app gets, and the bytes that the request's account holds."""
    settings = Settings(max_request_bytes=limit)

    async def run() -> tuple[dict[str, str], bytes, int]:
        account = Budget(10_000_000).account()
        current_account.set(account)
        headers = {"content-type": content_type, "content-length": str(len(body))}
        scope, data = await LinkedInputs(policy, settings).rewrite(Request("POST", path, headers=headers).scope(), body)
        return {name.decode(): value.decode() for name, value in scope["headers"]}, data, account.held

    return asyncio.run(run())


def body_of(link: str, **more: Any) -> bytes:
    return json.dumps({"input_url": link, **more}).encode()


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", ""])
def test_the_body_is_replaced_by_what_the_link_leads_to(server: LinkServer, content_type: str) -> None:
    held = b' {"messages": [] } '
    headers, body, counted = rewritten(body_of(server.hold("a", held)), content_type=content_type)
    assert body == held
    assert headers == {"content-type": "application/json", "content-length": str(len(held))}
    assert counted == len(held)


@pytest.mark.parametrize(
    ("body", "path", "content_type"),
    [
        pytest.param(b'{"messages": [{"content": "\\"input_url\\""}]}', CHAT, "application/json", id="in a text"),
        pytest.param(b'{"messages": [{"input_url": "https://x"}]}', CHAT, "application/json", id="in a message"),
        pytest.param(b'{"input_url": ', CHAT, "application/json", id="not JSON"),
        pytest.param(b'["input_url"]', CHAT, "application/json", id="a list"),
        pytest.param(b"", CHAT, "application/json", id="empty"),
        pytest.param(b'{"input_url": "https://x"}', CHAT, "multipart/form-data; boundary=x", id="a form"),
        pytest.param(b'{"input_url": "https://x"}', "/v1/load_lora_adapter", "application/json", id="a control route"),
        pytest.param(b'{"input_url": "%b"}' % (b"x" * 10_000), CHAT, "application/json", id="a very long link"),
    ],
)
def test_other_bodies_stay_as_they_are(body: bytes, path: str, content_type: str) -> None:
    headers, data, _ = rewritten(body, path, content_type)
    assert data is body
    assert headers["content-type"] == content_type


@pytest.mark.parametrize(
    ("policy", "limit", "error"),
    [
        pytest.param(Policy(), 1_000_000, RefusedLinkError, id="a private address"),
        pytest.param(Policy(domains=(("example.org",),)), 1_000_000, RefusedLinkError, id="another domain"),
        pytest.param(OPEN, 10, MediaTooLargeError, id="a large file"),
    ],
)
def test_links_obey_the_policy_and_the_limit(
    server: LinkServer, policy: Policy, limit: int, error: type[JobError]
) -> None:
    with pytest.raises(error, match=r"^'input_url': ") as raised:
        rewritten(body_of(server.hold("a", {"messages": []})), policy=policy, limit=limit)
    assert raised.value.param == "input_url"
    assert server.url not in str(raised.value)


def test_nothing_may_stand_beside_the_link(server: LinkServer) -> None:
    with pytest.raises(JobError, match="so 'model' must not stand beside it"):
        rewritten(body_of(server.hold("a", {}), model="tiny"))
    assert not server.requests
