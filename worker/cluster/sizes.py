"""How a model is divided among the nodes of a cluster and their GPUs. Pure.

vLLM numbers the processes node by node. Within a copy of the model, those that share a layer follow each other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from worker.errors import ConfigurationError

TENSOR, PIPELINE, DATA = "TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "DATA_PARALLEL_SIZE"

Fits = Callable[[int, int], bool | None]
"""Returns whether a copy of the model fits for a tensor and a pipeline parallel size. None: unknown."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The nodes, and the GPUs of each."""

    nodes: int
    gpus: int | None
    """GPUs of each node. None: unknown, or the nodes compute on their CPUs."""
    is_cpu: bool = False

    def __str__(self) -> str:
        """Return the machines in words."""
        if self.is_cpu:
            return f"{self.nodes} nodes without GPUs"
        plural = "" if self.gpus == 1 else "s"
        return f"{self.nodes} nodes" if self.gpus is None else f"{self.nodes} nodes with {self.gpus} GPU{plural}"


@dataclass(frozen=True, slots=True)
class Model:
    """The properties of a model that limit how it can be divided."""

    largest: Callable[[int], int]
    """Returns among how many of so many GPUs each layer can be divided."""
    fits: Fits
    is_moe: bool
    """Whether it has experts."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The sizes that the user has chosen. None: the worker chooses."""

    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    expert: bool | None = None

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Self:
        """Read the sizes from variables. Leave those of a preset out: they are for one machine."""

        def size(name: str) -> int | None:
            text = values.get(name, "").strip()
            return int(text) or None if text.isascii() and text.isdecimal() else None

        return cls(size(TENSOR), size(PIPELINE), size(DATA))


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the model is divided. The product of the three sizes is the number of processes that compute."""

    tensor: int
    pipeline: int
    data: int
    expert: bool
    """Whether experts are divided among all GPUs."""
    nodes: int
    why: str = ""
    """The plan and the reason for it, in words."""
    warnings: tuple[str, ...] = ()

    @property
    def copy(self) -> int:
        """The number of processes that share one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def per_node(self) -> int:
        """The number of processes, and so of GPUs in use, on each node."""
        return self.copy * self.data // self.nodes

    @property
    def nodes_of_copy(self) -> int:
        """The number of nodes that share one copy of the model."""
        return max(self.copy // self.per_node, 1)

    def device_ids(self, gpus: int) -> list[int] | None:
        """Return the numbers of the GPUs to use of the `gpus` that vLLM sees on a node; None: all.

        vLLM takes the number of GPUs that it sees for the number of its processes on a node.
        """
        return list(range(self.per_node)) if self.per_node < gpus else None

    def ranks(self, node: int) -> str:
        """Return which of the processes are on a node, in words."""
        first, last = node * self.per_node, (node + 1) * self.per_node - 1
        ranks = f"process {first}" if first == last else f"processes {first} to {last}"
        return f"{ranks} of {self.per_node * self.nodes}, counted from 0"

    def first_node(self, rank: int) -> int:
        """Return the first node of the copy that node `rank` belongs to."""
        return rank - rank % self.nodes_of_copy


def choose(shape: Shape, model: Model, chosen: Chosen) -> Sizes:
    """Return the sizes: those that the user has chosen, and for the others the ones that suit the model.

    Raises:
        ConfigurationError: the sizes do not match the nodes.
    """
    check(shape, chosen)
    # vLLM 0.32 cannot divide experts among CPUs.
    expert = model.is_moe and not shape.is_cpu if chosen.expert is None else chosen.expert
    tensor = chosen.tensor or _tensor(shape, model, chosen)
    pipeline, cause = (chosen.pipeline, "") if chosen.pipeline else _pipeline(shape, model, chosen, tensor, expert)
    data = chosen.data or _data(shape, tensor, pipeline)
    check(shape, Chosen(tensor, pipeline, data))
    sizes = Sizes(tensor, pipeline, data, expert, shape.nodes)
    why = " ".join(filter(None, (cause, plan(sizes, shape))))
    return replace(sizes, why=why, warnings=tuple(_warnings(sizes, shape)))


def check(shape: Shape, chosen: Chosen) -> None:
    """Check the sizes that the user has chosen, whatever the model is.

    Raises:
        ConfigurationError: they cannot work on these machines. The message has a line for each mistake.
    """
    if problems := list(mistakes(shape, chosen)):
        raise ConfigurationError("\n".join(problems))


def mistakes(shape: Shape, chosen: Chosen) -> Iterator[str]:
    """Yield a sentence for each chosen size that cannot work on these machines, whatever the model is."""
    tensor, pipeline, data = chosen.tensor or 1, chosen.pipeline or 1, chosen.data or 1
    copy, named = tensor * pipeline, _named(chosen)
    limit = None if shape.is_cpu else shape.gpus
    if limit and copy * data > (available := shape.nodes * limit):
        yield f"{named} = {copy * data} needs more GPUs than the {available} of {shape}. Use smaller sizes."
    elif limit and copy > limit and not _may_span(shape.nodes, copy, limit):
        yield (
            f"{named}: a copy of the model needs {copy} GPUs, which cannot be the same number on each of {shape}. Use "
            "smaller sizes, or another number of nodes."
        )
    elif chosen.tensor and chosen.pipeline and chosen.data:
        yield from _uneven(shape, tensor, pipeline, data)


def _may_span(nodes: int, copy: int, limit: int) -> bool:
    """Return whether some nodes can have equal parts of a copy, and the other nodes can have more copies."""
    return any(copy % each == 0 and nodes % each == 0 and copy // each <= limit for each in range(2, nodes + 1))


def _uneven(shape: Shape, tensor: int, pipeline: int, data: int) -> Iterator[str]:
    """Yield why the processes cannot be divided evenly among the nodes."""
    copy = tensor * pipeline
    per_node, rest = divmod(copy * data, shape.nodes)
    named = _named(Chosen(tensor, pipeline, data))
    puts = f"{named} puts {per_node} processes on each of {shape}"
    if rest:
        yield (
            f"{named} = {copy * data} does not divide over {shape}. Use sizes whose product is a multiple of "
            f"{shape.nodes}."
        )
    elif per_node % copy and copy % per_node:
        yield f"{puts}, but a copy of the model has {copy}. A copy must be within a node, or on whole nodes."
    elif per_node % tensor and tensor % per_node:
        yield f"{puts}, but {tensor} share a layer. They must be within a node, or on whole nodes."
    elif shape.is_cpu and copy > per_node > 1:
        yield (
            f"{puts}, and {copy} share a copy of the model. On CPUs, a copy on several nodes has one process on each. "
            f"Use {TENSOR}={shape.nodes}, or {DATA}={shape.nodes} for a copy on each node."
        )


def _tensor(shape: Shape, model: Model, chosen: Chosen) -> int:
    """Return among how many GPUs of one node each layer is divided."""
    gpus = 1 if shape.is_cpu else shape.gpus or 1
    per_copy = shape.nodes * gpus // (chosen.data or 1)
    return model.largest(max(1, min(gpus, per_copy // (chosen.pipeline or 1))))


def _pipeline(shape: Shape, model: Model, chosen: Chosen, tensor: int, expert: bool) -> tuple[int, str]:
    """Return into how many groups the layers are divided, and why in a sentence, if the model decides that."""
    gpus, nodes = shape.gpus or 1, shape.nodes
    if shape.is_cpu or tensor > gpus:
        return 1, ""
    if chosen.data:
        return max(nodes // chosen.data, 1), ""
    if expert:
        return 1, "The model has experts."
    # If not even the largest number is enough, the check of the memory reports it with numbers.
    possible = list(_possible_pipelines(gpus, nodes, tensor))
    for pipeline in possible:
        if (fits := model.fits(tensor, pipeline)) is None:
            unknown = f"It is unknown whether one node holds the model; if it does, set {DATA}={nodes}."
            return possible[-1], unknown
        if fits:
            break
    return pipeline, f"One node {'does not hold' if tensor * pipeline > gpus else 'holds'} the model."


def _possible_pipelines(gpus: int, nodes: int, tensor: int) -> Iterator[int]:
    """Yield the numbers of groups with which a copy is within a node, or on whole nodes; the smallest first."""
    most = nodes * (gpus // tensor)
    for pipeline in range(1, most + 1):
        copy = tensor * pipeline
        if most % pipeline == 0 and (copy <= gpus or copy % gpus == 0 or pipeline == most):
            yield pipeline


def _data(shape: Shape, tensor: int, pipeline: int) -> int:
    """Return the number of copies: as many as there is room for."""
    room = shape.nodes * (1 if shape.is_cpu else shape.gpus or 1) // (tensor * pipeline)
    for data in range(room, 0, -1):
        if not list(mistakes(shape, Chosen(tensor, pipeline, data))):
            return data
    return max(room, 1)


def _named(chosen: Chosen) -> str:
    """Return the sizes that are not left to the worker, with their variables."""
    sizes = {TENSOR: chosen.tensor, PIPELINE: chosen.pipeline, DATA: chosen.data}
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size)


def plan(sizes: Sizes, shape: Shape) -> str:
    """Return how the model is divided, in a sentence."""
    unit = "GPUs" if shape.gpus and not shape.is_cpu else "processes"
    parts = [f"{sizes.data} {'copy' if sizes.data == 1 else 'copies'} of the model on {shape}"]
    if sizes.tensor > 1:
        parts.append(f"each layer divided among {sizes.tensor} {unit}")
    if sizes.pipeline > 1:
        parts.append(f"the layers divided into {sizes.pipeline} groups")
    if sizes.expert:
        parts.append(f"the experts divided among all {sizes.copy * sizes.data} {unit}")
    return f"{', '.join(parts)}."


def _warnings(sizes: Sizes, shape: Shape) -> Iterator[str]:
    if shape.gpus and not shape.is_cpu and (idle := shape.gpus - sizes.per_node) > 0:
        yield (
            f"{idle} of {shape.gpus} GPUs of each node are idle. {TENSOR}, {PIPELINE} or {DATA} can use more of them."
        )
    if sizes.tensor > sizes.per_node and not shape.is_cpu:
        yield (
            f"{TENSOR}={sizes.tensor} divides each layer among GPUs of several nodes, which is slow without "
            f"InfiniBand or a similar network. {PIPELINE}={shape.nodes} needs less communication."
        )
