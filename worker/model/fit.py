"""Estimates from a model's files and configuration, before it is loaded, whether it fits into GPU memory."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import ConfigurationError
from worker.model.snapshots import weight_paths

OVERHEAD_BYTES = 1 << 30
"""The least that the CUDA context, activations and CUDA graphs need on each GPU."""
DTYPE_BYTES = {"float32": 4, "float": 4}
"""Bytes of a number. Other types have 2."""
CACHE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes of a number in the KV cache. Other types have the model's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The engine arguments that decide how much memory the model needs."""

    tensor: int
    """Tensor parallel size: the number of GPUs that share each layer."""
    pipeline: int
    """Pipeline parallel size: the number of groups of GPUs that share the layers."""
    utilization: float
    """The share of a GPU's memory that vLLM may use."""
    max_model_len: int | None
    """In tokens. None: the model's maximum; 0: as many as fit."""
    dtype: str
    cache_dtype: str
    nodes: int = 1
    """The number of machines that share the weights."""

    @property
    def gpus(self) -> int:
        """The number of GPUs that share the weights."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Estimate:
    """Needed and available memory on each GPU, in bytes."""

    weights: float
    cache: float
    """The KV cache of one sequence of `length` tokens."""
    available: float
    length: int

    @property
    def room(self) -> float:
        """What the weights leave for the KV cache."""
        return self.available - self.weights - OVERHEAD_BYTES

    @property
    def fits(self) -> bool:
        """Whether the KV cache of one sequence has room beside the weights."""
        return self.cache <= self.room


def check(folder: Path, plan: Plan, gpus: Iterable[Mapping[str, int]]) -> Estimate | None:
    """Check that the model in `folder` fits each machine's GPUs, with their `memory` and `free` memory in bytes.

    Return None if the memory cannot be estimated.

    Raises:
        ConfigurationError: the model does not fit. The message has the numbers and a remedy.
    """
    estimate = estimated(folder, plan, gpus)
    if estimate is None or estimate.fits:
        return estimate
    room = estimate.room
    more = "more GPUs (TENSOR_PARALLEL_SIZE)" if plan.nodes == 1 else "more nodes"
    if room > 0:
        length = int(estimate.length * room / estimate.cache) // 256 * 256
        remedy = f"MAX_MODEL_LEN={length}" if length >= 256 else "a much smaller MAX_MODEL_LEN"
        remedy += f", {more}, or a larger GPU_MEMORY_UTILIZATION"
    else:
        remedy = f"a quantized variant (AWQ, FP8), {more}, or larger GPUs"
    where = "" if plan.nodes == 1 else f" on {plan.nodes} nodes"
    raise ConfigurationError(
        f"The model does not fit into GPU memory, by estimate: each of {plan.gpus} GPUs{where} needs "
        f"{estimate.weights / 1e9:.1f} GB for weights, {estimate.cache / 1e9:.1f} GB for the cache of one sequence of "
        f"{estimate.length} tokens and {OVERHEAD_BYTES / 1e9:.1f} GB for overhead, and has "
        f"{estimate.available / 1e9:.1f} GB. Use {remedy}. SKIP_FIT_CHECK=true skips this check."
    )


def estimated(folder: Path, plan: Plan, gpus: Iterable[Mapping[str, int]]) -> Estimate | None:
    """Return the memory that the model in `folder` needs; None if it cannot be estimated. See `check`."""
    per_node = -(-plan.gpus // plan.nodes)
    used = list(gpus)[:per_node]
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = sum(file.stat().st_size for file in weight_paths(folder))
        if _is_halved(config, plan):
            weights //= 2
        length = _text(config)["max_position_embeddings"] if plan.max_model_len is None else plan.max_model_len
        per_token = _cache_per_token(_text(config), plan)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if len(used) < per_node or not weights:
        return None
    available = min(min(gpu["memory"] * plan.utilization, gpu["free"]) for gpu in used)
    return Estimate(weights / plan.gpus, length * per_token, available, length)


def _is_halved(config: dict[str, Any], plan: Plan) -> bool:
    """Return whether vLLM converts the weights from 32 to 16 bits."""
    stored_dtype = config.get("dtype") or config.get("torch_dtype") or _text(config).get("torch_dtype")
    return stored_dtype == "float32" and plan.dtype not in DTYPE_BYTES


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the language model, which a multimodal model nests in its own."""
    return next((part for part in language_parts(config) if "num_hidden_layers" in part), config)


def language_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the language models' configurations that are nested in a model's configuration."""
    parts = (config.get(name) for name in ("text_config", "llm_config", "language_config"))
    return [part for part in parts if isinstance(part, dict)]


def _cache_per_token(text: dict[str, Any], plan: Plan) -> float:
    """Return the bytes that one token needs in the KV cache of each GPU."""
    size = CACHE_BYTES.get(plan.cache_dtype) or DTYPE_BYTES.get(plan.dtype, 2)
    layers = text["num_hidden_layers"]
    if rank := text.get("kv_lora_rank"):
        # Each GPU of a tensor parallel group keeps the whole latent cache.
        return float(layers / plan.pipeline * (rank + text.get("qk_rope_head_dim", 0)) * size)
    heads = text["num_attention_heads"]
    head_size = text.get("head_dim") or text["hidden_size"] // heads
    # Layers with a sliding window, or with a state instead of a cache, need little memory.
    types = text.get("layer_types")
    full_layers = sum("full" in each for each in types) if types else layers
    key_heads = text.get("num_key_value_heads") or heads
    # With more GPUs than key heads, each GPU has a copy of one head.
    return float(2 * full_layers / plan.pipeline * max(key_heads / plan.tensor, 1) * head_size * size)
