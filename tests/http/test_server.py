"""The HTTP server: its ports, forks of its process, and calls after its end."""

import asyncio
import json
import socket
import subprocess
import sys
import textwrap

import httpx
import pytest

from tests.http.serving import echo, serving
from tests.support.ports import free_port
from tests.support.tiny import ROOT
from worker.errors import ConfigurationError
from worker.http.server import HttpServer

PROGRAM = """
    import http.client, json, os, socket, time
    from pathlib import Path
    from worker.http.server import HttpServer

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def internet_sockets():
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        inodes = {link[8:-1] for link in links if link.startswith("socket:")}
        lines = [line for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").read_text().splitlines()]
        return sum(line.split()[9] in inodes for line in lines[1:])

    with HttpServer(app, [0], "127.0.0.1") as server:
        client = http.client.HTTPConnection("127.0.0.1", server.ports[0], timeout=10)
        client.request("GET", "/")
        answers = [client.getresponse().read().decode()]
        began = time.monotonic()
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writing, json.dumps(internet_sockets()).encode())
            time.sleep(60)
        in_child = json.loads(os.read(reading, 100))
        seconds = time.monotonic() - began
        client.request("GET", "/")
        answers.append(client.getresponse().read().decode())
        print(json.dumps({"parent": internet_sockets(), "child": in_child, "answers": answers, "seconds": seconds}))
        os.kill(child, 9)
"""


def test_the_server_listens_on_all_its_ports() -> None:
    with serving() as worker, HttpServer(worker.gate, [0, free_port()], "127.0.0.1") as server:
        assert [httpx.get(f"http://127.0.0.1:{port}/ping").status_code for port in server.ports] == [200, 200]


def test_a_port_in_use_is_a_configuration_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigurationError, match="cannot be opened: Address already in use"),
    ):
        HttpServer(echo, [taken.getsockname()[1]], "127.0.0.1")


def test_an_address_of_another_machine_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"HOST='203.0.113.1'.*address of this machine"):
        HttpServer(echo, [0], "203.0.113.1")


@pytest.mark.parametrize(
    ("host", "address"), [("localhost", "127.0.0.1"), ("::1", "[::1]"), ("::", "127.0.0.1"), ("::", "[::1]")]
)
def test_the_server_listens_on_names_and_ipv6_addresses(host: str, address: str) -> None:
    with serving() as worker, HttpServer(worker.gate, [0], host) as server:
        assert httpx.get(f"http://{address}:{server.ports[0]}/ping").status_code == 200


def test_a_forked_child_has_no_sockets_and_the_server_continues() -> None:
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    result = json.loads(completed.stdout)
    assert result["child"] == 0
    assert result["parent"] > 0
    assert result["answers"] == ["ok", "ok"]
    assert result["seconds"] < 4


def test_notify_after_the_end_of_the_server_does_nothing() -> None:
    event = asyncio.Event()
    with HttpServer(echo, [0], "127.0.0.1") as server:
        pass
    server.notify(event)
    assert not event.is_set()
