"""Answers without what differs from one run to the next: ids, times, and where a stream was cut into parts."""

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
"""Fields that are never the same twice."""
COUNTERS = {"sequence_number"}
"""Fields that count the parts of a stream."""
GENERATED = re.compile(r"\b(chatcmpl|cmpl|resp|msg|fc|call|rs|chatcmpl-tool|render)[-_][0-9a-zA-Z-]{8,}\b")
TEXTS = {"content", "reasoning", "reasoning_content", "text", "arguments", "delta", "thinking", "partial_json"}
"""Fields of a stream's events whose values follow one another."""
LISTS = {"logprobs", "token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset", "prompt_token_ids"}


def value(found: Any) -> Any:
    """Return JSON without ids and times."""
    if isinstance(found, dict):
        return {key: "*" if key in NAMES and found[key] is not None else value(found[key]) for key in sorted(found)}
    if isinstance(found, list):
        return [value(one) for one in found]
    return GENERATED.sub("*", found) if isinstance(found, str) else found


def body(data: bytes) -> Any:
    """Return a whole answer's body."""
    try:
        return value(json.loads(data))
    except ValueError:
        return data.decode()


def stream(data: bytes) -> list[Any]:
    """Return a stream's events, those of each choice in a row, of which those that go on are one."""
    splitter = sse.EventSplitter()
    events = [*splitter.feed(data), *splitter.flush()]
    merged: list[Any] = []
    for event in sorted(map(_read, events), key=_choice):
        try:
            merged[-1:] = [_joined(merged[-1], event)]
        except (_DifferentError, IndexError):
            merged.append(event)
    return merged


def _read(event: bytes) -> Any:
    """Return an event's name and data; a line that is neither, such as `[DONE]`, stays as it is."""
    lines = event.decode().splitlines()
    name = next((line for line in lines if line.startswith("event:")), "")
    payload = sse.payload(event)
    return [name, value(_without(payload, COUNTERS))] if payload is not None else event.decode()


def _without(found: Any, names: Iterable[str]) -> Any:
    return {key: one for key, one in found.items() if key not in names} if isinstance(found, dict) else found


def _choice(event: Any) -> tuple[int, int]:
    """Return what an event is sorted by: a choice's events by its number, in between the others."""
    choices = event[1].get("choices") if isinstance(event, list) and isinstance(event[1], dict) else None
    return (1, choices[0]["index"]) if choices else (0, 0) if choices is None and isinstance(event, list) else (2, 0)


class _DifferentError(Exception):
    """Two events say different things."""


def _joined(first: Any, second: Any, key: str = "") -> Any:
    """Return two values of which the second goes on where the first ended.

    Raises:
        _DifferentError: it does not.
    """
    if first is None or second is None:
        one = second if first is None else first
        # A part of a stream may hold several parts of one call.
        return _joined_by_index(one) if key == "tool_calls" and one else one
    if isinstance(first, str) and isinstance(second, str) and key in TEXTS:
        return first + second
    if isinstance(first, dict) and isinstance(second, dict):
        return {name: _joined(first.get(name), second.get(name), name) for name in sorted({*first, *second})}
    if isinstance(first, list) and isinstance(second, list):
        if key in TEXTS | LISTS:
            return first + second
        if all(isinstance(one, dict) and "index" in one for one in first + second):
            return _joined_by_index(first + second)
        if len(first) == len(second):
            return [_joined(one, other) for one, other in zip(first, second, strict=True)]
    if first != second:
        raise _DifferentError
    return first


def _joined_by_index(parts: list[Any]) -> list[Any]:
    joined: dict[int, Any] = {}
    for part in parts:
        joined[part["index"]] = _joined(joined.get(part["index"]), part)
    return list(joined.values())
