"""Finds the media parts of a request's body. Pure."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from worker.media.checks import Kind

KEYS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "input_image"),
    "video": ("video", "video_url", "input_video"),
    "audio": ("audio_url", "input_audio"),
}
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
    return [path for path, part in _values(body) if isinstance(part, dict) and part.get("type") in KEYS[kind]]


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
        if isinstance(value, dict):
            # Text written by users is skipped: it may be equal to a link.
            items = [(f"{path}.{key}" if path else key, item) for key, item in value.items() if key != "text"]
            pending += reversed(items)
        elif isinstance(value, list):
            pending += reversed([(f"{path}[{index}]", item) for index, item in enumerate(value)])
