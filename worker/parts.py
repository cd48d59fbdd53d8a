"""Where in a request's body media stand. Pure."""

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from worker.media import Kind

KEYS: Mapping[Kind, frozenset[str]] = MappingProxyType(
    {
        "image": frozenset({"image", "image_url", "input_image"}),
        "video": frozenset({"video", "video_url", "input_video"}),
        "audio": frozenset({"audio_url", "input_audio"}),
    }
)
"""What a part of each kind has for its `type`, in the dialects of OpenAI, vLLM and Anthropic."""


def path_of(body: bytes, link: str) -> str | None:
    """Return the path, such as `messages[0].content[2]`, of the part that holds a link; a `data:` URL may be in pieces.

    Returns None if there is none.
    """
    for path, text in _strings(_json(body), ""):
        if text == link or (link.startswith("data:") and text and link.endswith(f",{text}")):
            return path[: path.rindex("]") + 1] if "]" in path else path
    return None


def paths_of(body: bytes, kind: Kind) -> list[str]:
    """Return the paths of all parts of a kind, in order."""
    return [path for path, part in _objects(_json(body), "") if part.get("type") in KEYS[kind]]


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    for name, item in _items(value):
        yield from _strings(item, _joined(path, name))


def _objects(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
    for name, item in _items(value):
        yield from _objects(item, _joined(path, name))


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def _joined(path: str, name: str | int) -> str:
    if isinstance(name, int):
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name
