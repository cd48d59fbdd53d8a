"""Responses in a form that is the same in every run: without ids, times, and the cuts between a stream's chunks."""

import json
import re
from collections.abc import Iterable
from typing import Any

from worker.request import sse

NAMES = {
    "id",
    "item_id",
    "call_id",
    "response_id",
    "request_id",
    "created",
    "created_at",
    "completed_at",
    "model_permission",
}
"""Fields that differ in every run."""
COUNTERS = {"sequence_number"}
"""Fields that count the chunks of a stream."""
GENERATED = re.compile(r"\b(chatcmpl|cmpl|resp|msg|fc|call|rs|chatcmpl-tool|render)[-_][0-9a-zA-Z-]{8,}\b")
TEXTS = {"content", "reasoning", "reasoning_content", "text", "arguments", "delta", "thinking", "partial_json"}
"""Fields of a stream's events whose values are concatenated."""
LISTS = {"logprobs", "token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset", "prompt_token_ids"}


def value(json_value: Any) -> Any:
    """Return a JSON value without ids and times."""
    if isinstance(json_value, dict):
        return {
            key: "*" if key in NAMES and json_value[key] is not None else value(json_value[key])
            for key in sorted(json_value)
        }
    if isinstance(json_value, list):
        return [value(item) for item in json_value]
    return GENERATED.sub("*", json_value) if isinstance(json_value, str) else json_value


def body(data: bytes) -> Any:
    """Return the body of a response that is not a stream."""
    try:
        return value(json.loads(data))
    except ValueError:
        return data.decode()


def stream(data: bytes) -> list[Any]:
    """Return a stream's events, sorted by choice. Successive events that can be joined are one."""
    merged: list[Any] = []
    for event in sorted(map(_read, sse.split(data)), key=_choice):
        try:
            merged[-1:] = [_joined(merged[-1], event)]
        except (_DifferentError, IndexError):
            merged.append(event)
    return merged


def _read(event: bytes) -> Any:
    """Return an event's name and data. An event without JSON data, such as `[DONE]`, stays text."""
    lines = event.decode().splitlines()
    name = next((line for line in lines if line.startswith("event:")), "")
    payload = sse.payload(event)
    return [name, value(_without(payload, COUNTERS))] if payload is not None else event.decode()


def _without(json_value: Any, names: Iterable[str]) -> Any:
    if not isinstance(json_value, dict):
        return json_value
    return {key: item for key, item in json_value.items() if key not in names}


def _choice(event: Any) -> tuple[int, int]:
    """Return the key by which events are sorted: events without choices, events by choice, then those without any."""
    choices = event[1].get("choices") if isinstance(event, list) and isinstance(event[1], dict) else None
    # The chunks of speech have one choice, without an index.
    return (
        (1, choices[0].get("index", 0))
        if choices
        else (0, 0)
        if choices is None and isinstance(event, list)
        else (2, 0)
    )


class _DifferentError(Exception):
    """Two events cannot be joined."""


def _joined(first: Any, second: Any, key: str = "") -> Any:
    """Return one value for two of which the second continues the first.

    Raises:
        _DifferentError: it does not continue the first.
    """
    if first is None or second is None:
        other = second if first is None else first
        # One chunk of a stream may hold several parts of one tool call.
        return _joined_by_index(other) if key == "tool_calls" and other else other
    if isinstance(first, str) and isinstance(second, str) and key in TEXTS:
        return first + second
    if isinstance(first, dict) and isinstance(second, dict):
        return {name: _joined(first.get(name), second.get(name), name) for name in sorted({*first, *second})}
    if isinstance(first, list) and isinstance(second, list):
        if key in TEXTS | LISTS:
            return first + second
        if all(isinstance(item, dict) and "index" in item for item in first + second):
            return _joined_by_index(first + second)
        if len(first) == len(second):
            return [_joined(before, after) for before, after in zip(first, second, strict=True)]
    if first != second:
        raise _DifferentError
    return first


def _joined_by_index(parts: list[Any]) -> list[Any]:
    joined: dict[int, Any] = {}
    for part in parts:
        joined[part["index"]] = _joined(joined.get(part["index"]), part)
    return list(joined.values())
