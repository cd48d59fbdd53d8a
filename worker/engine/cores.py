"""Which CPU cores each of vLLM's processes computes on, where there are several processes and no GPU. Pure."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from worker.errors import ConfigurationError

VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
AUTO = "auto"
"""vLLM then gives each process the cores of one NUMA node, and stops if there are fewer nodes than processes."""
UNBOUND = "nobind"


class Cpu(Protocol):
    """A logical CPU, as vLLM describes it."""

    id: int
    physical_core: int
    numa_node: int


def binding(chosen: str | None, cpus: Iterable[Cpu], numa_nodes: int, processes: int) -> str | None:
    """Return a value for `VLLM_CPU_OMP_THREADS_BIND`, such as `0,1|2,3` for two processes; None if it may stay.

    `chosen` is the user's value. `cpus` are those that the container may use.

    Raises:
        ConfigurationError: the user's value is for another number of processes, or there are fewer cores than
            processes.
    """
    if chosen not in (None, AUTO, UNBOUND):
        if (count := chosen.count("|") + 1) != processes:
            raise ConfigurationError(
                f"{VARIABLE}={chosen!r} has cores for {count} processes, but {processes} compute on this machine. "
                "Separate their cores by '|', such as '0,1|2,3' for two."
            )
        return None
    if chosen == UNBOUND or processes <= numa_nodes or processes == 1:
        return None
    cores = _one_of_each_core(cpus, processes)
    if len(cores) < processes:
        raise ConfigurationError(
            f"{processes} processes compute on this machine, but it has only {len(cores)} CPU cores for them. Use a "
            "smaller TENSOR_PARALLEL_SIZE or DATA_PARALLEL_SIZE, or more cores. To let processes share cores, list "
            f"the cores of each: {VARIABLE}='{'|'.join(['0'] * processes)}'."
        )
    return "|".join(",".join(map(str, sorted(part))) for part in _divided(cores, processes))


def _one_of_each_core(cpus: Iterable[Cpu], least: int) -> list[int]:
    """Return one logical CPU of each physical core, because two would compete; all of them if those are too few."""
    ordered = sorted(cpus, key=lambda cpu: (cpu.numa_node, cpu.physical_core, cpu.id))
    cores = list({(cpu.numa_node, cpu.physical_core): cpu.id for cpu in ordered}.values())
    return cores if len(cores) >= least else [cpu.id for cpu in ordered]


def _divided(cores: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Return the cores in so many neighbouring parts, whose sizes differ by at most one."""
    ends = [len(cores) * part // parts for part in range(parts + 1)]
    return [cores[begin:end] for begin, end in pairwise(ends)]
