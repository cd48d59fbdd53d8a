"""Chooses how the model is divided among GPUs: on one machine the tensor parallel size, on several all sizes."""

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType

import vllm
from vllm.platforms import current_platform

from worker.cluster import sizes
from worker.cluster.role import Role
from worker.cluster.sizes import DATA, PIPELINE, TENSOR, Chosen, Fits, Model, Shape, Sizes
from worker.errors import ConfigurationError, Json
from worker.model.fit import language_parts
from worker.settings import Settings

log = logging.getLogger(__name__)

SHORT_FLAGS = {TENSOR: "tp", PIPELINE: "pp", DATA: "dp", "ENABLE_EXPERT_PARALLEL": "ep"}
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""The fields of a configuration that have a model's number of experts. vLLM reads the same, and `block_configs`."""
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
        args.tensor_parallel_size = _largest_size(Path(args.model), per_copy)
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
    model = Model(partial(_largest_size, Path(args.model)), fits, has_experts(Path(args.model)))
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
    origins = settings.variables.origins

    def is_chosen(name: str) -> bool:
        is_left = origins.get(name, "").startswith("preset") or (name == TENSOR and is_auto(settings))
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
    is_preset = settings.variables.origins.get(TENSOR, "").startswith("preset")
    # A preset may ask for more GPUs than this machine has.
    return is_preset and size.isdigit() and int(size) > gpus


def _is_set(settings: Settings, variable: str, *short_flags: str) -> bool:
    flags = {variable.lower(), *short_flags}
    return variable in settings.variables.values or not flags.isdisjoint(extra_flags(settings))


def _largest_size(folder: Path, gpus: int) -> int:
    """Return the largest number of `gpus` that the model in the folder can be divided among."""
    sizes = _read_sizes(folder)
    if gpus > 1 and sizes is None:
        log.warning("One of %d GPUs is used: the model's number of heads is unknown. %s can use more", gpus, TENSOR)
    key_heads, divided = sizes or (1, [1])
    possible = (
        count
        for count in range(1, gpus + 1)
        if (key_heads % count == 0 or count % key_heads == 0) and not any(size % count for size in divided)
    )
    return max(possible, default=1)


def _read_sizes(folder: Path) -> tuple[int, list[int]] | None:
    """Return a model's number of key heads, and the other sizes that the number of GPUs must divide.

    These are the number of attention heads and the widths of feed-forward layers, in blocks that share a quantization
    scale. None if the configuration does not state the number of heads.
    """
    for config in _configurations(folder):
        for part in (config, *language_parts(config)):
            if isinstance(heads := part.get("num_attention_heads", part.get("n_heads")), int):
                key_heads = part.get("num_key_value_heads") or part.get("n_kv_heads") or heads
                widths = (part.get(key) for key in ("intermediate_size", "moe_intermediate_size", "hidden_dim"))
                block = _block_width(config)
                return key_heads, [heads, *(width // block or width for width in widths if isinstance(width, int))]
    return None


def has_experts(folder: Path) -> bool:
    """Return whether the model in the folder has experts."""
    parts = (part for config in _configurations(folder) for part in (config, *language_parts(config)))
    return any(map(_has_experts, parts))


def _has_experts(config: Json) -> bool:
    blocks = [block for block in config.get("block_configs") or () if isinstance(block, dict)]
    counts = [config.get(name) for name in EXPERTS]
    counts += [block.get("n_routed_experts") for block in blocks if block.get("block_type") == "moe"]
    firsts = [count[0] if isinstance(count, list) and count else count for count in counts]
    return any(isinstance(count, int) and count > 0 for count in firsts)


def _configurations(folder: Path) -> Iterator[Json]:
    for name in ("config.json", "params.json"):
        with suppress(OSError, ValueError):
            if isinstance(config := json.loads((folder / name).read_text()), dict):
                yield config


def _block_width(config: Json) -> int:
    """Return the width of the blocks that share a quantization scale, and cannot be divided; 1 without blocks."""
    scheme = config.get("quantization_config") or {}
    size = (scheme.get("weight_block_size") or [scheme.get("group_size")])[0]
    return size if isinstance(size, int) and size > 0 else 1
