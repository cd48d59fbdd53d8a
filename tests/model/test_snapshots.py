"""Which snapshots on disk are complete, where they are searched, and which repositories the settings name."""

import json
import struct
from pathlib import Path

import pytest

from worker.model import repositories, snapshots
from worker.settings import read

COMMIT = "c" * 40
MODEL = repositories.model(read({"MODEL_NAME": "Org/Model"}))


def tensors(size: int = 16) -> bytes:
    """Return a safetensors file with one tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}).encode()


BASE = {"config.json": b"{}", "tokenizer.json": b"{}"}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {**BASE, "model.safetensors.index.json": index(*SHARDS), **dict.fromkeys(SHARDS, tensors())}
MODEL_FILES = SHARDED | {SHARDS[0]: tensors(3_000_000)}


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
        pytest.param(
            without(SHARDED, SHARDS[1], "model.safetensors.index.json"), False, id="a shard and the index are missing"
        ),
        pytest.param({**SHARDED, SHARDS[0]: tensors()[:-1]}, False, id="a shard is cut off"),
        pytest.param({**SHARDED, SHARDS[0]: b"\xff" * 100}, False, id="a shard is foreign"),
        pytest.param({**SHARDED, SHARDS[0]: b""}, False, id="a shard is empty"),
        pytest.param({**SHARDED, "model.safetensors.index.json": b"{"}, False, id="the index is broken"),
        pytest.param(without(SHARDED, "tokenizer.json"), False, id="no tokenizer"),
        pytest.param(without(SHARDED, "config.json"), False, id="no configuration"),
    ],
)
def test_a_complete_model(tmp_path: Path, files: dict[str, bytes], complete: bool) -> None:
    assert snapshots.is_complete(write(tmp_path / "snapshot", files), MODEL) is complete


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": tensors()}


@pytest.mark.parametrize(
    ("variables", "files", "complete"),
    [
        pytest.param({"TOKENIZER": "o/t"}, without(SHARDED, "tokenizer.json"), True, id="with another tokenizer"),
        pytest.param({"MODEL_NAME": "o/m/x.Q4.gguf"}, {"x.Q4.gguf": b"x"}, True, id="a file"),
        pytest.param({"MODEL_NAME": "o/m/x.Q4.gguf"}, {"x.Q4.gguf": b""}, False, id="an empty file"),
        pytest.param({"MODEL_NAME": "o/m/x.Q4.gguf"}, {}, False, id="no file"),
    ],
)
def test_a_complete_part_of_a_model(
    tmp_path: Path, variables: dict[str, str], files: dict[str, bytes], complete: bool
) -> None:
    repository = repositories.model(read({"MODEL_NAME": "o/m"} | variables))
    assert snapshots.is_complete(write(tmp_path, files) / (repository.path or ""), repository) is complete


@pytest.mark.parametrize(
    ("variables", "files", "complete"),
    [
        pytest.param({"LORA_MODULES": "a=o/a"}, ADAPTER, True, id="an adapter"),
        pytest.param(
            {"LORA_MODULES": "a=o/a"}, without(ADAPTER, "adapter_model.safetensors"), False, id="without weights"
        ),
        pytest.param({"TOKENIZER": "o/t"}, {"tokenizer.json": b"{}"}, True, id="a tokenizer"),
        pytest.param({"TOKENIZER": "o/t"}, {"config.json": b"{}"}, False, id="no tokenizer"),
        pytest.param({"SPEC_MODEL": "o/d"}, without(SHARDED, "tokenizer.json"), True, id="a draft model"),
    ],
)
def test_other_complete_repositories(
    tmp_path: Path, variables: dict[str, str], files: dict[str, bytes], complete: bool
) -> None:
    (repository,) = repositories.others(read(variables))
    assert snapshots.is_complete(write(tmp_path, files), repository) is complete


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        pytest.param({"LORA_MODULES": "a=o/a,b=/local,c=o/c"}, ["o/a", "o/c"], id="adapters by pairs"),
        pytest.param({"LORA_MODULES": '[{"name": "a", "path": "o/a"}]'}, ["o/a"], id="adapters in JSON"),
        pytest.param({"LORA_MODULES": "[{"}, [], id="invalid JSON"),
        pytest.param({"DEFAULT_MM_LORAS": '{"audio": "o/a"}'}, ["o/a"], id="adapters of media"),
        pytest.param({"SPECULATIVE_CONFIG": '{"model": "o/d"}', "TOKENIZER": "o/t"}, ["o/t", "o/d"], id="a draft"),
        pytest.param({"SPECULATIVE_CONFIG": '{"method": "ngram", "model": "ngram"}'}, [], id="no model"),
        pytest.param({"TOKENIZER": "Org/Model", "MODEL_NAME": "Org/Model"}, [], id="the model's own tokenizer"),
        pytest.param({"TOKENIZER": "tests/models"}, [], id="a folder"),
    ],
)
def test_other_repositories_in_the_settings(variables: dict[str, str], names: list[str]) -> None:
    assert [repository.name for repository in repositories.others(read(variables))] == names


def test_the_revision_of_a_tokenizer() -> None:
    settings = read({"TOKENIZER": "o/t", "TOKENIZER_REVISION": "v1"})
    assert repositories.others(settings)[0].revision == "v1"


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        pytest.param(["b.safetensors", "a.safetensors", "a.bin"], ["a.safetensors", "b.safetensors"], id="safetensors"),
        pytest.param(["a.bin", "a.pt", "config.json"], ["a.bin"], id="pickled"),
        pytest.param(["model.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"], id="two copies"),
        pytest.param(["config.json"], [], id="none"),
    ],
)
def test_which_weights_vllm_loads(names: list[str], weights: list[str]) -> None:
    assert repositories.weight_files(names) == weights


@pytest.mark.parametrize(
    ("configuration", "has_remote_code"),
    [({}, False), ({"auto_map": {"A": "m.A"}}, False), ({"auto_map": {"A": "o/r--m.A"}}, True)],
)
def test_code_from_another_repository(tmp_path: Path, configuration: dict[str, object], has_remote_code: bool) -> None:
    assert snapshots.has_remote_code(tmp_path) is False
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    assert snapshots.has_remote_code(tmp_path) is has_remote_code


def test_a_broken_link_is_not_a_file(tmp_path: Path) -> None:
    folder = write(tmp_path, without(SHARDED, SHARDS[1]))
    (folder / SHARDS[1]).symlink_to(tmp_path / "blobs" / "gone")
    assert not snapshots.is_complete(folder, MODEL)


def cache(root: Path, repository: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    folder = write(root / repository / "snapshots" / commit, SHARDED)
    if ref:
        write(root / repository / "refs", {ref: commit.encode()})
    return folder


def find(root: Path, **variables: str) -> Path | None:
    repository = repositories.model(read({"MODEL_NAME": "Org/Model", **variables}))
    return snapshots.find(repository, [root / "no such cache", root])


@pytest.mark.parametrize("repository", ["models--Org--Model", "models--org--model"])
def test_upper_and_lower_case_names_match(tmp_path: Path, repository: str) -> None:
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
    write(folder / "half", SHARDED)
    assert find(tmp_path, MODEL_SUBFOLDER="half") == folder / "half"


def test_a_snapshot_that_is_being_downloaded_is_not_complete(tmp_path: Path) -> None:
    folder = cache(tmp_path, "models--Org--Model")
    snapshots.marker(folder).touch()
    assert find(tmp_path) is None


def test_the_caches_to_search(tmp_path: Path) -> None:
    settings = read({"BASE_PATH": str(tmp_path), "DOWNLOAD_DIR": "/d", "HF_HOME": "/h", "HF_HUB_CACHE": "/c"})
    assert snapshots.caches(settings) == [
        snapshots.BAKED,
        Path("/d"),
        Path("/c"),
        Path("/h/hub"),
        tmp_path / "huggingface-cache/hub",
        tmp_path / "vllm-worker-cache/hub",
    ]


@pytest.mark.parametrize(
    ("variables", "folders"),
    [
        pytest.param({}, ["huggingface-cache/hub", "vllm-worker-cache/hub", "~"], id="volume"),
        pytest.param({"HF_HOME": "/h"}, ["/h/hub", "huggingface-cache/hub", "vllm-worker-cache/hub"], id="HF_HOME"),
        pytest.param(
            {"DOWNLOAD_DIR": "/d"}, ["/d", "huggingface-cache/hub", "vllm-worker-cache/hub", "~"], id="DOWNLOAD_DIR"
        ),
        pytest.param({"BASE_PATH": "/no/such"}, ["~"], id="no volume"),
    ],
)
def test_the_folders_to_download_to(tmp_path: Path, variables: dict[str, str], folders: list[str]) -> None:
    settings = read({"BASE_PATH": str(tmp_path), **variables})
    home = Path("~/.cache/huggingface/hub").expanduser()
    expected = [home if folder == "~" else tmp_path / folder for folder in folders]
    assert snapshots.download_folders(settings) == expected
    assert set(expected) <= set(snapshots.caches(settings))
