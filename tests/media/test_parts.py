"""Finding the media parts of a request."""

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
def test_the_part_that_contains_a_link_is_found(body: Any, link: str, path: str | None) -> None:
    assert path_of(json.dumps(body).encode(), link) == path


def test_a_huge_body_is_searched_only_in_part() -> None:
    assert path_of(json.dumps({"a": [[1]] * 20_000, "messages": [LINK]}).encode(), LINK) is None


def test_a_body_that_is_not_json_has_no_parts() -> None:
    assert path_of(b"{", LINK) is None


@pytest.mark.parametrize(("kind", "paths"), [("image", ["a[0]", "a[3]"]), ("video", ["a[1]"]), ("audio", ["a[4]"])])
def test_the_parts_of_a_kind_are_found(kind: Kind, paths: list[str]) -> None:
    types = ["image_url", "video_url", "text", "input_image", "input_audio"]
    assert paths_of(json.dumps({"a": [{"type": part_type} for part_type in types]}).encode(), kind) == paths
