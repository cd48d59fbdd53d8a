"""Finding the media parts of a request."""

import json
import time
from typing import Any

import pytest

from worker.media.checks import Kind
from worker.media.parts import Parts

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
        ({"content": [{"image_url": LINK}, {"image_url": LINK}]}, LINK, "content[0]"),
        ({"k" * 1000: LINK}, LINK, "k" * 50),
        ({"content": [{"image_url": ""}]}, "", None),
        ({"content": [{"image_url": ""}]}, "data:image/png;base64,", None),
        ([], LINK, None),
    ],
)
def test_the_part_that_contains_a_link_is_found(body: Any, link: str, path: str | None) -> None:
    assert Parts(json.dumps(body).encode()).path_of(link) == path


def test_a_huge_body_is_searched_only_in_part() -> None:
    assert Parts(json.dumps({"a": [[1]] * 20_000, "messages": [LINK]}).encode()).path_of(LINK) is None


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b"[" * 100_000])
def test_a_body_that_is_not_json_has_no_parts(body: bytes) -> None:
    assert Parts(body).path_of(LINK) is None


@pytest.mark.parametrize(("kind", "paths"), [("image", ["a[0]", "a[3]"]), ("video", ["a[1]"]), ("audio", ["a[4]"])])
def test_the_parts_of_a_kind_are_found(kind: Kind, paths: list[str]) -> None:
    types = ["image_url", "video_url", "text", "input_image", "input_audio"]
    assert Parts(json.dumps({"a": [{"type": part_type} for part_type in types]}).encode()).paths_of(kind) == paths


def test_many_links_are_searched_at_the_cost_of_one() -> None:
    links = [f"{DATA}{number:06}" + "A" * 5_000 for number in range(2_000)]
    parts = Parts(json.dumps({"content": [{"image_url": link} for link in links]}).encode())
    began = time.process_time()
    assert [parts.path_of(link) for link in links] == [f"content[{index}]" for index in range(2_000)]
    # Comparing each link with each string would be four million comparisons.
    assert time.process_time() - began < 0.5
