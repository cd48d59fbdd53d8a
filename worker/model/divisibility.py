"""Reads from a model's configuration how it can be divided: its attention heads, widths and experts."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from worker.cluster.sizes import TENSOR
from worker.errors import Json
from worker.model.fit import language_parts

log = logging.getLogger(__name__)

EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""The fields of a configuration that have a model's number of experts. vLLM reads the same, and `block_configs`."""


def largest_size(folder: Path, gpus: int) -> int:
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


def has_experts(folder: Path) -> bool:
    """Return whether the model in the folder has experts."""
    parts = (part for config in _configurations(folder) for part in (config, *language_parts(config)))
    return any(map(_has_experts, parts))


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
