"""The role of a machine, from the variables of RunPod and of vLLM."""

import pytest

from worker.cluster.role import Role, uses_ray
from worker.errors import ConfigurationError

RUNPOD = {
    "NUM_NODES": "2",
    "NODE_RANK": "0",
    "NODE_ADDR": "10.0.0.1",
    "PRIMARY_ADDR": "10.0.0.1",
    "PRIMARY_PORT": "29400",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "HOST_NODE_ADDR": "10.0.0.1:29400",
    "NUM_TRAINERS": "8",
    "WORLD_SIZE": "16",
}
VLLM = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head"}


@pytest.mark.parametrize(
    ("values", "role"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param({**RUNPOD, "NUM_NODES": "1"}, None, id="a cluster of one machine"),
        pytest.param({"NODE_RANK": "x", "MASTER_ADDR": "a b"}, None, id="one machine with variables of a cluster"),
        pytest.param(RUNPOD, Role(0, 2, "10.0.0.1", "10.0.0.1", 8, 29400), id="RunPod's head"),
        pytest.param(
            {**RUNPOD, "NODE_RANK": "1", "NODE_ADDR": "10.0.0.2"},
            Role(1, 2, "10.0.0.1", "10.0.0.2", 8, 29400),
            id="RunPod's follower",
        ),
        pytest.param(VLLM, Role(1, 2, "head", None, None, 29501), id="vLLM's names"),
        pytest.param(
            {**VLLM, "MASTER_PORT": "1", "VLLM_HOST_IP": "::2"}, Role(1, 2, "head", "::2", None, 1), id="all of vLLM's"
        ),
        pytest.param({**RUNPOD, "NNODES": " 2 "}, Role(0, 2, "10.0.0.1", "10.0.0.1", 8, 29400), id="both names agree"),
        pytest.param(
            {**RUNPOD, "MASTER_ADDR": "node-0"},
            Role(0, 2, "node-0", "10.0.0.1", 8, 29400),
            id="a host name beside an address",
        ),
        pytest.param(
            {"NUM_NODES": "3", "NODE_RANK": "2", "HOST_NODE_ADDR": "[fd00::1]:7"},
            Role(2, 3, "fd00::1", None, None, 7),
            id="the head's address with its port",
        ),
    ],
)
def test_the_role_follows_from_the_variables(values: dict[str, str], role: Role | None) -> None:
    assert Role.of(values) == role


def test_the_first_node_is_the_head() -> None:
    head, follower = Role.of(RUNPOD), Role.of(VLLM)
    assert head is not None
    assert follower is not None
    assert (head.is_head, head.is_follower, str(head)) == (True, False, "node 0 of 2")
    assert (follower.is_head, follower.is_follower) == (False, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param({"NODE_RANK": ""}, "NODE_RANK is not set. It is this node's number, from 0 to 1.", id="no rank"),
        pytest.param(
            {"MASTER_ADDR": ""},
            "MASTER_ADDR or PRIMARY_ADDR is not set. It is the address of node 0, such as 10.0.0.1.",
            id="no address of the head",
        ),
        pytest.param({"NODE_RANK": "2"}, "NODE_RANK='2': expected a whole number from 0 to 1.", id="too high a rank"),
        pytest.param({"NODE_RANK": "-1"}, "NODE_RANK='-1': expected a whole number from 0 to 1.", id="a negative rank"),
        pytest.param({"NODE_RANK": "x"}, "NODE_RANK='x': expected a whole number from 0 to 1.", id="a rank in letters"),
        pytest.param({"NODE_RANK": "\u0661"}, "expected a whole number from 0 to 1.", id="digits of another script"),
        pytest.param({"NNODES": "two"}, "NNODES='two': expected a whole number of at least 1.", id="nodes in letters"),
        pytest.param({"NNODES": "0"}, "NNODES='0': expected a whole number of at least 1.", id="no nodes"),
        pytest.param(
            {"NUM_NODES": "3"},
            "NNODES='2' and NUM_NODES='3' disagree. Set one of them, or both to the same value.",
            id="numbers of nodes that disagree",
        ),
        pytest.param(
            {"MASTER_ADDR": "10.0.0.1", "PRIMARY_ADDR": "10.0.0.2"},
            "MASTER_ADDR='10.0.0.1' and PRIMARY_ADDR='10.0.0.2' disagree.",
            id="addresses of the head that disagree",
        ),
        pytest.param(
            {"VLLM_HOST_IP": "10.0.0.1", "NODE_ADDR": "10.0.0.2"},
            "VLLM_HOST_IP='10.0.0.1' and NODE_ADDR='10.0.0.2' disagree.",
            id="own addresses that disagree",
        ),
        pytest.param(
            {"MASTER_PORT": "1", "PRIMARY_PORT": "2"}, "MASTER_PORT='1' and PRIMARY_PORT='2' disagree.", id="ports"
        ),
        pytest.param(
            {"MASTER_ADDR": "10.0.0.1:29400"},
            "MASTER_ADDR='10.0.0.1:29400': expected an IP address or a host name, without a port.",
            id="an address with a port",
        ),
        pytest.param(
            {"NODE_ADDR": "10.0.0.0/24"}, "expected an IP address or a host name, without a port.", id="a network"
        ),
        pytest.param(
            {"MASTER_PORT": "65536"}, "MASTER_PORT='65536': expected a whole number from 1 to 65535.", id="a port"
        ),
        pytest.param(
            {"MASTER_ADDR": "localhost", "NODE_ADDR": "10.0.0.2"},
            "'localhost' leads every node to itself. MASTER_ADDR or PRIMARY_ADDR is the address of node 0.",
            id="the head's address is this machine's own",
        ),
        pytest.param({"NUM_TRAINERS": "0"}, "NUM_TRAINERS='0': expected a whole number of at least 1.", id="no GPUs"),
    ],
)
def test_a_mistake_says_what_to_do(more: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Role.of({**VLLM, **more})
    (line,) = str(caught.value).splitlines()
    assert message in line


def test_all_mistakes_are_reported_at_once_with_their_sources() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Role.of({"NUM_NODES": "2", "NODE_RANK": "5", "NUM_TRAINERS": "x"}, lambda name: f"{name} (config.yaml)")
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "NODE_RANK (config.yaml)",
        "MASTER_ADDR or PRIMARY_ADDR is not set. It is the address of node 0, such as 10.0.0.1.",
        "NUM_TRAINERS (config.yaml)",
    ]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"DISTRIBUTED_EXECUTOR_BACKEND": "Ray"}, id="a variable"),
        pytest.param({"DATA_PARALLEL_BACKEND": "ray"}, id="copies of the model"),
        pytest.param({"VLLM_EXTRA_ARGS": "--seed 1 --distributed-executor-backend=ray"}, id="extra arguments"),
    ],
)
def test_with_ray_only_the_first_node_runs_the_worker(values: dict[str, str]) -> None:
    assert uses_ray(values)
    assert Role.of({**RUNPOD, **values}) is None
    assert Role.of({**values, "NODE_RANK": "1"}) is None
    with pytest.raises(ConfigurationError, match="only the node with NODE_RANK=0 runs the worker"):
        Role.of({**RUNPOD, **values, "NODE_RANK": "1"})


def test_other_backends_are_no_ray() -> None:
    assert not uses_ray({"DISTRIBUTED_EXECUTOR_BACKEND": "mp", "VLLM_EXTRA_ARGS": "--served-model-name ray"})


def test_each_node_uses_the_number_of_gpus_that_all_have() -> None:
    role = Role(0, 2, "10.0.0.1", None, 4, 29501)
    assert role.usable_gpus(8) == role.usable_gpus(4) == 4
    assert Role(0, 2, "10.0.0.1", None, None, 29501).usable_gpus(8) == 8
    with pytest.raises(ConfigurationError, match=r"NUM_TRAINERS=4: only 2 GPUs are visible on this node"):
        role.usable_gpus(2)
