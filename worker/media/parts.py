"""Where in a request's body media stand. Pure."""

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
"""What a part of each kind has for its `type`, in the dialects of OpenAI, vLLM and Anthropic."""


MAX_VISITED = 10_000
"""How far a body is searched, which may hold anything."""


def path_of(body: bytes, link: str) -> str | None:
    """Return the path, such as `messages[0].content[2]`, of the part that holds a link; a `data:` URL may be in pieces.

    Returns None if there is none.
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
    return [path for path, named in types if isinstance(named, str) and named in KEYS[kind]]


def _values(body: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSON body with their paths, in order; however deep, but not however many."""
    try:
        waiting = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return
    for _ in range(MAX_VISITED):
        if not waiting:
            return
        path, value = waiting.pop()
        yield path, value
        waiting += [(_joined(path, name), item) for name, item in reversed(list(_items(value)))]


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        # What people write may look like a link, too.
        yield from ((name, item) for name, item in value.items() if name != "text")
    elif isinstance(value, list):
        yield from enumerate(value)


def _joined(path: str, name: str | int) -> str:
    if isinstance(name, int):
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name
