"""Whether a model fits its GPUs: an estimate from its files and its configuration, before anything is loaded."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import ConfigurationError

OVERHEAD_BYTES = 1 << 30
"""What the CUDA context, activations and graphs take of a GPU at the least."""
DTYPE_BYTES = {"float32": 4, "float": 4}
CACHE_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


@dataclass(frozen=True, slots=True)
class Plan:
    """How the model is to run."""

    tensor: int
    """GPUs among which each layer is divided."""
    pipeline: int
    """Groups of GPUs among which the layers are divided."""
    utilization: float
    """The share of a GPU's memory that may be used."""
    max_model_len: int | None
    """None: as long as the model can; 0: as long as there is room for."""
    dtype: str
    cache_dtype: str

    @property
    def gpus(self) -> int:
        """Among which the weights are divided."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is needed, and what there is, on each GPU, in bytes; all of it but the weights' size estimated."""

    weights: float
    cache: float
    """For one sequence of full length."""
    free: float
    length: int

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.weights + self.cache + OVERHEAD_BYTES <= self.free


def check(folder: Path, plan: Plan, memory: Iterable[Mapping[str, int]]) -> Estimate | None:
    """Compare the model in `folder` with GPUs of which `memory` tells `free` and `memory`; None: nothing can be said.

    Raises:
        ConfigurationError: it cannot fit; the message has the numbers and what may help.
    """
    estimate = _estimate(folder, plan, memory)
    if estimate is None or estimate.fits:
        return estimate
    room = estimate.free - estimate.weights - OVERHEAD_BYTES
    if room > 0:
        length = int(estimate.length * room / estimate.cache) // 256 * 256
        remedy = f"MAX_MODEL_LEN={length}" if length >= 256 else "a much smaller MAX_MODEL_LEN"
        remedy += ", more GPUs (TENSOR_PARALLEL_SIZE), or a larger GPU_MEMORY_UTILIZATION"
    else:
        remedy = "a quantized variant (AWQ, FP8), more GPUs (TENSOR_PARALLEL_SIZE), or larger ones"
    raise ConfigurationError(
        f"The model does not fit, by estimate: each of {plan.gpus} GPUs needs {_gb(estimate.weights)} for weights, "
        f"{_gb(estimate.cache)} for the cache of one sequence of {estimate.length} tokens and {_gb(OVERHEAD_BYTES)} "
        f"besides, and has {_gb(estimate.free)}. What may help: {remedy}. SKIP_FIT_CHECK=true tries it all the same."
    )


def _estimate(folder: Path, plan: Plan, memory: Iterable[Mapping[str, int]]) -> Estimate | None:
    gpus = list(memory)[: plan.gpus]
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = sum(file.stat().st_size for file in weight_files(folder))
        if _is_halved(config, plan):
            weights //= 2
        length = _text(config)["max_position_embeddings"] if plan.max_model_len is None else plan.max_model_len
        per_token = _cache_per_token(_text(config), plan)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if len(gpus) < plan.gpus or not weights:
        return None
    free = min(min(gpu["memory"] * plan.utilization, gpu["free"]) for gpu in gpus)
    return Estimate(weights / plan.gpus, length * per_token, free, length)


def _is_halved(config: dict[str, Any], plan: Plan) -> bool:
    """Tell whether what the files hold in 32 bits is loaded in 16."""
    stored = config.get("dtype") or config.get("torch_dtype") or _text(config).get("torch_dtype")
    return stored == "float32" and plan.dtype not in DTYPE_BYTES


def weight_files(folder: Path) -> list[Path]:
    """Return the files that vLLM would load: one format, and of Mistral's two copies one."""
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    named = [file for file in found if not file.name.startswith("consolidated")]
    return named or found


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that is about the language model."""
    return next((part for part in language_parts(config) if "num_hidden_layers" in part), config)


def language_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a configuration holds within itself about a language model."""
    parts = (config.get(name) for name in ("text_config", "llm_config", "language_config"))
    return [part for part in parts if isinstance(part, dict)]


def _cache_per_token(text: dict[str, Any], plan: Plan) -> float:
    """Return the bytes that one token takes in the cache of each GPU."""
    size = CACHE_BYTES.get(plan.cache_dtype) or DTYPE_BYTES.get(plan.dtype, 2)
    layers = text["num_hidden_layers"]
    if rank := text.get("kv_lora_rank"):
        # Every GPU of a layer keeps all of what is latent.
        return float(layers / plan.pipeline * (rank + text.get("qk_rope_head_dim", 0)) * size)
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    # Layers with a window, or with a state instead of a cache, take little.
    kinds = text.get("layer_types")
    full = sum("full" in kind for kind in kinds) if kinds else layers
    key_heads = text.get("num_key_value_heads") or heads
    # More GPUs than heads of keys have copies.
    return float(2 * full / plan.pipeline * max(key_heads / plan.tensor, 1) * head * size)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
