"""Nodes of a cluster as processes of their own, in which a process that sleeps stands for the engine."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.support.tiny import ROOT
from worker.cluster import terms
from worker.cluster.follower import Follower
from worker.cluster.head import Head
from worker.cluster.link import Link, Place
from worker.cluster.role import Role
from worker.errors import EngineDiedError, StartupError

DEFAULTS: dict[str, Any] = {
    "nodes": 2,
    "head": "127.0.0.1",
    "timeout": 20.0,
    "silence": 8.0,
    "key": "a key",
    "versions": {"vllm": "0.32.0"},
    "terms": {"DTYPE": "bfloat16"},
    "gpus": "1 x H100",
    "download": 0.0,
    "end": "",
    "hangs": False,
    "drain": 0.0,
    "unreachable": False,
    "prefix": [],
}


class Node:
    """A node in a process of its own."""

    def __init__(self, folder: Path, rank: int, port: int, **options: Any) -> None:
        options = {**DEFAULTS, "rank": rank, "port": port, "address": f"127.0.0.{rank + 1}", **options}
        self._output = folder / f"node-{rank}-{time.monotonic_ns()}.log"
        command = [*options["prefix"], sys.executable, "-W", "ignore", "-m", "tests.support.node", json.dumps(options)]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self._output.read_text()

    def expect(self, text: str, seconds: float = 30) -> "Node":
        """Wait until the node has written a text."""
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < deadline, f"{text!r} is missing in:\n{self.log}"
            time.sleep(0.02)
        return self

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def code(self, seconds: float = 30) -> int:
        """Wait for the end of the node and return its exit code."""
        return self._process.wait(timeout=seconds)

    def engine(self) -> int:
        """Return the process id of the engine."""
        return int(self.expect("engine ").log.partition("engine ")[2].split()[0])

    def close(self) -> None:
        """Kill the node and its engine."""
        self._process.kill()
        self._process.wait()
        if "engine " in self.log:
            with suppress(ProcessLookupError):
                os.kill(self.engine(), signal.SIGKILL)


class Nodes:
    """Starts nodes of one cluster."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self.port = port
        self._nodes: list[Node] = []

    def start(self, rank: int, **options: Any) -> Node:
        self._nodes.append(Node(self._folder, rank, self.port, **options))
        return self._nodes[-1]

    def start_all(self, nodes: int = 2, **options: Any) -> list[Node]:
        """Start all nodes of a cluster and wait until the head serves."""
        started = [self.start(rank, nodes=nodes, **options) for rank in range(nodes)]
        return [node.expect("serving") for node in started]

    def close(self) -> None:
        for node in self._nodes:
            node.close()


@contextmanager
def cluster(folder: Path, port: int) -> Iterator[Nodes]:
    """Start nodes within a block. Those that are left at its end are killed."""
    nodes = Nodes(folder, port)
    try:
        yield nodes
    finally:
        nodes.close()


def say(text: object) -> None:
    print(text, flush=True)


class BehindFirewall(Follower):
    """Names a port that nobody can reach."""

    def join(self) -> None:
        self._probed = socket.socket()
        self._probed.bind((self.place.address, 0))
        Link.join(self)


def link_of(options: dict[str, Any], stopped: threading.Event, stopping: threading.Event) -> Link:
    role = Role(options["rank"], options["nodes"], options["head"], options["address"], None, 29501)
    place = Place(
        role,
        options["address"],
        options["port"],
        timeout=options["timeout"],
        key=options["key"].encode(),
        gpus=options["gpus"],
        silence=options["silence"],
    )
    versions = terms.of(options["versions"])
    if options["unreachable"]:
        return BehindFirewall(place, versions)
    return Head(place, versions, stopping.set, stopped.is_set) if role.is_head else Follower(place, versions)


def run(options: dict[str, Any]) -> int:
    """Do what a worker does with its cluster, from the start to the end."""
    stopped, stopping = threading.Event(), threading.Event()
    cluster = link_of(options, stopped, stopping)
    cluster.join()
    download = subprocess.Popen(["sleep", str(options["download"])])
    if download.wait() != 0:
        cluster.check()
        raise StartupError("The download has failed.")
    cluster.agree(terms.of(options["terms"]))
    engine = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    engine.start()
    say(f"engine {engine.pid}")
    cluster.announce_ready()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    return serve(options, cluster, engine, stopped, stopping)


def serve(
    options: dict[str, Any], cluster: Link, engine: Any, stopped: threading.Event, stopping: threading.Event
) -> int:
    left = served = False
    while engine.is_alive():
        if cluster.is_serving and not served:
            say("serving")
            served = True
        if options["rank"] == 0 and ((served and options["end"]) or stopped.is_set() or stopping.is_set()):
            time.sleep(options["drain"])
            engine.kill()
            cluster.leave(options["end"] or ("was stopped" if stopped.is_set() else "ends because a node was stopped"))
            return 1 if stopping.is_set() else 0
        if stopped.is_set() and not left:
            cluster.leave()
            left = True
        time.sleep(0.02)
    if cluster.finished:
        return 0
    if options["hangs"]:
        time.sleep(600)
    cluster.check()
    cluster.leave("has failed: its engine has died")
    raise EngineDiedError


def main(arguments: Sequence[str]) -> NoReturn:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        code = run(json.loads(arguments[0]))
    except StartupError as error:
        say(f"error: {error}")
        code = error.exit_code
    say(f"code {code}")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
