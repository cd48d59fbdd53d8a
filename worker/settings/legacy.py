"""Settings of older workers and older releases of vLLM: other names, replacements, and those without effect."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

Values = dict[str, str]
Translation = Callable[[Values], Values]
"""Takes the old settings that it translates, as far as they are set, and returns the settings that replace them.

It raises `ValueError`, with the reason, if nothing does.
"""
SPECULATIVE: Mapping[str, str] = MappingProxyType(
    {
        "SPECULATIVE_METHOD": "method",
        "SPECULATIVE_MODEL": "model",
        "SPECULATIVE_MODEL_REVISION": "revision",
        "SPECULATIVE_QUANTIZATION": "quantization",
        "SPECULATIVE_ENFORCE_EAGER": "enforce_eager",
        "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": "draft_tensor_parallel_size",
        "SPECULATIVE_MAX_MODEL_LEN": "max_model_len",
        "NUM_SPECULATIVE_TOKENS": "num_speculative_tokens",
        "NGRAM_PROMPT_LOOKUP_MAX": "prompt_lookup_max",
        "NGRAM_PROMPT_LOOKUP_MIN": "prompt_lookup_min",
    }
)
"""Old settings for speculative decoding, and the field of `SPECULATIVE_CONFIG` that replaces each."""
TEXTS = {"method", "model", "revision", "quantization"}
"""The fields of `SPECULATIVE_CONFIG` that are texts. The others are numbers and a boolean."""


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("legacy.yaml").read_text())
    return tables


def aliases() -> Mapping[str, str]:
    """Return the names that other worker images and vLLM use, and this worker's name for each."""
    aliases: dict[str, str] = _tables()["aliases"]
    return aliases


def without_effect() -> Mapping[str, str]:
    """Return the settings without effect, each with the reason or with what to use instead."""
    reasons: dict[str, str] = _tables()["without_effect"]
    return reasons


def is_unset(name: str, value: str) -> bool:
    """Return whether a value counts as unset. Forms send an empty text, `None` or 0 for a field that was left empty."""
    return value.strip() in ("", "None") or (name in _tables()["zero_is_unset"] and _is_zero(value))


def _is_zero(value: str) -> bool:
    try:
        return float(value) == 0
    except ValueError:
        return False


def translations(source: Mapping[str, str]) -> Iterator[tuple[Values, Translation]]:
    """Yield the old settings in a source that are translated together, and their translation."""
    groups: dict[Translation, Values] = {}
    for name, translation in TRANSLATED.items():
        if name in source:
            groups.setdefault(translation, {})[name] = source[name]
    yield from ((values, translation) for translation, values in groups.items())


def _task(values: Values) -> Values:
    task = values["TASK"].strip().lower()
    if convert := {"embed": "embed", "embedding": "embed", "classify": "classify", "score": "classify"}.get(task):
        return {"RUNNER": "pooling", "CONVERT": convert}
    if runner := {"reward": "pooling", "generate": "generate", "auto": "auto"}.get(task):
        return {"RUNNER": runner}
    raise ValueError("this vLLM has no equivalent")


def _engine_death(values: Values) -> Values:
    value = values["ON_ENGINE_DEATH"]
    return {"UNFINISHED_JOBS": "leave" if value.strip().lower() == "retry" else value}


def _traces(values: Values) -> Values:
    # The worker adds the path again where the protocol needs it.
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": values["OTLP_TRACES_ENDPOINT"].strip().removesuffix("/v1/traces")}


def _speculative(values: Values) -> Values:
    fields = {SPECULATIVE[name]: value.strip() for name, value in values.items()}
    if fields.keys().isdisjoint({"method", "model", "prompt_lookup_max"}):
        raise ValueError("SPECULATIVE_METHOD, SPECULATIVE_MODEL and NGRAM_PROMPT_LOOKUP_MAX are not set")
    if fields.keys().isdisjoint({"method", "model"}):
        fields["method"] = "ngram"
    config = {field: value if field in TEXTS else _json(value) for field, value in fields.items()}
    return {"SPECULATIVE_CONFIG": json.dumps(config)}


def _json(value: str) -> Any:
    try:
        return json.loads(value.lower())
    except ValueError:
        # vLLM rejects it.
        return value


TRANSLATED: Mapping[str, Translation] = MappingProxyType(
    {
        "TASK": _task,
        "ON_ENGINE_DEATH": _engine_death,
        "OTLP_TRACES_ENDPOINT": _traces,
        **dict.fromkeys(SPECULATIVE, _speculative),
    }
)
"""Settings that have a replacement with another kind of value. Those with the same translation become one setting."""
