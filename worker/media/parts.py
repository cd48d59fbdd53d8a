"""Finds the media parts of a request's body. Pure."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from worker.media.checks import Kind

KEYS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "input_image"),
    "video": ("video", "video_url", "input_video"),
    "audio": ("audio_url", "input_audio"),
    "document": ("file", "input_file", "document"),
}
"""The values of a part's `type` for each kind, in the APIs of OpenAI, vLLM and Anthropic."""

MAX_VISITED = 10_000
"""How many values of a body are searched. A body may have any size."""
MAX_KEY_CHARACTERS = 50
"""How much of a key a path repeats. Callers choose the keys."""


class Parts:
    """The paths of a JSON body's parts, such as `messages[0].content[2]`. A body that is not JSON has no parts."""

    def __init__(self, body: bytes) -> None:
        self._path_of_text: dict[str, str] = {}
        self._paths: dict[Kind, list[str]] = {kind: [] for kind in KEYS}
        for path, value in islice(_values(body), MAX_VISITED):
            if isinstance(value, str):
                self._path_of_text.setdefault(value, path)
            elif isinstance(value, dict):
                for kind, types in KEYS.items():
                    if value.get("type") in types:
                        self._paths[kind].append(path)

    def path_of(self, link: str) -> str | None:
        """Return the path of the first part that contains a link, or None.

        For a `data:` URL, a part that contains its base64 data alone counts, too.
        """
        path = self._path_of_text.get(link) if link else None
        if path is None and link.startswith("data:") and (data := link.partition(",")[2]):
            path = self._path_of_text.get(data)
        if path is None or "]" not in path:
            return path
        return path[: path.rindex("]") + 1]

    def paths_of(self, kind: Kind) -> list[str]:
        """Return the paths of all parts of a kind, in order."""
        return self._paths[kind]


def _values(body: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the paths and values of a JSON body at every depth, in order."""
    try:
        pending = [iter([("", json.loads(body))])]
    except (ValueError, RecursionError):
        return
    while pending:
        if (pair := next(pending[-1], None)) is None:
            pending.pop()
            continue
        yield pair
        pending.append(_children(*pair))


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            # Text written by users is skipped: it may be equal to a link.
            if key != "text":
                key = key[:MAX_KEY_CHARACTERS]
                yield f"{path}.{key}" if path else key, item
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{path}[{index}]", item
