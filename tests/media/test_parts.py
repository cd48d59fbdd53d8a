"""Where media stand in a request."""

import json
from typing import Any

import pytest

from worker.media.checks import Kind
from worker.media.parts import path_of, paths_of

LINK = "https://host/picture.png"
DATA = "data:image/png;base64,aGVsbG8="


@pytest.mark.parametrize(
    ("body", "link", "path"),
    [
        (
            {"messages": [{"content": "?"}, {"content": [{"type": "text"}, {"image_url": {"url": LINK}}]}]},
            LINK,
            "messages[1].content[1]",
        ),
        ({"input": [{"content": [{"type": "input_image", "image_url": LINK}]}]}, LINK, "input[0].content[0]"),
        ({"messages": [{"content": [{"source": {"data": "aGVsbG8="}}]}]}, DATA, "messages[0].content[0]"),
        ({"messages": [{"content": LINK + "?"}]}, LINK, None),
        ({"url": LINK}, LINK, "url"),
        ({"content": [{"type": "text", "text": LINK}, {"image_url": LINK}]}, LINK, "content[1]"),
        ([], LINK, None),
    ],
)
def test_the_part_of_a_link(body: Any, link: str, path: str | None) -> None:
    assert path_of(json.dumps(body).encode(), link) == path


def test_a_body_without_end_is_not_searched_to_its_end() -> None:
    assert path_of(json.dumps({"a": [[1]] * 20_000, "messages": [LINK]}).encode(), LINK) is None


def test_no_json() -> None:
    assert path_of(b"{", LINK) is None


@pytest.mark.parametrize(("kind", "paths"), [("image", ["a[0]", "a[3]"]), ("video", ["a[1]"]), ("audio", ["a[4]"])])
def test_the_parts_of_a_kind(kind: Kind, paths: list[str]) -> None:
    types = ["image_url", "video_url", "text", "input_image", "input_audio"]
    assert paths_of(json.dumps({"a": [{"type": name} for name in types]}).encode(), kind) == paths
