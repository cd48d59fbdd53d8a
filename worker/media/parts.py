"""Finds the media parts of a request's body. Pure."""

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from worker.media.checks import Kind

KEYS: Mapping[Kind, frozenset[str]] = MappingProxyType(
    {
        "image": frozenset({"image", "image_url", "input_image"}),
        "video": frozenset({"video", "video_url", "input_video"}),
        "audio": frozenset({"audio_url", "input_audio"}),
    }
)
"""The values of a part's `type` for each kind, in the APIs of OpenAI, vLLM and Anthropic."""

MAX_VISITED = 10_000
"""How many values of a body are searched. A body may have any size."""


def path_of(body: bytes, link: str) -> str | None:
    """Return the path of the part that contains a link, such as `messages[0].content[2]`, or None.

    For a `data:` URL, a part that contains its base64 data alone counts, too.
    """
    for path, text in _values(body):
        if not isinstance(text, str) or not text:
            continue
        if text == link or (link.startswith("data:") and link.endswith(f",{text}")):
            return path[: path.rindex("]") + 1] if "]" in path else path
    return None


def paths_of(body: bytes, kind: Kind) -> list[str]:
    """Return the paths of all parts of a kind, in order."""
    types = ((path, part.get("type")) for path, part in _values(body) if isinstance(part, dict))
    return [path for path, part_type in types if isinstance(part_type, str) and part_type in KEYS[kind]]


def _values(body: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the paths and values of a JSON body at every depth, in order, up to `MAX_VISITED`."""
    try:
        pending = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return
    for _ in range(MAX_VISITED):
        if not pending:
            return
        path, value = pending.pop()
        yield path, value
        pending += [(_joined(path, key), item) for key, item in reversed(list(_items(value)))]


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        # Text written by users is skipped: it may be equal to a link.
        yield from ((key, item) for key, item in value.items() if key != "text")
    elif isinstance(value, list):
        yield from enumerate(value)


def _joined(path: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key
