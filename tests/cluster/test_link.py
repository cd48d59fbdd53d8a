"""Nodes as processes on loopback addresses: they find each other in any order, and all end when one is lost."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.node import Nodes, cluster
from tests.support.ports import free_port
from tests.support.together import together
from worker.cluster import terms
from worker.cluster.cluster import FINISHED, SingleMachine
from worker.cluster.head import Head
from worker.cluster.link import Place
from worker.cluster.role import Role
from worker.errors import ConfigurationError

SILENCE = 3.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with cluster(tmp_path, free_port()) as nodes:
        yield nodes


def have_ended(*processes: int) -> bool:
    running = [psutil.Process(process) for process in processes if psutil.pid_exists(process)]
    return not psutil.wait_procs(running, timeout=2)[1]


def has_no_sockets(engine: int) -> bool:
    """Return whether an engine closes the sockets that it has inherited."""
    deadline = time.monotonic() + 10
    while psutil.Process(engine).net_connections("inet"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_followers_may_start_first(nodes: Nodes) -> None:
    followers = [nodes.start(rank, nodes=3) for rank in (2, 1)]
    time.sleep(0.8)
    head = nodes.start(0, nodes=3, end=FINISHED)
    head.expect("All 3 nodes have joined")
    assert [node.code() for node in (head, *followers)] == [0, 0, 0]
    assert all("engine " in node.log for node in (head, *followers))


def test_the_head_may_start_first_and_the_engine_inherits_no_sockets(nodes: Nodes) -> None:
    head = nodes.start(0).expect("Waiting until all 2 nodes have joined")
    follower = nodes.start(1).expect("serving")
    assert all(has_no_sockets(node.engine()) for node in (head, follower))
    head.signal(signal.SIGTERM)
    assert head.code() == 0
    assert follower.code() == 1
    assert "error: The head (127.0.0.1) was stopped. This node ends, too." in follower.log
    assert have_ended(head.engine(), follower.engine())


def test_a_follower_that_is_stopped_stays_until_the_head_has_ended(nodes: Nodes) -> None:
    head, follower = nodes.start_all()
    follower.signal(signal.SIGTERM)
    assert (head.code(), follower.code()) == (1, 0)
    assert "Node 1 (127.0.0.2) is being stopped. This node ends, too." in head.log


def test_nodes_that_are_all_stopped_end_with_code_0(nodes: Nodes) -> None:
    head, follower = nodes.start_all(drain=2)
    head.signal(signal.SIGTERM)
    time.sleep(0.5)
    follower.signal(signal.SIGTERM)
    assert (head.code(), follower.code()) == (0, 0)


def test_a_follower_names_the_node_that_is_missing(nodes: Nodes) -> None:
    nodes.start(0, nodes=3, timeout=2.0)
    follower = nodes.start(1, nodes=3, timeout=5.0)
    assert follower.code() == 1
    assert "it has ended the cluster: node 2 of 3 has not come within CLUSTER_TIMEOUT=2 s" in follower.log


def test_the_other_followers_learn_which_one_is_stopped(nodes: Nodes) -> None:
    head, stopped, other = nodes.start_all(nodes=3)
    stopped.signal(signal.SIGTERM)
    assert (head.code(), stopped.code(), other.code()) == (1, 0, 1)
    assert "error: Node 1 (127.0.0.2) was stopped. This node ends, too." in other.log


def test_a_wrong_address_and_a_missing_node_end_the_start_within_the_limit(nodes: Nodes) -> None:
    lost = nodes.start(1, head="127.0.0.9", timeout=1.0)
    head = nodes.start(0, timeout=1.0, nodes=3)
    assert (lost.code(), head.code()) == (1, 1)
    assert "The head (127.0.0.9) could not be joined at port" in lost.log
    assert "Nodes 1 and 2 of 3 have not come within CLUSTER_TIMEOUT=1 s" in head.log


def test_a_node_with_another_key_is_refused_and_the_head_says_so(nodes: Nodes) -> None:
    head = nodes.start(0, timeout=1.5).expect("Waiting")
    follower = nodes.start(1, key="another key")
    assert (head.code(), follower.code()) == (1, 2)
    assert "The key differs from the head's. Set the same CLUSTER_KEY" in follower.log
    assert "Node 1 of 2 has not come within CLUSTER_TIMEOUT=1.5 s (127.0.0.2 was refused: its key is wrong)" in head.log


def test_strangers_on_the_port_do_not_disturb(nodes: Nodes) -> None:
    head = nodes.start(0).expect("Waiting")
    address = ("127.0.0.1", nodes.port)
    silent = [socket.create_connection(address) for _ in range(5)]
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"[" * 200_000 + b"\n",
        b"{}\n",
        b"x" * 1_000_000,
        b'{"rank":1}\n',
    ):
        with socket.create_connection(address) as stranger:
            stranger.settimeout(10)
            try:
                stranger.sendall(junk)
                while stranger.recv(1000):
                    stranger.shutdown(socket.SHUT_WR)
            except OSError:
                pass
    nodes.start(1).expect("serving")
    for stranger in silent:
        stranger.close()
    assert "sent a line that is not JSON" in head.log


@pytest.mark.parametrize(
    ("options", "head_says", "follower_says"),
    [
        pytest.param(
            {"versions": {"vllm": "0.31.0"}},
            "Node 1 (127.0.0.2) does not match the head: vllm: 0.32.0 here, 0.31.0 on node 1 (127.0.0.2).",
            "The head (127.0.0.1) refused this node: vllm: 0.31.0 here, 0.32.0 on the head.",
            id="another version, before the download",
        ),
        pytest.param(
            {"terms": {"MM_ENCODER_TP_MODE": "data"}, "download": 0.0},
            "MM_ENCODER_TP_MODE: not set here, data on node 1 (127.0.0.2).",
            "MM_ENCODER_TP_MODE: data here, not set on the head.",
            id="another argument, before the engine",
        ),
        pytest.param(
            {"nodes": 3},
            "Node 1 (127.0.0.2) does not match the head: number of nodes: 2 here, 3 on node 1 (127.0.0.2).",
            "number of nodes: 3 here, 2 on the head.",
            id="another number of nodes",
        ),
    ],
)
def test_a_node_that_differs_is_refused_in_words_on_both_sides(
    nodes: Nodes, options: dict[str, Any], head_says: str, follower_says: str
) -> None:
    # The head downloads for long unless the terms, which come later, are compared.
    head = nodes.start(0, download=0.0 if "terms" in options else 600.0)
    follower = nodes.start(1, **{"download": 600.0, **options})
    assert (head.code(), follower.code()) == (2, 2)
    assert head_says in head.log
    assert follower_says in follower.log
    assert "engine " not in head.log + follower.log


def killed(nodes: Nodes, rank: int) -> list[str]:
    """Kill a node of three, and return the errors of the others. None takes long, and no engine is left."""
    running = nodes.start_all(nodes=3)
    engines = [node.engine() for node in running]
    lost = running.pop(rank)
    began = time.monotonic()
    lost.signal(signal.SIGKILL)
    assert [node.code() for node in running] == [1, 1]
    assert time.monotonic() - began < 15
    os.kill(engines.pop(rank), signal.SIGKILL)
    assert have_ended(*engines)
    return [node.log.partition("error: ")[2] for node in running]


def test_when_a_follower_is_killed_the_others_name_it_and_all_find_each_other_again(nodes: Nodes) -> None:
    errors = killed(nodes, 1)
    assert all(error.startswith("Node 1 (127.0.0.2) was lost: ") for error in errors)
    # The same port, at once.
    nodes.start_all(nodes=3)


def test_when_the_head_is_killed_the_followers_name_it(nodes: Nodes) -> None:
    assert all(error.startswith("The head (127.0.0.1) was lost: ") for error in killed(nodes, 0))


def frozen(folder: Path, rank: int) -> None:
    """Freeze one of two nodes: the other one names it, and so does the frozen one, once it runs again."""
    with cluster(folder, free_port()) as nodes:
        running = nodes.start_all(silence=SILENCE)
        name = ("The head (127.0.0.1)", "Node 1 (127.0.0.2)")[rank]
        other = running[1 - rank]
        running[rank].signal(signal.SIGSTOP)
        assert other.code() == 1
        assert f"error: {name} was lost: it sent nothing for 3 s." in other.log
        running[rank].signal(signal.SIGCONT)
        assert running[rank].code() == 1


def paused(folder: Path) -> None:
    """Freeze both of two nodes for a second, one after the other: nothing is lost."""
    with cluster(folder, free_port()) as nodes:
        running = nodes.start_all()
        for node in running:
            node.signal(signal.SIGSTOP)
            time.sleep(1)
            node.signal(signal.SIGCONT)
        time.sleep(0.5)
        running[0].signal(signal.SIGTERM)
        assert (running[0].code(), running[1].code()) == (0, 1)
        assert "was stopped" in running[1].log


def hanging(folder: Path) -> None:
    """Kill the head while the follower's main thread hangs."""
    with cluster(folder, free_port()) as nodes:
        head, follower = nodes.start_all(hangs=True)
        head.signal(signal.SIGKILL)
        assert follower.code() == 1
        assert "The worker did not end by itself in time. It ends now with code 1." in follower.log


def test_a_frozen_node_is_lost_unless_it_goes_on_in_time_and_a_hanging_one_ends(tmp_path: Path) -> None:
    works = (lambda: frozen(tmp_path, 0), lambda: frozen(tmp_path, 1), lambda: paused(tmp_path))
    together(*works, lambda: hanging(tmp_path))


def test_a_follower_whose_engine_dies_says_so(nodes: Nodes) -> None:
    head, follower = nodes.start_all()
    os.kill(follower.engine(), signal.SIGKILL)
    assert (head.code(), follower.code()) == (1, 1)
    assert "error: Node 1 (127.0.0.2) has failed: its engine has died." in head.log


def test_a_follower_that_ends_before_all_have_joined_may_come_again(nodes: Nodes) -> None:
    head = nodes.start(0, nodes=3, end=FINISHED).expect("Waiting")
    first = nodes.start(1, nodes=3).expect("")
    head.expect("node 1 (127.0.0.2) has joined")
    first.signal(signal.SIGKILL)
    head.expect("It is waited for again")
    rest = [nodes.start(rank, nodes=3) for rank in (1, 2)]
    assert [node.code() for node in (head, *rest)] == [0, 0, 0]


def test_a_second_node_with_the_same_rank_waits(nodes: Nodes) -> None:
    head = nodes.start(0, nodes=3).expect("Waiting")
    nodes.start(1, nodes=3)
    head.expect("node 1 (127.0.0.2) has joined")
    second = nodes.start(1, nodes=3, address="127.0.0.3", timeout=1.0)
    assert second.code() == 1
    assert "Node 1 has joined already, from 127.0.0.2. Each node needs a NODE_RANK of its own" in second.log


def test_a_port_that_is_taken_is_a_wrong_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        role = Role(0, 2, "127.0.0.1", "127.0.0.1", None, 29501)
        head = Head(Place(role, "127.0.0.1", taken.getsockname()[1], timeout=5), terms.of({}))
        with pytest.raises(ConfigurationError, match=r"cannot be opened .*Address already in use.*CLUSTER_PORT"):
            head.join()


def test_a_node_may_say_twice_that_it_ends() -> None:
    """The second time, the loop of its connection may be about to end."""
    role = Role(0, 2, "127.0.0.1", "127.0.0.1", None, 29501)
    for _ in range(50):
        head = Head(Place(role, "127.0.0.1", free_port(), timeout=5), terms.of({}))
        head.join()
        head.leave("has failed")
        head.leave()
        head._probed.close()


def test_a_network_that_lets_only_the_known_port_pass_ends_both(nodes: Nodes) -> None:
    """As a firewall does, the follower names a port that nobody can reach."""
    head, follower = (nodes.start(rank, unreachable=rank == 1) for rank in (0, 1))
    assert (head.code(), follower.code()) == (1, 1)
    assert "error: This node cannot reach node 1 (127.0.0.2) at port" in head.log
    assert "Connection refused. vLLM uses ports that the operating system chooses. Allow all TCP" in head.log
    assert "error: The head (127.0.0.1) cannot reach node 1 (127.0.0.2). This node ends, too." in follower.log


def test_a_single_machine_waits_for_nobody() -> None:
    alone = SingleMachine()
    alone.join()
    alone.wait()
    alone.agree(terms.of({"DTYPE": "bfloat16"}))
    alone.announce_ready()
    alone.check()
    alone.leave()
    assert (alone.describe(), alone.problem, alone.finished) == ({}, None, False)
