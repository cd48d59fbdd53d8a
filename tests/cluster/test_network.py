"""Two machines whose network fails: it may be down for 5 s; if it stays down, both end and say which node was lost."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.namespaces import Cable, cable, require_namespaces
from tests.support.node import Node, Nodes, cluster
from tests.support.together import together

PORT = 29560


@pytest.fixture(autouse=True)
def namespaces() -> None:
    require_namespaces()


def start(nodes: Nodes, cable: Cable) -> list[Node]:
    started = [
        nodes.start(rank, head=cable.addresses[0], address=cable.addresses[rank], prefix=cable.prefix(rank))
        for rank in (0, 1)
    ]
    return [node.expect("serving") for node in started]


def interrupted(folder: Path) -> None:
    with cable() as network, cluster(folder, PORT) as nodes:
        head, follower = start(nodes, network)
        network.pull()
        time.sleep(5)
        network.plug_in()
        # Longer than the limit, counted from the cut.
        time.sleep(4)
        head.signal(signal.SIGTERM)
        assert (head.code(), follower.code()) == (0, 1)
        assert "The head (10.21.0.1) was stopped" in follower.log


def cut(folder: Path) -> None:
    with cable() as network, cluster(folder, PORT) as nodes:
        head, follower = start(nodes, network)
        network.pull()
        began = time.monotonic()
        assert (head.code(), follower.code()) == (1, 1)
        assert time.monotonic() - began < 15
        assert "error: Node 1 (10.21.0.2) was lost: it sent nothing for 8 s." in head.log
        assert "error: The head (10.21.0.1) was lost: it sent nothing for 8 s." in follower.log


def test_an_interruption_of_5_seconds_is_survived_and_a_longer_one_is_a_loss(tmp_path: Path) -> None:
    together(lambda: interrupted(tmp_path), lambda: cut(tmp_path))
