"""Chooses how the model is divided among GPUs: on one machine the tensor parallel size, on several all sizes."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import vllm
from vllm.platforms import current_platform

from worker.cluster import sizes
from worker.cluster.role import Role
from worker.cluster.sizes import DATA, PIPELINE, TENSOR, Chosen, Fits, Model, Shape, Sizes
from worker.errors import ConfigurationError
from worker.model.divisibility import has_experts, largest_size
from worker.settings import Settings

SHORT_FLAGS = {TENSOR: "tp", PIPELINE: "pp", DATA: "dp", "ENABLE_EXPERT_PARALLEL": "ep"}
OLDEST_FOR_CLUSTERS = (0, 32)
EAGER_PIPELINE_ON_CPU = (
    f"{PIPELINE}: with ENFORCE_EAGER=true, vLLM 0.32 fails at the first request on CPUs. Set ENFORCE_EAGER=false, or "
    f"use {TENSOR} or {DATA} instead."
)
EXPERTS_ON_CPUS = (
    f"{DATA}: vLLM 0.32 cannot run several copies of a model with experts on CPUs. Set {TENSOR}, which divides "
    "one copy."
)
NO_ADDRESSES: Mapping[int, str] = MappingProxyType({})


def visible_gpus() -> int | None:
    """Return the number of GPUs that vLLM sees; None without a GPU."""
    has_gpus = not (current_platform.is_cpu() or current_platform.is_unspecified())
    return current_platform.device_count() if has_gpus else None


def check(args: argparse.Namespace, settings: Settings, gpus: int | None) -> None:
    """Check what needs no model: the sizes that the user has chosen. `gpus` is as in `divide`.

    Raises:
        ConfigurationError: they do not match the machines.
    """
    if gpus is None and args.pipeline_parallel_size > 1 and args.enforce_eager:
        raise ConfigurationError(EAGER_PIPELINE_ON_CPU)
    if settings.role is None:
        return
    if vllm.__version_tuple__[:2] < OLDEST_FOR_CLUSTERS:
        raise ConfigurationError(f"vLLM {vllm.__version__} is too old for a cluster. Use an image with vLLM 0.32.")
    if args.prefill_context_parallel_size > 1:
        raise ConfigurationError("PREFILL_CONTEXT_PARALLEL_SIZE: the worker does not support it on several machines.")
    sizes.check(_shape(settings.role, gpus), _chosen(args, settings))


def divide(
    args: argparse.Namespace,
    settings: Settings,
    gpus: int | None,
    fits: Fits = lambda _tensor, _pipeline: None,
    addresses: Mapping[int, str] = NO_ADDRESSES,
) -> Sizes | None:
    """Set in `args` the sizes that the user has not chosen, and where the nodes of a cluster find each other.

    The model is in the folder `args.model`. Return how it is divided among the nodes; None on a single machine.

    `gpus` is the number of GPUs of this machine; None: it computes on its CPUs. `addresses` are those of the cluster's
    nodes that are known.

    Raises:
        ConfigurationError: the sizes do not match the machines.
    """
    division = None
    if settings.role is not None:
        division = _divide_among_nodes(args, settings, settings.role, gpus, fits, addresses)
    elif _is_left_to_worker(settings, gpus or 1):
        per_copy = (gpus or 1) // (args.pipeline_parallel_size * args.data_parallel_size)
        args.tensor_parallel_size = largest_size(Path(args.model), per_copy)
    if gpus is None and args.data_parallel_size > 1 and has_experts(Path(args.model)):
        raise ConfigurationError(EXPERTS_ON_CPUS)
    if args.tensor_parallel_size > 1 and not _is_set(settings, "MM_ENCODER_TP_MODE"):
        args.mm_encoder_tp_mode = "data"
    return division


def _divide_among_nodes(
    args: argparse.Namespace,
    settings: Settings,
    role: Role,
    gpus: int | None,
    fits: Fits,
    addresses: Mapping[int, str],
) -> Sizes:
    shape = _shape(role, gpus)
    model = Model(partial(largest_size, Path(args.model)), fits, has_experts(Path(args.model)))
    division = sizes.choose(shape, model, _chosen(args, settings))
    args.tensor_parallel_size, args.pipeline_parallel_size = division.tensor, division.pipeline
    args.data_parallel_size, args.enable_expert_parallel = division.data, division.expert
    args.distributed_executor_backend = "mp"
    args.device_ids = division.device_ids(gpus) if gpus else None
    args.nnodes, args.node_rank, args.master_port = role.nodes, role.rank, role.port
    head = addresses.get(0, role.head)
    args.data_parallel_address = head
    # The processes of a model with experts are one group. Without experts each copy on several nodes is a group.
    first = 0 if model.is_moe or division.nodes_of_copy == 1 else division.first_node(role.rank)
    args.master_addr = addresses.get(first, head)
    return division


def _shape(role: Role, gpus: int | None) -> Shape:
    return Shape(role.nodes, None if gpus is None else role.usable_gpus(gpus), is_cpu=gpus is None)


def _chosen(args: argparse.Namespace, settings: Settings) -> Chosen:
    """Return the sizes that the user has chosen. Those of a preset are for one machine, and do not count."""
    variables = settings.variables

    def is_chosen(name: str) -> bool:
        is_left = variables.is_from_preset(name) or (name == TENSOR and is_auto(settings))
        return _is_set(settings, name, SHORT_FLAGS[name]) and not is_left

    return Chosen(
        args.tensor_parallel_size if is_chosen(TENSOR) else None,
        args.pipeline_parallel_size if is_chosen(PIPELINE) else None,
        args.data_parallel_size if is_chosen(DATA) else None,
        args.enable_expert_parallel if is_chosen("ENABLE_EXPERT_PARALLEL") else None,
    )


def is_auto(settings: Settings) -> bool:
    """Tell whether the size is set to `auto`, which vLLM does not know."""
    return settings.variables.values.get(TENSOR, "").strip().lower() == "auto"


def extra_flags(settings: Settings) -> set[str]:
    """Return the names of the flags in VLLM_EXTRA_ARGS, with underscores."""
    words = settings.vllm_extra_args.split()
    return {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("-")}


def _is_left_to_worker(settings: Settings, gpus: int) -> bool:
    if not _is_set(settings, TENSOR, "tp") or is_auto(settings):
        return True
    size = settings.variables.values.get(TENSOR, "").strip()
    # A preset may ask for more GPUs than this machine has.
    return settings.variables.is_from_preset(TENSOR) and size.isdigit() and int(size) > gpus


def _is_set(settings: Settings, variable: str, *short_flags: str) -> bool:
    flags = {variable.lower(), *short_flags}
    return variable in settings.variables.values or not flags.isdisjoint(extra_flags(settings))
