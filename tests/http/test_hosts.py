"""The check of the Host header against DNS rebinding."""

from typing import Any

import pytest

from tests.http.serving import CHAT, error_of, serving
from worker.http import hosts
from worker.settings.settings import Settings

LOCAL = {"localhost", "127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("host", "name"),
    [
        pytest.param("localhost", "localhost", id="a name"),
        pytest.param("LocalHost:8000", "localhost", id="with a port"),
        pytest.param("127.0.0.1:80", "127.0.0.1", id="an address"),
        pytest.param("[::1]:8000", "::1", id="an IPv6 address with a port"),
        pytest.param("[::1]", "::1", id="an IPv6 address"),
        pytest.param("::1", "::1", id="an IPv6 address without brackets"),
        pytest.param("localhost.evil.example", "localhost.evil.example", id="a name that begins like an allowed one"),
        pytest.param("", "", id="no header"),
    ],
)
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert hosts.name(host) == name


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        pytest.param({}, set(), id="all addresses"),
        pytest.param({"host": "192.168.1.2"}, set(), id="an address of the network"),
        pytest.param({"host": "worker.example"}, set(), id="a name"),
        pytest.param({"host": "127.0.0.1", "worker_api_key": "key"}, set(), id="a key"),
        pytest.param({"host": "127.0.0.1"}, LOCAL, id="loopback"),
        pytest.param({"host": "127.0.0.5"}, LOCAL, id="another loopback address"),
        pytest.param({"host": "::1"}, LOCAL, id="loopback by IPv6"),
        pytest.param({"host": "localhost"}, LOCAL, id="loopback by name"),
        pytest.param({"host": "::1", "allowed_hosts": "box.lan, [::1]"}, {"box.lan", "::1"}, id="other names"),
    ],
)
def test_only_a_loopback_address_without_a_key_restricts_the_names(settings: dict[str, Any], allowed: set[str]) -> None:
    assert hosts.allowed(Settings.model_validate(settings)) == allowed


@pytest.mark.parametrize("path", [CHAT, "/", "/info", "/ping", "/health"])
def test_a_web_page_cannot_read_a_local_worker_by_dns_rebinding(path: str) -> None:
    with serving(host="127.0.0.1", playground=True) as worker:
        for name in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            refused = worker.get(path, headers={"host": name})
            assert refused.status_code == 403
            assert "ALLOWED_HOSTS" in error_of(refused)["message"]
        for name in ("localhost", "127.0.0.1:1", "[::1]:8000"):
            assert worker.get(path, headers={"host": name}).status_code in (200, 405)
