"""Which CPU cores each process gets. The values are read by vLLM's own parser."""

from dataclasses import dataclass

import pytest
from vllm.utils.cpu_resource_utils import parse_id_list

from worker.engine.cores import binding
from worker.errors import ConfigurationError


@dataclass
class Cpu:
    id: int
    physical_core: int
    numa_node: int = 0


FOUR = [Cpu(each, each) for each in range(4)]
THREADS = [Cpu(each, each % 4) for each in range(8)]
"""Four cores with two threads each."""


@pytest.mark.parametrize(
    ("cpus", "processes", "expected"),
    [
        pytest.param(FOUR, 2, "0,1|2,3", id="two cores each"),
        pytest.param(FOUR, 4, "0|1|2|3", id="one core each"),
        pytest.param(FOUR[:3], 2, "0|1,2", id="a core left over"),
        pytest.param(THREADS, 2, "4,5|6,7", id="one thread of each core"),
        pytest.param(THREADS, 8, "0|4|1|5|2|6|3|7", id="both threads, because there are more processes than cores"),
        pytest.param([Cpu(0, 0, 0), Cpu(1, 1, 1), Cpu(2, 2, 0), Cpu(3, 3, 1)], 4, "0|2|1|3", id="node by node"),
        pytest.param([Cpu(5, 5), Cpu(9, 9)], 2, "5|9", id="the cores that the container may use"),
    ],
)
def test_cores_are_divided(cpus: list[Cpu], processes: int, expected: str) -> None:
    value = binding(None, cpus, 1, processes)
    assert value == binding("auto", cpus, 1, processes) == expected
    lists = [parse_id_list(part) for part in value.split("|")]
    assert len(lists) == processes
    assert all(lists)
    assert len({core for part in lists for core in part}) == sum(map(len, lists))


@pytest.mark.parametrize(
    ("chosen", "numa_nodes", "processes"),
    [
        pytest.param(None, 1, 1, id="one process"),
        pytest.param(None, 2, 2, id="a NUMA node for each process: vLLM divides them"),
        pytest.param("nobind", 1, 2, id="the user wants no binding"),
        pytest.param("0|1", 1, 2, id="the user has divided the cores"),
        pytest.param("0-3", 1, 1, id="the user has chosen the cores of one process"),
    ],
)
def test_the_value_may_stay(chosen: str | None, numa_nodes: int, processes: int) -> None:
    assert binding(chosen, FOUR, numa_nodes, processes) is None


def test_cores_for_another_number_of_processes_are_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"='0-3' has cores for 1 processes, but 2 compute on this machine"):
        binding("0-3", FOUR, 1, 2)


def test_too_few_cores_are_a_mistake_that_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match=r"it has only 1 CPU cores .* VLLM_CPU_OMP_THREADS_BIND='0\|0'"):
        binding(None, FOUR[:1], 1, 2)
