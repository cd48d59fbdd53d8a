"""The field `batch` of a job's input, and the paths that callers may name."""

import base64
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.batches import item, jsonl
from worker.batch import spec
from worker.batch.spec import BatchSpec, Volume
from worker.errors import InvalidRequestError


def test_the_defaults_are_the_order_of_the_input_and_a_late_priority() -> None:
    assert spec.read({"batch": {"input": "in.jsonl"}}) == BatchSpec(input="in.jsonl", order="input", priority=100)


@pytest.mark.parametrize(
    ("job_input", "message"),
    [
        pytest.param({"batch": {"input": [item("a")]}, "stream": True}, "'stream' must not stand beside", id="beside"),
        pytest.param({"batch": [item("a")]}, "'batch' must be an object", id="a list"),
        pytest.param({"batch": {}}, "'batch.input' is missing", id="no input"),
        pytest.param({"batch": {"input": ""}}, "'batch.input' is wrong", id="empty input"),
        pytest.param({"batch": {"input": []}}, "'batch.input' is wrong", id="no lines"),
        pytest.param({"batch": {"input": 1}}, "'batch.input' is wrong", id="a number"),
        pytest.param({"batch": {"input": "a", "concurrency": 0}}, "'batch.concurrency' is wrong", id="concurrency"),
        pytest.param({"batch": {"input": "a", "concurrency": "4"}}, "'batch.concurrency' is wrong", id="a text"),
        pytest.param({"batch": {"input": "a", "priority": 2**40}}, "'batch.priority' is wrong", id="priority"),
        pytest.param({"batch": {"input": "a", "order": "none"}}, "'batch.order' is wrong", id="order"),
        pytest.param({"batch": {"input": "a", "out": "b"}}, "'batch.out' is an unknown field", id="unknown"),
    ],
)
def test_a_mistake_is_named_with_what_is_accepted(job_input: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        spec.read(job_input)
    assert message in str(caught.value)
    assert spec.SHAPE in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        pytest.param([item("a")], "list", id="lines"),
        pytest.param("HTTPS://example.com/in.jsonl", "link", id="a link"),
        pytest.param("folder/in.jsonl", "path", id="a path"),
        pytest.param("taken", "path", id="a path that could be base64"),
        pytest.param("missing", "base64", id="no such path"),
        pytest.param(base64.b64encode(jsonl([item("a")])).decode(), "base64", id="base64"),
        pytest.param("A" * 300, "base64", id="longer than a name"),
        pytest.param("A" * 5000, "base64", id="longer than a path"),
        pytest.param("data:application/jsonl;base64,AAAA", "base64", id="a data URL"),
    ],
)
def test_the_kind_of_the_input_follows_from_its_text(tmp_path: Path, value: Any, kind: str) -> None:
    (tmp_path / "taken").touch()
    assert BatchSpec(input=value).input_kind(Volume(tmp_path)) == kind


def test_a_text_full_of_spaces_does_not_block_the_worker(tmp_path: Path) -> None:
    began = time.process_time()
    assert BatchSpec(input="A" + " " * 100_000 + "!").input_kind(Volume(tmp_path)) == "path"
    assert time.process_time() - began < 2


def test_paths_may_be_relative_or_absolute(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    assert volume.path("a/../b.jsonl", "output") == volume.path(f"{tmp_path}/b.jsonl", "output") == tmp_path / "b.jsonl"


@pytest.mark.parametrize(
    "text", ["..", "../x.jsonl", "/etc/passwd", "a/../../x", "out/x.jsonl", "", ".", "a\0b", "loop/x"]
)
def test_paths_must_not_lead_out_of_the_volume(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(InvalidRequestError, match="must not lead out of it"):
        Volume(folder).path(text, "input")


def test_results_are_written_to_jsonl_files_only(tmp_path: Path) -> None:
    for field in ("output", "errors"):
        with pytest.raises(InvalidRequestError, match=rf"'batch\.{field}' must end with '\.jsonl'"):
            Volume(tmp_path).path("config.json", field)
        (tmp_path / "link.jsonl").unlink(missing_ok=True)
        (tmp_path / "link.jsonl").symlink_to("config.json")
        with pytest.raises(InvalidRequestError, match="must end with"):
            Volume(tmp_path).path("link.jsonl", field)


def test_without_a_volume_paths_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no network volume at .*none\. Attach one to the endpoint"):
        Volume(tmp_path / "none").path("in.jsonl", "input")
