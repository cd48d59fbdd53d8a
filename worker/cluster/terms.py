"""What all nodes of a cluster must have in common, and how two nodes differ, in words. Pure."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from worker import redaction
from worker.errors import Json

Terms = Mapping[str, tuple[str, str]]
"""For each name a digest of the value, and the beginning of the value without secrets."""

NODE_SPECIFIC = frozenset({
    "node_rank", "master_addr", "device_ids", "data_parallel_rank", "data_parallel_start_rank", "load_format",
    "log_config_file", "logging_config", "otlp_traces_endpoint",
})  # fmt: skip
"""Arguments of vLLM that may differ between the nodes."""
NODE_SPECIFIC_VARIABLES = frozenset({
    "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_EC_SIDE_CHANNEL_HOST",
    "VLLM_P2P_SIDE_CHANNEL_HOST",
})  # fmt: skip
"""Variables of vLLM that may differ between the nodes: each has its own CPU cores and addresses."""
SHOWN_CHARACTERS = 120
NAME_CHARACTERS = 200
MISSING = ("", "not set")


def of(values: Mapping[str, Any]) -> Terms:
    """Return the terms for these values, such as the versions of programs. Secrets do not count."""
    return {printable(name): _term(name, value) for name, value in values.items()}


def of_engine(
    snapshots: Mapping[str, str], arguments: Mapping[str, Any], variables: Mapping[str, Any], gpus: int
) -> Terms:
    """Return the terms for the engine.

    `snapshots` has the folder of each repository, and what identifies its content, such as its commit. `arguments` are
    those that differ from vLLM's defaults. `variables` are those of vLLM that decide how it computes. `gpus` is the
    number of GPUs that this node uses.
    """
    values: Json = {f"snapshot {number}": identity for number, identity in enumerate(snapshots.values(), 1)}
    values["GPUs"] = gpus
    for name in arguments.keys() - NODE_SPECIFIC:
        values |= _flat(name.upper(), _without_folders(arguments[name], snapshots))
    values |= {name: variables[name] for name in variables.keys() - NODE_SPECIFIC_VARIABLES}
    return of(values)


def differences(own: Terms, other: Terms, here: str = "here", there: str = "on the head") -> list[str]:
    """Return a line for each term that differs between two nodes: `DTYPE: bfloat16 here, float16 on the head`."""
    return [
        _difference(name, own.get(name, MISSING)[1], other.get(name, MISSING)[1], here, there)
        for name in sorted({*own, *other})
        if own.get(name, MISSING)[0] != other.get(name, MISSING)[0]
    ]


def _difference(name: str, own: str, other: str, here: str, there: str) -> str:
    if own == other:
        return f"{name}: the value {here} differs from the one {there}; both are shown as {own}"
    return f"{name}: {own} {here}, {other} {there}"


def _flat(name: str, value: Any) -> Json:
    """Return a value with its name, and those in a mapping one by one: a message can then name the one that differs."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {key: item for part in value for key, item in _flat(f"{name}.{part}", value[part]).items()}


def _without_folders(value: Any, snapshots: Mapping[str, str]) -> Any:
    """Return a copy of a value with each snapshot's identity instead of its folder, which may differ between nodes."""
    if isinstance(value, Mapping):
        return {key: _without_folders(item, snapshots) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item, snapshots) for item in value]
    return snapshots.get(value, value) if isinstance(value, str) else value


def _term(name: str, value: Any) -> tuple[str, str]:
    public = redaction.public(value, name)
    text = public if isinstance(public, str) else json.dumps(public, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest(), _shown(text)


def printable(text: str, most: int = NAME_CHARACTERS) -> str:
    """Return at most so many characters of a text, which may come from a stranger, on one line of a log."""
    return "".join(character if character.isprintable() else " " for character in text[:most])


def _shown(text: str) -> str:
    """Return what a message may show of a value: the beginning, in one line. A URL may hold a secret anywhere."""
    if "://" in text:
        return "a URL"
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= SHOWN_CHARACTERS else f"{one_line[:SHOWN_CHARACTERS]}…"
