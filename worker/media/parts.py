"""Where in a request's body media stand. Pure."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
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
    for path, text in islice(_strings(_json(body), ""), MAX_VISITED):
        if text and (text == link or (link.startswith("data:") and link.endswith(f",{text}"))):
            return path[: path.rindex("]") + 1] if "]" in path else path
    return None


def paths_of(body: bytes, kind: Kind) -> list[str]:
    """Return the paths of all parts of a kind, in order."""
    parts = islice(_objects(_json(body), ""), MAX_VISITED)
    return [path for path, part in parts if part.get("type") in KEYS[kind]]


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every path with its string, empty for what is none."""
    yield path, value if isinstance(value, str) else ""
    for name, item in _items(value):
        yield from _strings(item, _joined(path, name))


def _objects(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every path with its object, empty for what is none."""
    yield path, value if isinstance(value, dict) else {}
    for name, item in _items(value):
        yield from _objects(item, _joined(path, name))


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
