"""Chooses the loader of the weights where LOAD_FORMAT is `auto`, and starts the engine without it if it fails."""

import gc
import json
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from worker import processes
from worker.errors import ConfigurationError, Json, StartupError
from worker.memory import free_memory
from worker.model import storage
from worker.model.load_format import AUTO, PACKAGES, LoadFormat, Machine, Weights, choose
from worker.model.snapshots import weight_paths
from worker.telemetry.logs import first_cause

log = logging.getLogger(__name__)

T = TypeVar("T")

OWN_LOADING = ("bitsandbytes", "gguf", "torchao")
"""Methods of quantization that vLLM's own loader handles."""
SEVERAL_SOURCES = ("clef_omni", "cosmos3", "cosmos3_edge", "kimi_audio", "roberta", "ultravox")
"""vLLM's modules of models that name further files or repositories with weights."""
BLOCKING = (
    "safetensors_load_strategy", "model_loader_extra_config", "quantization", "cpu_offload_gb", "enable_sleep_mode",
    "speculative_config", "spec_model", "mm_encoder_only", "enable_expert_parallel",
)  # fmt: skip
"""Arguments that concern how weights are loaded, or whose effect on other loaders is not known."""
SINGLE = ("pipeline_parallel_size", "data_parallel_size", "nnodes")
"""Arguments that must be 1: loaders share their work among all processes, which hangs if one has other files."""
END_SECONDS = 30.0
"""The time for the processes of a start that failed to end. Much pinned memory takes long to free."""
NO_ROOM = re.compile("memory for the cache|KV cache memory|GPU memory utilization", re.IGNORECASE)
"""Failures that follow from the memory for the KV cache, not from the loader."""


def choose_loader(args: Namespace, gpus: list[Json]) -> LoadFormat:
    """Choose the loader for the placed model, and set `args.load_format` to it. `gpus` have their `free` memory."""
    if args.load_format.lower() != AUTO:
        return LoadFormat(args.load_format, "set by LOAD_FORMAT")
    if not current_platform.is_cuda():
        return LoadFormat(AUTO, "there is no NVIDIA GPU")
    chosen = choose_for_gpus(args, gpus)
    args.load_format = chosen.name
    return chosen


def choose_for_gpus(args: Namespace, gpus: list[Json]) -> LoadFormat:
    """Return the loader for NVIDIA GPUs."""
    try:
        if (reason := _blocker(args)) is not None:
            return LoadFormat(AUTO, reason)
        weights = _weights(Path(args.model))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # A file may hold anything.
        return LoadFormat(AUTO, f"the weights cannot be examined: {type(error).__name__}")
    count = args.tensor_parallel_size
    free = min((gpu["free"] for gpu in gpus[:count]), default=0)
    return choose(weights, Machine(_installed(), count, free, free_memory()))


def start_engine(chosen: LoadFormat, args: Namespace, load: Callable[[], T], cause_file: Path) -> tuple[T, LoadFormat]:
    """Return what `load` returns, and the loader that was used.

    If the worker chose a loader and the engine does not start with it, `load` is called once more with vLLM's own.
    `cause_file` has the first exception that an engine process has logged, if there is one.

    Raises:
        StartupError: the engine did not start.
    """
    try:
        return load(), chosen
    except StartupError as error:
        cause = first_cause(cause_file)
        if not chosen.may_fall_back or _is_permanent(error, cause):
            raise
        kind = (cause or type(error).__name__).partition(":")[0]
    log.warning("The engine did not start with %s (%s). It starts again with vLLM's own loader", chosen.name, kind)
    # Frees the GPUs' memory, the ports and the shared memory.
    processes.end_all(END_SECONDS)
    gc.collect()
    cause_file.unlink(missing_ok=True)
    args.load_format = AUTO
    return load(), LoadFormat(AUTO, f"{chosen.name} failed")


def _is_permanent(error: StartupError, cause: str | None) -> bool:
    """Return whether the engine would not start with another loader either."""
    if not isinstance(error, ConfigurationError):
        return False
    # Without a cause, no engine process had been started: vLLM refuses the settings.
    return cause is None or NO_ROOM.search(cause) is not None


def _blocker(args: Namespace) -> str | None:
    """Return why only vLLM's own loader is possible, or None."""
    for name in BLOCKING:
        if getattr(args, name, None):
            return f"{name.upper()} is set"
    for name in SINGLE:
        if getattr(args, name, 1) > 1:
            return f"{name.upper()} is more than 1"
    folder = Path(args.model)
    files = weight_paths(folder)
    if not files or any(file.suffix != ".safetensors" or file.name.startswith("consolidated") for file in files):
        return "the files are not plain .safetensors files"
    return _blocker_of_model(folder)


def _blocker_of_model(folder: Path) -> str | None:
    try:
        config: Json = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return "there is no config.json"
    method = (config.get("quantization_config") or {}).get("quant_method", "")
    if method in OWN_LOADING:
        return f"the model is quantized with {method}"
    for architecture in config.get("architectures") or ():
        # Of models that plugins add, vLLM has a loaded class, without the name of a module.
        module = getattr(ModelRegistry.models.get(architecture), "module_name", "")
        if not module or module.rpartition(".")[2] in SEVERAL_SOURCES:
            return f"{architecture} may have weights in other files too"
    return None


def _weights(folder: Path) -> Weights:
    """Return the facts about the weights.

    Raises:
        OSError, ValueError, LookupError: a file cannot be read, or is damaged.
    """
    files = weight_paths(folder)
    indexes = [json.loads(path.read_text()) for path in folder.glob("*.safetensors.index.json")]
    indexed = {folder / name for index in indexes for name in index["weight_map"].values()}
    used = [file for file in files if file in indexed] if indexed else files
    sizes = [file.stat().st_size for file in used]
    return Weights(
        total=sum(sizes),
        largest=max(sizes),
        cached=storage.cached_share(used),
        is_network=storage.is_network(used[0]),
        has_other_files=set(folder.rglob("*.safetensors")) != set(used),
    )


def _installed() -> frozenset[str]:
    """Return the loaders whose packages are installed."""
    names = set()
    for loader, package in PACKAGES.items():
        with suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            names.add(loader)
    return frozenset(names)
