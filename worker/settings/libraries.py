"""Variables of vLLM, CUDA and the Hugging Face libraries that the worker reads too. vLLM's parser validates its own."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from worker.settings import flags


@dataclass(frozen=True, slots=True)
class Libraries:
    """What the worker needs to know of other libraries' settings. Names of Hub repositories may be local paths."""

    tokenizer: str | None
    tokenizer_revision: str | None
    hf_config_path: str | None
    draft_models: tuple[tuple[str, str, str | None], ...]
    """Draft models for speculative decoding: the variable, the name and the revision of each."""
    adapters: tuple[tuple[str, str], ...]
    """LoRA adapters: the variable and the name or path of each."""
    loads_adapters_at_runtime: bool
    chosen_cache: bool
    """Whether the user chose where the Hugging Face libraries keep downloads."""
    hub_caches: tuple[Path, ...]
    """Where the Hugging Face libraries keep downloads, in the order in which to search."""
    vllm_cache: Path
    """Where vLLM keeps compiled code."""
    visible_gpus: tuple[int, ...] | None
    """The GPUs that CUDA_VISIBLE_DEVICES lists by number, in its order; None: all of them."""
    start_method: str | None
    """How vLLM starts its processes: `fork`, `spawn`, or None for the worker's choice."""

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Self:
        """Pick the variables out of `values`. A value that vLLM would refuse counts as unset."""
        home = values.get("HF_HOME") or Path(values.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        caches = (values.get("HF_HUB_CACHE"), Path(home).expanduser() / "hub")
        draft = _object(values.get("SPECULATIVE_CONFIG", ""))
        drafts = (
            ("SPEC_MODEL", values.get("SPEC_MODEL"), None),
            ("SPECULATIVE_CONFIG", draft.get("model"), draft.get("revision")),
        )
        gpus = [number.strip() for number in values.get("CUDA_VISIBLE_DEVICES", "").split(",")]
        return cls(
            tokenizer=values.get("TOKENIZER"),
            tokenizer_revision=values.get("TOKENIZER_REVISION"),
            hf_config_path=values.get("HF_CONFIG_PATH"),
            draft_models=tuple((variable, str(name), revision) for variable, name, revision in drafts if name),
            adapters=(
                *(("DEFAULT_MM_LORAS", str(path)) for path in _object(values.get("DEFAULT_MM_LORAS", "")).values()),
                *(("LORA_MODULES", path) for path in _adapter_paths(values.get("LORA_MODULES", ""))),
            ),
            loads_adapters_at_runtime="VLLM_ALLOW_RUNTIME_LORA_UPDATING" in values,
            chosen_cache=not {"HF_HOME", "HF_HUB_CACHE"}.isdisjoint(values),
            hub_caches=tuple(Path(folder) for folder in caches if folder),
            vllm_cache=Path(values.get("VLLM_CACHE_ROOT") or "~/.cache/vllm").expanduser(),
            visible_gpus=tuple(map(int, gpus)) if all(map(str.isdigit, gpus)) else None,
            start_method=values.get("VLLM_WORKER_MULTIPROC_METHOD"),
        )


def _adapter_paths(text: str) -> list[str]:
    """Return the paths of LORA_MODULES, whose items are `NAME=PATH` or JSON objects with a `path`."""
    with suppress(ValueError):
        items = flags.items(text) if text else []
        return [
            str(_object(item).get("path", "")) if item.startswith("{") else item.partition("=")[2] for item in items
        ]
    return []


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`, or an empty one."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
