"""Downloads from a stand-in for the Hugging Face Hub: which files, and what each error says."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.model.hub import COMMIT, Hub, hub_environment, resolve, run
from tests.model.test_snapshots import MODEL_FILES
from tests.support.tiny import ROOT
from worker.errors import StartupError
from worker.model import download, repositories, snapshots
from worker.settings import read

DOWNLOAD = [sys.executable, "-m", "worker.model.download"]
MODEL = repositories.model(read({"MODEL_NAME": "org/model"}))
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
"""Runs a program without root's right to write to every folder."""


@pytest.mark.parametrize("name", ["my model", "org/"])
def test_a_name_that_is_not_an_id(hub: Hub, tmp_path: Path, name: str) -> None:
    code, message = resolve(hub.port, tmp_path, MODEL_NAME=name)
    assert code == 2
    assert "neither a folder nor a Hugging Face id" in message


def test_files_that_vllm_never_reads_are_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"weights", "flax_model.msgpack": b"other weights"}
    code, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert code == 0
    assert {file.name for file in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert Path(folder).name == COMMIT


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        pytest.param(["model.safetensors", "a.bin", "a.gguf", "a.pt"], ["model.safetensors"], id="safetensors"),
        pytest.param(["a.bin", "a.gguf", "a.pt"], ["a.bin"], id="pickled"),
        pytest.param(["model.safetensors", "consolidated.safetensors"], ["model.safetensors"], id="two copies"),
        pytest.param(
            ["model.safetensors", "model.safetensors.index.json", "consolidated.safetensors", "params.json"],
            ["consolidated.safetensors", "params.json"],
            id="two copies, and Mistral's configuration",
        ),
        pytest.param(["consolidated.safetensors"], ["consolidated.safetensors"], id="Mistral's format"),
    ],
)
def test_of_several_formats_one_is_downloaded(hub: Hub, tmp_path: Path, names: list[str], weights: list[str]) -> None:
    hub.files = {name: name.encode() for name in ["config.json", *names]}
    _, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert {file.name for file in Path(folder).iterdir()} == {"config.json", *weights}


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(401, "RepoNotFound", "has no such model, or it is private", id="unknown"),
        pytest.param(403, "GatedRepo", "is gated: ask for access at https://huggingface.co/org/model", id="gated"),
        pytest.param(401, "", "HF_TOKEN: the Hugging Face Hub refuses it", id="token"),
        pytest.param(404, "RevisionNotFound", "MODEL_REVISION='v9': org/model has no such", id="revision"),
    ],
)
def test_permanent_errors_end_with_2(hub: Hub, tmp_path: Path, status: int, reason: str, message: str) -> None:
    hub.error = (status, reason)
    code, output = resolve(hub.port, tmp_path, MODEL_NAME="org/model", MODEL_REVISION="v9", HF_TOKEN="hf_secret")
    assert (code, len(output.splitlines())) == (2, 1)
    assert message in output
    assert "hf_secret" not in output


def test_an_unreachable_hub_ends_with_1(tmp_path: Path) -> None:
    code, message = resolve(1, tmp_path, MODEL_NAME="org/model")
    assert (code, len(message.splitlines())) == (1, 1)
    assert "could not be fetched from the Hugging Face Hub" in message


def test_a_repository_with_only_gguf_files(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.Q4_K_M.gguf": b"weights"}
    code, message = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert (code, "with a plugin, which is not installed" in message) == (2, True)
    assert not list(tmp_path.rglob("*.gguf"))


def test_one_gguf_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL_FILES | {"model.Q4_K_M.gguf": b"weights", "model.Q8_0.gguf": b"other weights"}
    name = "org/model/model.Q4_K_M.gguf"
    done = run(DOWNLOAD, hub.port, tmp_path, MODEL_NAME=name)
    file = Path(json.loads(done.stdout)[name])
    assert (done.returncode, file.read_bytes()) == (0, b"weights")
    assert [each.name for each in file.parent.iterdir()] == ["model.Q4_K_M.gguf"]


def test_a_file_that_the_repository_lacks(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL_FILES
    done = run(DOWNLOAD, hub.port, tmp_path, MODEL_NAME="org/model/no.gguf")
    assert (done.returncode, "nothing at 'no.gguf'" in done.stdout) == (2, True)


def test_a_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"half/{name}": data for name, data in MODEL_FILES.items()} | {"other.safetensors": b"not needed"}
    code, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model", MODEL_SUBFOLDER="half")
    assert (code, Path(folder).name) == (0, "half")
    assert snapshots.is_complete(Path(folder), MODEL)
    assert not (Path(folder).parent / "other.safetensors").exists()


def test_two_workers_share_a_volume(hub: Hub, tmp_path: Path) -> None:
    """Both download at once, and both end with a complete model."""
    hub.files, hub.seconds = MODEL_FILES, 0.3
    variables = {"BASE_PATH": str(tmp_path), "MODEL_NAME": "org/model"}
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(resolve, hub.port, None, **variables) for _ in range(2))
    assert first.result() == second.result()
    code, folder = first.result()
    assert code == 0
    assert folder.startswith(str(tmp_path / "huggingface-cache/hub"))
    assert snapshots.is_complete(Path(folder), MODEL)


def test_a_killed_download_leaves_no_snapshot_that_looks_complete(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.seconds = MODEL_FILES, 0.5
    variables = {"BASE_PATH": str(tmp_path), "MODEL_NAME": "org/model"}
    caches = snapshots.caches(read(variables))
    with subprocess.Popen(DOWNLOAD, env=hub_environment(hub.port, None) | variables, cwd=ROOT) as process:
        while not any("model-0000" in path for path in hub.requests):
            time.sleep(0.02)
        process.kill()
    assert snapshots.find(MODEL, caches) is None
    hub.seconds = 0.0
    code, folder = resolve(hub.port, None, **variables)
    assert (code, snapshots.is_complete(Path(folder), MODEL)) == (0, True)


@pytest.mark.parametrize(
    ("foreign", "used"),
    [
        pytest.param([], "volume/huggingface-cache/hub", id="none"),
        pytest.param(["volume/huggingface-cache"], "volume/vllm-worker-cache/hub", id="the cache of another worker"),
        pytest.param(
            ["volume/huggingface-cache/hub/models--org--model/blobs"], "volume/vllm-worker-cache/hub", id="one model"
        ),
        pytest.param(["volume"], "home/.cache/huggingface/hub", id="the volume"),
        pytest.param(["volume", "home"], "tmp", id="everything but the temporary folder"),
    ],
)
def test_a_cache_that_is_not_writable_is_replaced_by_another(
    hub: Hub, tmp_path: Path, foreign: list[str], used: str
) -> None:
    hub.files = MODEL_FILES
    for name in ("volume", "home", "tmp", *foreign):
        (tmp_path / name).mkdir(exist_ok=True, parents=True)
    for name in foreign:
        (tmp_path / name).chmod(0o555)
    environ = {
        **hub_environment(hub.port, None),
        "MODEL_NAME": "org/model",
        "BASE_PATH": str(tmp_path / "volume"),
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    environ.pop("XDG_CACHE_HOME", None)
    command = [*AS_OTHERS, *DOWNLOAD]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["org/model"])
    assert folder.is_relative_to(tmp_path / used)
    assert snapshots.is_complete(folder, MODEL)
    assert ("is not writable" in done.stderr) == bool(foreign)


FULL_DISK = """
import sys
from pathlib import Path
open_file = Path.open
def open_full(path, *mode, **options):
    return open_file(Path("/dev/full") if path.suffix == ".incomplete" else path, *mode, **options)
Path.open = open_full
from worker.model import download
sys.exit(download.main([]))
"""


def test_a_full_disk_is_reported_and_leaves_no_snapshot_that_looks_complete(hub: Hub, tmp_path: Path) -> None:
    """Files are written to a device that is always full."""
    hub.files = MODEL_FILES
    done = run([sys.executable, "-c", FULL_DISK], hub.port, tmp_path, MODEL_NAME="org/model")
    message = f"org/model cannot be downloaded: No space left on device: {tmp_path / 'hub'}"
    assert (done.returncode, json.loads(done.stdout)) == (1, {"error": message, "exit_code": 1})
    caches = snapshots.caches(read({"MODEL_NAME": "org/model", "HF_HOME": str(tmp_path)}))
    assert snapshots.find(MODEL, caches) is None


def test_a_disk_that_is_too_small_is_reported_before_the_download(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        StartupError, match=rf"^The download needs {size / 1e9:.1f} GB .* the disk of .* has .* GB free"
    ):
        download._check_disk(tmp_path / "no" / "such" / "folder", size)


def test_progress_is_a_line_for_every_tenth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blobs").mkdir()
    file = tmp_path / "blobs" / "one.incomplete"
    file.write_bytes(b"")
    caplog.set_level("INFO")
    with download._progress(tmp_path, 1000, every=0.01):
        for size in (50, 350, 351, 1000):
            file.write_bytes(bytes(size))
            time.sleep(0.2)
    assert [record.getMessage().split(" of")[0] for record in caplog.records] == [
        "Downloaded 30 %",
        "Downloaded 100 %",
    ]


def test_a_model_is_downloaded_into_an_image(hub: Hub, tmp_path: Path) -> None:
    hub.files = dict(MODEL_FILES)
    command = [sys.executable, "builder/bake_model.py"]
    done = run([*command, str(tmp_path / "models")], hub.port, tmp_path / "home", MODEL_NAME="org/model")
    assert done.returncode == 0, done.stderr
    folder = snapshots.find(MODEL, [tmp_path / "models"])
    assert folder is not None
    assert str(folder) in done.stdout
    del hub.files["model-00002-of-00002.safetensors"]
    again = run([*command, str(tmp_path / "others")], hub.port, tmp_path / "home", MODEL_NAME="org/model")
    assert again.returncode == 1
