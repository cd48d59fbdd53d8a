"""Which local folders the settings lead to, and when the Hub is asked. The Hub is a stand-in."""

import sys
from pathlib import Path

import pytest

from tests.model.hub import Hub, resolve, run
from tests.model.test_snapshots import MODEL_FILES, write
from worker.errors import ConfigurationError
from worker.model import weights
from worker.settings import read


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert weights.model_folder(read({"MODEL_NAME": str(tmp_path)})) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/model", "a/b/c"])
def test_a_missing_folder_is_an_error(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MODEL_NAME='{name}': no such folder"):
        weights.model_folder(read({"MODEL_NAME": name}))


def test_a_gguf_file_needs_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read({"MODEL_NAME": "org/model/model.Q4_K_M.gguf", "HF_HOME": str(tmp_path)})
    with pytest.raises(ConfigurationError, match="loads GGUF files only with a plugin"):
        weights.model_folder(settings)
    write(tmp_path / "gguf-1.dist-info", {"entry_points.txt": b"[vllm.general_plugins]\ngguf = gguf:register\n"})
    monkeypatch.syspath_prepend(tmp_path)
    assert weights.model_folder(settings) is None


def test_each_repository_is_located(tmp_path: Path) -> None:
    settings = read({"MODEL_NAME": str(tmp_path), "TOKENIZER": "org/words", "HF_HOME": str(tmp_path)})
    assert weights.locate(settings) == {str(tmp_path): tmp_path, "org/words": None}


@pytest.mark.parametrize(
    ("variables", "needs_no_hub"),
    [
        pytest.param({}, True, id="a folder"),
        pytest.param({"VLLM_EXTRA_ARGS": "--seed 1"}, False, id="unknown flags"),
        pytest.param({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, False, id="adapters at run time"),
    ],
)
def test_whether_vllm_needs_the_hub(tmp_path: Path, variables: dict[str, str], needs_no_hub: bool) -> None:
    local = weights.Weights(read({"MODEL_NAME": str(write(tmp_path, MODEL_FILES))} | variables))
    local.close()
    assert (local.are_local, local.need_no_hub) == (True, needs_no_hub)
    assert local.folders() == {str(tmp_path): tmp_path}


def test_a_complete_snapshot_causes_no_request(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL_FILES
    _, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    hub.requests.clear()
    assert resolve(hub.port, tmp_path, MODEL_NAME="org/model") == (0, folder)
    assert hub.requests == []
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    assert resolve(hub.port, tmp_path, MODEL_NAME="org/model") == (0, folder)
    assert hub.requests


def test_other_repositories_in_the_settings_are_downloaded_too(hub: Hub, tmp_path: Path) -> None:
    """The adapter and the tokenizer are on disk before vLLM needs them. The next start makes no request."""
    hub.files = MODEL_FILES | {"adapter_config.json": b"{}"}
    variables = {"MODEL_NAME": "org/model", "TOKENIZER": "org/words", "LORA_MODULES": "a=org/adapter"}
    code, output = resolve(hub.port, tmp_path, **variables)
    folders = dict(zip(("model", "words", "adapter"), map(Path, output.splitlines()), strict=True))
    assert code == 0
    assert [f"models--org--{name}" for name in folders] == [path.parents[1].name for path in folders.values()]
    assert not list(folders["words"].glob("*.safetensors"))
    hub.requests.clear()
    assert resolve(hub.port, tmp_path, **variables) == (0, output)
    assert hub.requests == []


def test_only_missing_repositories_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL_FILES
    _, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    hub.requests.clear()
    code, output = resolve(hub.port, tmp_path, MODEL_NAME="org/model", TOKENIZER="org/words")
    assert (code, output.splitlines()[0]) == (0, folder)
    assert not [path for path in hub.requests if "org/model" in path]


def test_the_download_imports_neither_torch_nor_vllm(hub: Hub, tmp_path: Path) -> None:
    program = "import sys, worker.model.download; print({'torch', 'vllm'} & sys.modules.keys())"
    assert run([sys.executable, "-c", program], hub.port, tmp_path).stdout.strip() == "set()"
