"""Which folder a MODEL_NAME becomes, against a stand-in for the Hugging Face Hub."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.model.test_snapshots import SHARDED, tensors
from tests.support.tiny import ROOT
from worker.errors import ConfigurationError, StartupError
from worker.model import repositories, snapshots, weights
from worker.settings import settings as config

COMMIT = "a" * 40


@dataclass
class Hub:
    """What the stand-in holds and has been asked."""

    port: int = 0
    refusal: tuple[int, str] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """How long a file takes."""


def handler_for(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.requests.append(self.path)
            if hub.refusal:
                self._answer(hub.refusal[0], b"", {"X-Error-Code": hub.refusal[1]})
            elif "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": name} for name, data in hub.files.items()
                ]
                self._answer(200, json.dumps(tree).encode(), {})
            elif self.path.startswith("/api/"):
                siblings = [{"rfilename": name} for name in hub.files]
                self._answer(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode(), {})
            else:
                data = hub.files[self.path.split(f"/resolve/{COMMIT}/")[1]]
                if self.command == "GET":
                    time.sleep(hub.seconds)
                self._answer(200, data, {"ETag": f'"{hash(data)}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub)) as server:
        hub.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


RESOLVE = """
import os, sys
from tests.support.tiny import ROOT
from worker.settings import settings as config
from worker.model import weights
from worker.errors import StartupError
try:
    print(*weights.Weights(config.load(os.environ), os.environ).folders().values(), sep="\\n")
except StartupError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def hub_environment(port: int, cache: Path | None) -> dict[str, str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = {"HF_HOME": str(cache)} if cache else {}
    return {**base, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_XET": "1", **home}


def resolve(port: int, cache: Path | None, **environ: str) -> tuple[int, str]:
    return run(RESOLVE, port, cache, **environ)


def run(program: str, port: int, cache: Path | None, **environ: str) -> tuple[int, str]:
    """Run a program in a process of its own, because huggingface_hub reads its endpoint at import."""
    env = hub_environment(port, cache) | environ
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip()


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert weights.local(config.load({"MODEL_NAME": str(tmp_path)}), {}) == tmp_path


@pytest.mark.parametrize("name", ["/no/such/folder", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MODEL_NAME='{name}': no such folder"):
        weights.local(config.load({"MODEL_NAME": name}), {})


@pytest.mark.parametrize("name", ["my model", "org/"])
def test_a_name_that_is_no_id(hub: Hub, tmp_path: Path, name: str) -> None:
    code, told = resolve(hub.port, tmp_path, MODEL_NAME=name)
    assert code == 2
    assert "neither a folder nor a Hugging Face id" in told


def test_a_model_is_downloaded_once_and_without_what_vllm_never_reads(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.safetensors": b"weights", "flax_model.msgpack": b"other weights"}
    code, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert code == 0
    assert {file.name for file in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
    assert Path(folder).name == COMMIT


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(401, "RepoNotFound", "has no such model, or it is private", id="unknown"),
        pytest.param(403, "GatedRepo", "is gated: ask for access at https://huggingface.co/org/model", id="gated"),
        pytest.param(401, "", "HF_TOKEN: the Hugging Face Hub refuses it", id="token"),
        pytest.param(404, "RevisionNotFound", "MODEL_REVISION='v9': org/model has no such", id="revision"),
    ],
)
def test_what_no_retry_mends_ends_with_2(hub: Hub, tmp_path: Path, status: int, reason: str, message: str) -> None:
    hub.refusal = (status, reason)
    code, told = resolve(hub.port, tmp_path, MODEL_NAME="org/model", MODEL_REVISION="v9", HF_TOKEN="hf_secret")
    assert (code, len(told.splitlines())) == (2, 1)
    assert message in told
    assert "hf_secret" not in told


WANTED = repositories.model(config.load({"MODEL_NAME": "org/model"}), {})
MODEL = SHARDED | {"model-00001-of-00002.safetensors": tensors(3_000_000)}


def test_a_complete_snapshot_asks_nothing_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL
    _, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    hub.requests.clear()
    assert resolve(hub.port, tmp_path, MODEL_NAME="org/model") == (0, folder)
    assert hub.requests == []
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    assert resolve(hub.port, tmp_path, MODEL_NAME="org/model") == (0, folder)
    assert hub.requests


def test_what_settings_name_besides_comes_along(hub: Hub, tmp_path: Path) -> None:
    """An adapter and a tokenizer are downloaded before vLLM asks for them, and then nothing is asked any more."""
    hub.files = MODEL | {"adapter_config.json": b"{}"}
    said = {"MODEL_NAME": "org/model", "TOKENIZER": "org/words", "LORA_MODULES": "a=org/adapter"}
    code, told = resolve(hub.port, tmp_path, **said)
    folders = dict(zip(("model", "words", "adapter"), map(Path, told.splitlines()), strict=True))
    assert code == 0
    assert [f"models--org--{name}" for name in folders] == [path.parents[1].name for path in folders.values()]
    assert not list(folders["words"].glob("*.safetensors"))
    hub.requests.clear()
    assert resolve(hub.port, tmp_path, **said) == (0, told)
    assert hub.requests == []


def test_a_repository_of_gguf_files_alone(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "model.Q4_K_M.gguf": b"weights"}
    code, told = resolve(hub.port, tmp_path, MODEL_NAME="org/model")
    assert (code, "with a plugin, which is not installed" in told) == (2, True)
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_gguf_file_wants_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load({"MODEL_NAME": "org/model/model.Q4_K_M.gguf"})
    with pytest.raises(ConfigurationError, match="loads GGUF files only with a plugin"):
        weights.local(settings, {})
    monkeypatch.setattr(weights, "entry_points", lambda group: [SimpleNamespace(name=f"{group}.gguf")])
    assert weights.local(settings, {"HF_HOME": str(tmp_path)}) is None


DOWNLOAD = """
import os
from worker.settings import settings as config
from worker.model import repositories, weights
from worker.errors import StartupError
settings = config.load(os.environ)
try:
    print(weights.download(repositories.model(settings, os.environ), settings, os.environ))
except StartupError as error:
    print(error)
    raise SystemExit(error.exit_code)
"""


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL | {"model.Q4_K_M.gguf": b"weights", "model.Q8_0.gguf": b"other weights"}
    code, file = run(DOWNLOAD, hub.port, tmp_path, MODEL_NAME="org/model/model.Q4_K_M.gguf")
    assert (code, Path(file).read_bytes()) == (0, b"weights")
    assert [one.name for one in Path(file).parent.iterdir()] == ["model.Q4_K_M.gguf"]


def test_two_workers_share_a_volume(hub: Hub, tmp_path: Path) -> None:
    """Both download at once; both end with a whole model."""
    hub.files, hub.seconds = MODEL, 0.3
    volume = {"BASE_PATH": str(tmp_path), "MODEL_NAME": "org/model"}
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(resolve, hub.port, None, **volume) for _ in range(2))
    assert first.result() == second.result()
    code, folder = first.result()
    assert code == 0
    assert folder.startswith(str(tmp_path / "huggingface-cache/hub"))
    assert snapshots.is_complete(Path(folder), WANTED)


def test_a_download_that_is_killed_leaves_nothing_that_looks_complete(hub: Hub, tmp_path: Path) -> None:
    hub.files, hub.seconds = MODEL, 0.5
    said = {"BASE_PATH": str(tmp_path), "MODEL_NAME": "org/model"}
    caches = snapshots.caches(config.load(said), {})
    with subprocess.Popen(
        [sys.executable, "-m", "worker.model.weights"], env=hub_environment(hub.port, None) | said, cwd=ROOT
    ) as one:
        while not any("model-0000" in path for path in hub.requests):
            time.sleep(0.02)
        one.kill()
    assert snapshots.find(WANTED, caches) is None
    hub.seconds = 0.0
    code, folder = resolve(hub.port, None, **said)
    assert (code, snapshots.is_complete(Path(folder), WANTED)) == (0, True)


FULL_DISK = """
from pathlib import Path
opened = Path.open
Path.open = lambda path, *how, **more: opened(Path("/dev/full") if path.suffix == ".incomplete" else path, *how, **more)
"""


def test_a_disk_that_fills_up_is_told_and_leaves_nothing_that_looks_complete(hub: Hub, tmp_path: Path) -> None:
    """Files are written to a device that is always full."""
    hub.files = MODEL
    code, told = run(FULL_DISK + DOWNLOAD, hub.port, tmp_path, MODEL_NAME="org/model")
    assert (code, told) == (1, "org/model cannot be downloaded: No space left on device: the Hub's cache")
    caches = snapshots.caches(config.load({"MODEL_NAME": "org/model"}), {"HF_HOME": str(tmp_path)})
    assert snapshots.find(WANTED, caches) is None


def test_a_folder_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"half/{name}": data for name, data in MODEL.items()} | {"other.safetensors": b"not wanted"}
    code, folder = resolve(hub.port, tmp_path, MODEL_NAME="org/model", MODEL_SUBFOLDER="half")
    assert (code, Path(folder).name) == (0, "half")
    assert snapshots.is_complete(Path(folder), WANTED)
    assert not (Path(folder).parent / "other.safetensors").exists()


def test_a_model_is_baked_into_an_image(hub: Hub, tmp_path: Path) -> None:
    hub.files = MODEL
    env = hub_environment(hub.port, tmp_path / "home") | {"MODEL_NAME": "org/model"}
    command = [sys.executable, "builder/bake_model.py", str(tmp_path / "models")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = snapshots.find(WANTED, [tmp_path / "models"])
    assert found is not None
    assert str(found) in done.stdout
    del hub.files["model-00002-of-00002.safetensors"]
    again = [*command[:2], str(tmp_path / "others")]
    assert subprocess.run(again, env=env, cwd=ROOT, capture_output=True, check=False).returncode == 1


def test_a_disk_that_is_too_small_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_500_000_000))
    with pytest.raises(StartupError, match=r"^2\.0 GB are to be downloaded, and the disk of .* has 2\.5 GB free"):
        weights._check_disk(tmp_path / "not" / "there" / "yet", 2_000_000_000)


def test_progress_is_a_line_for_every_tenth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blobs").mkdir()
    file = tmp_path / "blobs" / "one.incomplete"
    file.write_bytes(b"")
    caplog.set_level("INFO")
    with weights._progress(tmp_path, 1000, every=0.01):
        for size in (50, 350, 351, 1000):
            file.write_bytes(bytes(size))
            time.sleep(0.2)
    assert [record.getMessage().split(" of")[0] for record in caplog.records] == [
        "Downloaded 30 %",
        "Downloaded 100 %",
    ]


def test_a_hub_that_is_away_ends_with_1(tmp_path: Path) -> None:
    code, told = resolve(1, tmp_path, MODEL_NAME="org/model")
    assert (code, len(told.splitlines())) == (1, 1)
    assert "could not be fetched from the Hugging Face Hub" in told
