"""Settings of older workers and older releases of vLLM: other names, replacements, and those without effect."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml

Translation = Callable[[str], dict[str, str]]


@cache
def _tables() -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("legacy.yaml").read_text())
    return tables


def aliases() -> Mapping[str, str]:
    """Return the names that other worker images and vLLM use, and this worker's name for each."""
    return _tables()["aliases"]


def without_effect() -> Mapping[str, str]:
    """Return the settings without effect, each with the reason or with what to use instead."""
    return _tables()["without_effect"]


def _to(name: str) -> Translation:
    return lambda value: {name: value}


def _engine_death(value: str) -> dict[str, str]:
    return {"UNFINISHED_JOBS": "leave" if value.strip().lower() == "retry" else value}


def _structured(value: str) -> dict[str, str]:
    backend = value.partition(":")[0].replace("lm-format-enforcer", "guidance")
    return {"STRUCTURED_OUTPUTS_CONFIG": json.dumps({"backend": backend})}


def _task(value: str) -> dict[str, str]:
    task = value.strip().lower()
    if convert := {"embed": "embed", "embedding": "embed", "classify": "classify", "score": "classify"}.get(task):
        return {"RUNNER": "pooling", "CONVERT": convert}
    runner = {"reward": "pooling", "generate": "generate", "auto": "auto"}.get(task)
    return {"RUNNER": runner} if runner else {}


TRANSLATED: Mapping[str, Translation] = MappingProxyType(
    {
        "GUIDED_DECODING_BACKEND": _structured,
        "TASK": _task,
        "ON_ENGINE_DEATH": _engine_death,
        "SPECULATIVE_MODEL": _to("SPEC_MODEL"),
        "NUM_SPECULATIVE_TOKENS": _to("SPEC_TOKENS"),
        "OPENAI_RESPONSE_ROLE": _to("RESPONSE_ROLE"),
        "VLLM_ATTENTION_BACKEND": _to("ATTENTION_BACKEND"),
        "KV_CACHE_MEMORY": _to("KV_CACHE_MEMORY_BYTES"),
    }
)
"""Settings that have a replacement with another kind of value."""
