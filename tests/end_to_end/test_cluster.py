"""Two workers with the real engine on two machines, which are network namespaces: `make cluster-tests` runs them all.

The short half is part of `make test`. A start takes both cores for about 25 s, so that each test checks several things.
"""

import json
import os
import signal
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from standin import StandinServer, Status, worker_environment
from tests.conftest import have_ended
from tests.end_to_end.test_multimodal import CHAT, FILM, ask, turn
from tests.support.machines import Machine, Machines, codes_within, completion, joined_machines, ready
from tests.support.media import image_url
from tests.support.namespaces import require_namespaces
from worker.errors import ENGINE_DIED

pytestmark = pytest.mark.timeout(900)
long = pytest.mark.skipif("CLUSTER_TESTS" not in os.environ, reason="run by make cluster-tests")

TENSOR = {"TENSOR_PARALLEL_SIZE": "2"}
COPIES: dict[str, str] = {}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(TENSOR, id="one divided model"), pytest.param(COPIES, id="a copy on each machine")]
)

COMPLETIONS = "/v1/completions"
END_SECONDS = 15.0
"""The worker's limit for the time from a loss to the end of every node."""
LONG = 1900
"""Tokens of a request that still runs when the test does something to it."""


@pytest.fixture(autouse=True)
def namespaces() -> None:
    require_namespaces()


def check_media(head: Machine) -> None:
    with head.client() as api:
        for stream in (False, True):
            assert ask(api, CHAT, [{"role": "user", "content": "Hello"}], stream) == "Hello! How can I help you?"
            image = turn(CHAT, "What is this?", ("image", image_url("red")))
            assert ask(api, CHAT, [image], stream) == "The image is red."
            video = turn(CHAT, "What happens?", ("video", FILM))
            assert ask(api, CHAT, [video], stream) == "The video goes from red to blue."


def check_own_routes(machines: list[Machine]) -> None:
    """Every node answers the worker's own routes; a follower refuses all others."""
    head, *followers = machines
    for machine in machines:
        assert machine.ping() == 200
        health = machine.get("/health").json()
        assert health["status"] == "ready"
        cluster = health["cluster"]
        assert cluster["role"] == ("follower" if machine.rank else "head")
        assert (cluster["rank"], cluster["size"]) == (machine.rank, len(machines))
        # Each node tells the others every half second.
        machine.wait_until(partial(are_ready, machine, machines), 30, "not all nodes are ready")
        assert machine.get("/info").json()["startup_seconds"]["engine"] > 0
        assert sample(machine, "worker_ready") == 1
    for follower in followers:
        with follower.client() as api:
            for answer in (api.get("/v1/models"), api.post(COMPLETIONS, json=completion(1))):
                assert answer.status_code == 421
                assert f"{head.address}" in answer.json()["error"]["message"]


def are_ready(machine: Machine, machines: list[Machine]) -> bool:
    """Return whether a node knows that all others are ready."""
    nodes = machine.get("/health").json()["cluster"]["nodes"]
    expected = {each.rank: (each.address, "ready") for each in machines}
    return {node["rank"]: (node["address"], node["phase"]) for node in nodes} == expected


def samples(machine: Machine, name: str) -> dict[str, float]:
    """Return a metric of vLLM or the worker, summed for each engine."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(machine.get("/metrics").text):
        for each in family.samples:
            if each.name == name:
                engine = each.labels.get("engine", "")
                values[engine] = values.get(engine, 0) + each.value
    return values


def sample(machine: Machine, name: str) -> float:
    return sum(samples(machine, name).values())


def requests_running(head: Machine) -> float:
    return float(head.get("/health").json()["requests_running"])


def events(lines: Iterable[str]) -> list[Any]:
    """Return the events of a stream."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(each) for each in data if each != "[DONE]"]


def check_interruption(machines: Machines, head: Machine) -> None:
    """A stream goes on after the network was down for 5 s."""
    tokens = 300
    body = completion(tokens, stream=True, stream_options={"include_usage": True})
    with head.client() as api, api.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        machines.network.pull()
        time.sleep(5)
        machines.network.plug_in()
        *_, last = events(lines)
    assert last["usage"]["completion_tokens"] == tokens


class Callers:
    """A stream and a request without streaming, which run on the head."""

    def __init__(self, head: Machine, tokens: int = LONG) -> None:
        self._url = f"{head.url}{COMPLETIONS}"
        self._tokens = tokens
        pool = ThreadPoolExecutor(2)
        self._answers = [pool.submit(self._post, stream=stream) for stream in (True, False)]
        pool.shutdown(wait=False)
        head.wait_until(lambda: requests_running(head) == 2, 60, "no request runs")

    def _post(self, stream: bool) -> httpx.Response:
        return httpx.post(self._url, json=completion(self._tokens, stream=stream), timeout=60)

    def check_engine_died(self) -> None:
        """Both have got the error of a dead engine."""
        stream, answer = (answer.result() for answer in self._answers)
        assert ENGINE_DIED in stream.text
        assert stream.text.endswith("data: [DONE]\n\n")
        assert answer.status_code == 503
        assert ENGINE_DIED in answer.text

    def check_complete(self) -> None:
        """Both have got a complete answer."""
        stream, answer = (answer.result() for answer in self._answers)
        *_, last = events(stream.text.splitlines())
        assert last["choices"][0]["finish_reason"] == "length"
        assert answer.json()["usage"]["completion_tokens"] == self._tokens


def check_end(began: float, children: list[psutil.Process], codes: dict[Machine, int]) -> None:
    """The workers end in time with these codes, and none of their processes is left."""
    assert codes_within(began + END_SECONDS - time.monotonic(), *codes) == list(codes.values())
    assert have_ended(children)


def test_a_model_divided_between_two_machines(tmp_path: Path) -> None:
    with joined_machines(tmp_path, TENSOR) as machines:
        follower = machines.start(1)
        time.sleep(3)
        head = machines.start(0)
        ready(head, follower)
        check_media(head)
        check_own_routes([head, follower])
        check_interruption(machines, head)
        callers = Callers(head)
        children, began = [*head.children(), *follower.children()], time.monotonic()
        follower.send(signal.SIGKILL)
        check_end(began, children, {head: 1})
        callers.check_engine_died()
        assert "Node 1 (10.21.0.2) was lost" in head.log


def test_a_copy_of_the_model_on_each_of_two_machines(tmp_path: Path) -> None:
    with joined_machines(tmp_path, COPIES) as machines:
        head, follower = machines.start_all()
        check_media(head)
        check_own_routes([head, follower])
        check_load(head)
        children, began = [*head.children(), *follower.children()], time.monotonic()
        head.send(signal.SIGKILL)
        check_end(began, children, {follower: 1})
        assert "The head (10.21.0.1) was lost" in follower.log


def check_load(head: Machine, requests: int = 40) -> None:
    """Both engines answer requests, and the head counts those of both."""
    before = samples(head, "vllm:request_success_total")
    with head.client() as api, ThreadPoolExecutor(requests) as pool:
        answers = [pool.submit(api.post, COMPLETIONS, json=completion(300)) for _ in range(requests)]
        head.wait_until(lambda: requests_running(head) == requests, 60, "requests do not run at once")
        assert [answer.result().json()["usage"]["completion_tokens"] for answer in answers] == [300] * requests
    after = samples(head, "vllm:request_success_total")
    answered = {engine: after[engine] - before[engine] for engine in after}
    assert answered.keys() == {"0", "1"}
    assert sum(answered.values()) == requests
    assert min(answered.values()) >= requests / 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("DTYPE", "float32", id="another type of numbers"),
        pytest.param("MM_ENCODER_TP_MODE", "data", id="another division of the encoder", marks=long),
    ],
)
def test_machines_with_different_settings_are_refused(tmp_path: Path, name: str, value: str) -> None:
    with joined_machines(tmp_path, {"STARTUP_FAILURE": "exit"}) as machines:
        head, follower = machines.start(0), machines.start(1, **{name: value})
        assert codes_within(180, head, follower) == [2, 2]
        assert f"{name}: not set here, {value} on node 1" in head.log
        assert f"{name}: {value} here, not set on the head" in follower.log
        for machine in (head, follower):
            assert "Starting to load model" not in machine.log


# ---- The long half


@long
@kinds
def test_a_network_that_stays_down_ends_both(tmp_path: Path, kind: dict[str, str]) -> None:
    with joined_machines(tmp_path, kind) as machines:
        head, follower = machines.start_all()
        callers = Callers(head)
        children, began = [*head.children(), *follower.children()], time.monotonic()
        machines.network.pull()
        check_end(began, children, {head: 1, follower: 1})
        callers.check_engine_died()
        assert "Node 1 (10.21.0.2) was lost: it sent nothing for 8 s. This node ends, too." in head.log
        assert "The head (10.21.0.1) was lost: it sent nothing for 8 s. This node ends, too." in follower.log


@long
@pytest.mark.parametrize(
    ("kind", "number", "message"),
    [
        pytest.param(TENSOR, signal.SIGKILL, "Node 1 (10.21.0.2) has failed", id="one divided model, killed"),
        pytest.param(TENSOR, signal.SIGSTOP, "the engine has been silent for 5 s", id="one divided model, suspended"),
        pytest.param(COPIES, signal.SIGKILL, "Node 1 (10.21.0.2) has failed", id="a copy on each machine, killed"),
        pytest.param(COPIES, signal.SIGSTOP, "engine 1 on node 1 has been silent", id="a copy on each, suspended"),
    ],
)
def test_the_end_of_an_engine_process_ends_both(
    tmp_path: Path, kind: dict[str, str], number: signal.Signals, message: str
) -> None:
    with joined_machines(tmp_path, {**kind, "ENGINE_STALL_TIMEOUT": "5"}) as machines:
        head, follower = machines.start_all()
        # With two copies, each of them answers one request.
        callers = Callers(head)
        children, began = [*head.children(), *follower.children()], time.monotonic()
        for process in follower.children("VLLM::"):
            process.send_signal(number)
        check_end(began, children, {head: 1, follower: 1})
        callers.check_engine_died()
        assert message in head.log


@long
def test_a_follower_with_a_wrong_address_of_the_head_ends_with_a_message(tmp_path: Path) -> None:
    wrong = dict.fromkeys(("PRIMARY_ADDR", "MASTER_ADDR"), "10.21.0.9")
    with joined_machines(tmp_path, {"CLUSTER_TIMEOUT": "10"}) as machines:
        head, follower = machines.start(0), machines.start(1, **wrong)
        assert codes_within(40, head, follower) == [1, 1]
        assert "Node 1 of 2 has not come within CLUSTER_TIMEOUT=10 s" in head.log
        limit = "could not be joined at port 29560 within CLUSTER_TIMEOUT=10 s"
        assert f"The head (10.21.0.9) {limit}: No route to host" in follower.log


@long
@kinds
@pytest.mark.parametrize("rank", [pytest.param(0, id="the head"), pytest.param(1, id="a follower")])
def test_requests_are_completed_when_a_node_is_stopped(tmp_path: Path, kind: dict[str, str], rank: int) -> None:
    with joined_machines(tmp_path, kind) as machines:
        nodes = machines.start_all()
        callers = Callers(nodes[0], tokens=600)
        nodes[rank].send(signal.SIGTERM)
        nodes[0].wait_until(lambda: nodes[0].ping() != 200, 5, "the head takes requests")
        callers.check_complete()
        # The node that was stopped has ended as it should. A supervisor brings the other one back.
        codes = {node: 0 if node is nodes[rank] else 1 for node in nodes}
        check_end(time.monotonic(), [], codes)


@long
def test_both_machines_end_after_a_local_job(tmp_path: Path) -> None:
    with joined_machines(tmp_path, COPIES) as machines:
        job = json.dumps({"input": {"prompt": "Once", "max_tokens": 5}})
        nodes = [machines.start(rank, ["--test_input", job]) for rank in (0, 1)]
        assert codes_within(90, *nodes) == [0, 0]
        assert '"status": "COMPLETED"' in nodes[0].log


@long
@kinds
def test_restarted_workers_find_each_other_again(tmp_path: Path, kind: dict[str, str]) -> None:
    with joined_machines(tmp_path, kind) as machines:
        nodes = machines.start_all()
        for killed in (1, 0):
            other = 1 - killed
            nodes[killed].send(signal.SIGKILL)
            nodes[killed].code()
            # As a supervisor does: at once, while the other one still ends.
            nodes[killed] = machines.start(killed)
            assert nodes[other].code(END_SECONDS) == 1
            nodes[other] = machines.start(other)
            ready(*nodes)
            check_media(nodes[0])


@long
def test_layers_divided_between_two_machines(tmp_path: Path) -> None:
    with joined_machines(tmp_path, {"PIPELINE_PARALLEL_SIZE": "2", "ENFORCE_EAGER": "false"}) as machines:
        head, follower = machines.start_all()
        check_media(head)
        check_own_routes([head, follower])


@long
def test_jobs_from_the_queue_are_answered_by_both_machines(tmp_path: Path) -> None:
    # The stand-in listens in the head's network, because its thread starts there.
    with joined_machines(tmp_path, COPIES) as machines, StandinServer() as server:
        variables = {**worker_environment(server.port), "PORT_HEALTH": "8000"}
        head, follower = machines.start_all(**variables)
        message = turn(CHAT, "What is this?", ("image", image_url("red")))
        jobs = [server.call(server.platform.submit, {"input": {"messages": [message]}}) for _ in range(20)]
        server.wait_until(lambda _: all(job.status is Status.COMPLETED for job in jobs), timeout=60)
        assert all("The image is red." in json.dumps(job.output) for job in jobs)
        assert min(samples(head, "vllm:request_success_total")[engine] for engine in ("0", "1")) > 0
        assert follower.get("/health").json()["cluster"]["role"] == "follower"


@long
def test_three_machines(tmp_path: Path) -> None:
    with joined_machines(tmp_path, COPIES, 3) as machines:
        head, *followers = machines.start_all()
        check_media(head)
        check_own_routes([head, *followers])
        began = time.monotonic()
        followers[0].send(signal.SIGKILL)
        check_end(began, [], {head: 1, followers[1]: 1})
        for machine in (head, followers[1]):
            assert "Node 1 (10.21.0.2) was lost" in machine.log
