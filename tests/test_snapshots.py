"""Which snapshots on disk count as complete, and in which caches they are looked for."""

import json
import struct
from pathlib import Path

import pytest

from worker import config
from worker.model import snapshots

COMMIT = "c" * 40


def tensors(size: int = 16) -> bytes:
    """Return a safetensors file with one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}).encode()


BASE = {"config.json": b"{}", "tokenizer.json": b"{}"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {**BASE, "model.safetensors.index.json": index(*SHARDS), **dict.fromkeys(SHARDS, tensors())}


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in names}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        pytest.param({**BASE, "model.safetensors": tensors()}, True, id="one file"),
        pytest.param(SHARDED, True, id="shards with an index"),
        pytest.param(without(SHARDED, "model.safetensors.index.json"), True, id="shards without an index"),
        pytest.param({**BASE, "pytorch_model.bin": b"x"}, True, id="pickled"),
        pytest.param({"params.json": b"{}", "tekken.json": b"{}", "x.safetensors": tensors()}, True, id="Mistral's"),
        pytest.param(SHARDED | {"pytorch_model.bin.index.json": index("a.bin")}, True, id="an index of another format"),
        pytest.param({}, False, id="nothing"),
        pytest.param(BASE, False, id="no weights"),
        pytest.param(without(SHARDED, SHARDS[1]), False, id="a shard is missing"),
        pytest.param(without(SHARDED, SHARDS[1], "model.safetensors.index.json"), False, id="and the index"),
        pytest.param({**SHARDED, SHARDS[0]: tensors()[:-1]}, False, id="a shard is cut off"),
        pytest.param({**SHARDED, SHARDS[0]: b"\xff" * 100}, False, id="a shard is foreign"),
        pytest.param({**SHARDED, SHARDS[0]: b""}, False, id="a shard is empty"),
        pytest.param({**SHARDED, "model.safetensors.index.json": b"{"}, False, id="the index is broken"),
        pytest.param(without(SHARDED, "tokenizer.json"), False, id="no tokenizer"),
        pytest.param(without(SHARDED, "config.json"), False, id="no configuration"),
    ],
)
def test_what_is_complete(tmp_path: Path, files: dict[str, bytes], complete: bool) -> None:
    assert snapshots.is_complete(write(tmp_path / "snapshot", files)) is complete


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    folder = write(tmp_path, without(SHARDED, SHARDS[1]))
    (folder / SHARDS[1]).symlink_to(tmp_path / "blobs" / "gone")
    assert not snapshots.is_complete(folder)


def cache(root: Path, repository: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    folder = write(root / repository / "snapshots" / commit, SHARDED)
    if ref:
        write(root / repository / "refs", {ref: commit.encode()})
    return folder


def find(root: Path, **environ: str) -> Path | None:
    return snapshots.find(config.load({"MODEL_NAME": "Org/Model", **environ}), [root / "no such cache", root])


@pytest.mark.parametrize("repository", ["models--Org--Model", "models--org--model"])
def test_the_name_in_any_letter_case(tmp_path: Path, repository: str) -> None:
    assert find(tmp_path) is None
    assert cache(tmp_path, repository) == find(tmp_path)


def test_the_revision_is_a_branch_or_a_commit(tmp_path: Path) -> None:
    first = cache(tmp_path, "models--Org--Model")
    second = cache(tmp_path, "models--Org--Model", "d" * 40, "v2")
    assert find(tmp_path) == first
    assert find(tmp_path, MODEL_REVISION="v2") == find(tmp_path, MODEL_REVISION="d" * 40) == second
    assert find(tmp_path, MODEL_REVISION="v3") is None


def test_a_single_snapshot_needs_no_branch(tmp_path: Path) -> None:
    assert cache(tmp_path, "models--Org--Model", ref=None) == find(tmp_path)
    cache(tmp_path, "models--Org--Model", "d" * 40, None)
    assert find(tmp_path) is None


def test_a_folder_of_the_repository(tmp_path: Path) -> None:
    folder = cache(tmp_path, "models--Org--Model")
    assert find(tmp_path, MODEL_SUBFOLDER="half") is None
    assert find(tmp_path, MODEL_SUBFOLDER="half") is None
    write(folder / "half", SHARDED)
    assert find(tmp_path, MODEL_SUBFOLDER="half") == folder / "half"


def test_one_that_is_being_downloaded_is_not_complete(tmp_path: Path) -> None:
    folder = cache(tmp_path, "models--Org--Model")
    snapshots.marker(folder).touch()
    assert find(tmp_path) is None


def test_where_caches_are(tmp_path: Path) -> None:
    settings = config.load({"BASE_PATH": str(tmp_path), "DOWNLOAD_DIR": "/d"})
    assert snapshots.caches(settings, {"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}) == [
        snapshots.BAKED,
        Path("/d"),
        Path("/c"),
        Path("/h/hub"),
        tmp_path / "huggingface-cache/hub",
    ]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [({}, "huggingface-cache/hub"), ({"HF_HOME": "/h"}, None), ({"DOWNLOAD_DIR": "/d"}, "/d")],
)
def test_where_downloads_go(tmp_path: Path, environ: dict[str, str], folder: str | None) -> None:
    settings = config.load({"BASE_PATH": str(tmp_path), **environ})
    assert snapshots.download_folder(settings, environ) == (None if folder is None else tmp_path / folder)
    nowhere = config.load({"BASE_PATH": "/no/such"})
    assert snapshots.download_folder(nowhere, {}) is None
