"""The HTTP server's thread and forks of its process."""

import asyncio
import json
import subprocess
import sys
import textwrap

from tests.support.tiny import ROOT
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

    with HttpServer(app, [0]) as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.ports[0], timeout=10)
        kept.request("GET", "/")
        answers = [kept.getresponse().read().decode()]
        began = time.monotonic()
        ours, theirs = os.pipe()
        if (child := os.fork()) == 0:
            os.write(theirs, json.dumps(internet_sockets()).encode())
            time.sleep(60)
        in_child = json.loads(os.read(ours, 100))
        seconds = time.monotonic() - began
        kept.request("GET", "/")
        answers.append(kept.getresponse().read().decode())
        print(json.dumps({"parent": internet_sockets(), "child": in_child, "answers": answers, "seconds": seconds}))
        os.kill(child, 9)
"""


def test_a_fork_takes_nothing_along_and_the_server_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["child"] == 0
    assert told["parent"] > 0
    assert told["answers"] == ["ok", "ok"]
    assert told["seconds"] < 4


def test_a_signal_after_the_end_does_nothing() -> None:
    async def app(_scope: object, _receive: object, _send: object) -> None:
        """Answer nobody."""

    with HttpServer(app, [0], host="127.0.0.1") as server:
        pass
    server.notify(asyncio.Event())
