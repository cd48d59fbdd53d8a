"""Chooses among how many GPUs each layer is divided: vLLM's `--tensor-parallel-size`."""

import argparse
import json
import logging
from pathlib import Path

from vllm.platforms import current_platform

from worker.errors import Json
from worker.model.fit import language_parts
from worker.settings import Settings

log = logging.getLogger(__name__)

VARIABLE = "TENSOR_PARALLEL_SIZE"


def visible_gpus() -> int:
    """Return the number of GPUs that vLLM sees; 1 without a GPU."""
    has_gpus = not (current_platform.is_cpu() or current_platform.is_unspecified())
    return current_platform.device_count() if has_gpus else 1


def set_tensor_parallelism(args: argparse.Namespace, settings: Settings, gpus: int) -> None:
    """Use as many of `gpus` as the model in the folder `args.model` can be divided among, unless the user chose."""
    if _is_left_to_worker(settings, gpus):
        args.tensor_parallel_size = _largest_size(args, gpus)
    if args.tensor_parallel_size > 1 and not _is_set(settings, "MM_ENCODER_TP_MODE"):
        args.mm_encoder_tp_mode = "data"


def is_auto(settings: Settings) -> bool:
    """Tell whether the size is set to `auto`, which vLLM does not know."""
    return settings.variables.values.get(VARIABLE, "").strip().lower() == "auto"


def extra_flags(settings: Settings) -> set[str]:
    """Return the names of the flags in VLLM_EXTRA_ARGS, with underscores."""
    words = settings.vllm_extra_args.split()
    return {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("-")}


def _is_left_to_worker(settings: Settings, gpus: int) -> bool:
    if not _is_set(settings, VARIABLE, "tp") or is_auto(settings):
        return True
    size = settings.variables.values.get(VARIABLE, "").strip()
    is_preset = settings.variables.origins.get(VARIABLE, "").startswith("preset")
    # A preset may ask for more GPUs than this machine has.
    return is_preset and size.isdigit() and int(size) > gpus


def _is_set(settings: Settings, variable: str, *short_flags: str) -> bool:
    flags = {variable.lower(), *short_flags}
    return variable in settings.variables.values or not flags.isdisjoint(extra_flags(settings))


def _largest_size(args: argparse.Namespace, gpus: int) -> int:
    gpus //= args.pipeline_parallel_size * args.data_parallel_size
    sizes = _read_sizes(Path(args.model))
    if gpus > 1 and sizes is None:
        log.warning("One of %d GPUs is used: the model's number of heads is unknown. %s can use more", gpus, VARIABLE)
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
    for name in ("config.json", "params.json"):
        try:
            config: Json = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        for part in (config, *language_parts(config)):
            if isinstance(heads := part.get("num_attention_heads", part.get("n_heads")), int):
                key_heads = part.get("num_key_value_heads") or part.get("n_kv_heads") or heads
                widths = (part.get(key) for key in ("intermediate_size", "moe_intermediate_size", "hidden_dim"))
                block = _block_width(config)
                return key_heads, [heads, *(width // block or width for width in widths if isinstance(width, int))]
    return None


def _block_width(config: Json) -> int:
    """Return the width of the blocks that share a quantization scale, and cannot be divided; 1 without blocks."""
    scheme = config.get("quantization_config") or {}
    size = (scheme.get("weight_block_size") or [scheme.get("group_size")])[0]
    return size if isinstance(size, int) and size > 0 else 1
