"""LoRA adapters that requests name: which are allowed, where they are found, and which are refused."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.hub import Hub, hub_environment
from tests.support import adapters as tiny_adapters
from tests.support.adapters import CONFIG, WEIGHTS, files_of, write
from tests.support.tiny import MODEL, ROOT
from worker.model import adapter_checks, adapters
from worker.model.adapter_checks import AdapterError, AdapterNotFoundError, AdapterUnavailableError, Base, base_name
from worker.settings import Settings, read

BASE = Base.of(MODEL, ["tiny", str(MODEL)], 8)
WRONG = tiny_adapters.wrong()
BY_VLLM = {name for name, (_, message) in WRONG.items() if "vLLM" in message}


def settings(folder: Path | None = None, allow: str = "*", **variables: str) -> Settings:
    folders = {"ADAPTER_FOLDER": str(folder)} if folder else {}
    return read({"MODEL_NAME": str(MODEL), "LORA_ALLOW": allow, **folders, **variables})


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [
        pytest.param("org/*", ["org/a", "org/b"], id="an organization"),
        pytest.param("org/a", ["org/a"], id="one adapter"),
        pytest.param("*/a,mine", ["org/a", "other/a", "mine"], id="several patterns"),
        pytest.param("ORG/*", [], id="upper and lower case differ"),
    ],
)
def test_patterns(pattern: str, allowed: list[str]) -> None:
    names = ["org/a", "org/b", "other/a", "mine"]
    assert [name for name in names if adapters.is_allowed(name, settings(allow=pattern))] == allowed


def test_nothing_is_allowed_without_patterns() -> None:
    assert not adapters.is_allowed("org/a", read({"MODEL_NAME": str(MODEL)}))


@pytest.mark.parametrize(
    ("served", "trained"),
    [
        pytest.param("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", id="the same name"),
        pytest.param("Qwen/Qwen3-8B-AWQ", "Qwen/Qwen3-8B", id="a quantized variant"),
        pytest.param("RedHatAI/Qwen3-8B-FP8-dynamic", "unsloth/qwen3-8b-unsloth-bnb-4bit", id="two variants"),
        pytest.param("RedHatAI/Llama-3.1-8B-quantized.w4a16", "/home/me/Llama-3.1-8B/", id="a folder"),
        pytest.param("/cache/models--org--name/snapshots/0123/", "org/name", id="a snapshot"),
    ],
)
def test_names_of_the_same_model(served: str, trained: str) -> None:
    assert base_name(served) == base_name(trained)


@pytest.mark.parametrize(
    ("served", "trained"),
    [("Qwen/Qwen3-8B", "Qwen/Qwen3-4B"), ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"), ("org/a-fp8", "org/a-fp80")],
)
def test_names_of_different_models(served: str, trained: str) -> None:
    assert base_name(served) != base_name(trained)


@pytest.mark.parametrize("name", ["french", "upper"])
def test_an_adapter_that_fits(name: str) -> None:
    adapter_checks.check(tiny_adapters.FOLDER / name, name, BASE)


@pytest.mark.parametrize("name", sorted(WRONG.keys() - BY_VLLM - {"too-large", "pickled", "no-config"}))
def test_an_adapter_that_does_not_fit(tmp_path: Path, name: str) -> None:
    files, message = WRONG[name]
    with pytest.raises(AdapterError) as caught:
        adapter_checks.check(write(tmp_path / name, files), name, BASE)
    assert message in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_modules_of_unknown_shape_are_left_to_vllm(tmp_path: Path) -> None:
    """The files of a quantized model have other shapes."""
    base = Base(BASE.names, {}, 8, BASE.max_bytes)
    adapter_checks.check(write(tmp_path / "a", WRONG["small"][0]), "a", base)


def test_a_model_without_weights_on_disk(tmp_path: Path) -> None:
    assert Base.of(tmp_path / "none", ["a"], 8).max_bytes == adapter_checks.NO_WEIGHTS_BYTES


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret",
        "a/../../secret",
        "/etc",
        "a/b/c",
        "a\0b",
        "a b",
        "a\nb",
        "-a",
        "é",
        "image",
        "a" * 200,
    ],
)
def test_a_name_that_is_no_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "secret", files_of("french"))
    write(tmp_path / "folder/image", files_of("french"))
    with pytest.raises(AdapterNotFoundError):
        adapters.find(name, settings(tmp_path / "folder"), tmp_path, 10**6)


def test_a_folder_is_copied(tmp_path: Path) -> None:
    """Whoever changes the folder later changes neither the copy nor what vLLM has cached under its path."""
    folder, copies = write(tmp_path / "folder/org/mine", files_of("french")), tmp_path / "copies"
    copies.mkdir()

    def find() -> Path:
        found = adapters.find("org/mine", settings(tmp_path / "folder"), copies, 10**6)
        assert found is not None
        return found

    first = find()
    assert {file.name: file.read_bytes() for file in first.iterdir()} == files_of("french")
    assert find() == first
    write(folder, files_of("upper"))
    second = find()
    assert second != first
    assert {file.name: file.read_bytes() for file in second.iterdir()} == files_of("upper")
    assert (first / WEIGHTS).read_bytes() == files_of("french")[WEIGHTS]


def test_two_names_have_two_copies(tmp_path: Path) -> None:
    """Whoever removes one copy does not remove the other."""
    for name in ("a", "b"):
        write(tmp_path / "folder" / name, files_of("french"))
    first, second = (adapters.find(name, settings(tmp_path / "folder"), tmp_path, 10**6) for name in ("a", "b"))
    assert first != second


COPY = """
import resource, signal, sys
from pathlib import Path
from worker.errors import JobError
from worker.model import adapters
from worker.settings import read
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
root, copies, model = sys.argv[1:]
try:
    adapters.find("a", read({"MODEL_NAME": model, "LORA_ALLOW": "*", "ADAPTER_FOLDER": root}), Path(copies), 10**9)
except JobError as error:
    print(error.status, error)
"""


def test_a_folder_that_cannot_be_copied(tmp_path: Path) -> None:
    write(tmp_path / "folder/a", files_of("french"))
    (tmp_path / "copies").mkdir()
    command = [sys.executable, "-c", COPY, str(tmp_path / "folder"), str(tmp_path / "copies"), str(MODEL)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.strip() == (
        "503 The worker cannot copy the files of the LoRA adapter 'a': File too large. Try again later."
    )
    assert not list((tmp_path / "copies").iterdir())


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnavailableError, match="cannot read the files of the LoRA adapter 'a': No such file"):
        adapter_checks.check(tmp_path / "gone", "a", BASE)


def test_a_large_configuration(tmp_path: Path) -> None:
    files = files_of("french")
    files[CONFIG] += b" " * adapter_checks.MAX_CONFIG_BYTES
    write(tmp_path / "a", files)
    with pytest.raises(AdapterError, match=r"adapter_config\.json has \d+ bytes; at most 1000000 are accepted\.$"):
        adapters.find("a", settings(tmp_path), tmp_path, 10**9)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", files_of("french"))
    folder = tmp_path / "folder"
    write(folder / "files", {CONFIG: files_of("french")[CONFIG]})
    (folder / "files" / WEIGHTS).symlink_to(outside / WEIGHTS)
    (folder / "whole").symlink_to(outside)
    (folder / "itself").symlink_to(folder / "itself")
    with pytest.raises(AdapterError, match="is a link that leads out of its folder"):
        adapters.find("files", settings(folder), tmp_path, 10**6)
    for name in ("whole", "itself"):
        with pytest.raises(AdapterNotFoundError):
            adapters.find(name, settings(folder), tmp_path, 10**6)
    (folder / "alias").symlink_to(write(folder / "real", files_of("french")))
    assert adapters.find("alias", settings(folder), tmp_path, 10**6)


@pytest.mark.parametrize("name", ["too-large", "pickled", "no-config"])
def test_a_folder_that_is_no_adapter(tmp_path: Path, name: str) -> None:
    files, message = WRONG[name]
    write(tmp_path / name, files)
    with pytest.raises(AdapterError) as caught:
        adapters.find(name, settings(tmp_path), tmp_path, BASE.max_bytes)
    assert message in str(caught.value)


def test_what_is_offered(tmp_path: Path) -> None:
    for name in ("mine", "org/mine", "other", "image"):
        write(tmp_path / name, files_of("french"))
    (tmp_path / "empty").mkdir()
    allow = "mine,org/*,team/adapter,image,*/any"
    assert adapters.offered(settings(tmp_path, allow)) == ["mine", "org/mine", "team/adapter"]
    assert adapters.offered(settings(None, "org/a,org/b*")) == ["org/a"]


DOWNLOAD = """
import sys
from pathlib import Path
from worker.errors import JobError
from worker.model import adapters
from worker.settings import environment, read
settings = read(environment.read())
try:
    found = adapters.find("org/french", settings, Path("/none"), 10**6)
    print(found or adapters.Downloads(settings, float(sys.argv[1])).get("org/french", 10**6))
except JobError as error:
    print(type(error).__name__, error.status, error)
"""


def download(hub: Hub, home: Path, seconds: str = "60", **variables: str) -> str:
    environ = hub_environment(hub.port, home) | {"MODEL_NAME": str(MODEL), "LORA_ALLOW": "*", **variables}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, seconds], env=environ, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_an_adapter_is_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    """Only the two files that are needed: no pickled weights, and no checkpoints."""
    hub.files = files_of("french") | {"adapter_model.bin": b"pickle", "checkpoint-1/optimizer.pt": b"pickle"}
    folder = Path(download(hub, tmp_path))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files_of("french")
    hub.requests.clear()
    assert download(hub, tmp_path, HF_HUB_OFFLINE="1") == str(folder)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(
            {}, "AdapterNotFoundError 404 The Hugging Face Hub has no LoRA adapter 'org/french', or it is", id="none"
        ),
        pytest.param(
            {"adapter_model.bin": b"pickle"},
            "AdapterError 400 The LoRA adapter 'org/french': the repository has no",
            id="p",
        ),
        pytest.param(
            {CONFIG: b"{}", WEIGHTS: bytes(2 * 10**6)},
            "AdapterError 400 The LoRA adapter 'org/french': its files have 2000002 bytes; at most 1000000",
            id="too large",
        ),
    ],
)
def test_a_repository_that_is_no_adapter(hub: Hub, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    hub.files = files
    assert download(hub, tmp_path).startswith(message)
    assert not list(tmp_path.rglob("*.bin"))


def test_an_unreachable_hub(hub: Hub, tmp_path: Path) -> None:
    message = download(Hub(port=1), tmp_path)
    assert message.startswith(
        f"{AdapterUnavailableError.__name__} 503 The LoRA adapter 'org/french' is in no local cache"
    )
    assert message.endswith("Try again later.")
    assert "HF_HUB_OFFLINE forbids" in download(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert not hub.requests


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(403, "GatedRepo", "404 The LoRA adapter 'org/french' is gated: ask for access", id="gated"),
        pytest.param(401, "", "503 HF_TOKEN: the Hugging Face Hub refuses it.", id="token"),
        pytest.param(404, "RevisionNotFound", "404 The LoRA adapter 'org/french': org/french has no such", id="empty"),
    ],
)
def test_a_hub_that_refuses(hub: Hub, tmp_path: Path, status: int, reason: str, message: str) -> None:
    hub.error = (status, reason)
    assert message in download(hub, tmp_path)


def test_settings_that_are_wrong_are_no_fault_of_the_adapter(hub: Hub, tmp_path: Path) -> None:
    wrong = {**hub_environment(hub.port, tmp_path), "MODEL_NAME": str(MODEL), "MAX_QUEUE": "many"}
    command = [sys.executable, "-m", "worker.model.adapters", "org/french", "1000"]
    done = subprocess.run(command, env=wrong, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["status"] == 503
    assert "MAX_QUEUE" in json.loads(done.stdout)["error"]


def test_a_download_that_takes_too_long_is_ended(hub: Hub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub.port = silent.getsockname()[1]
        message = download(hub, tmp_path, seconds="0.5")
    assert message.startswith("AdapterUnavailableError 503 The download of the LoRA adapter 'org/french' did not end")


def test_without_a_writable_cache_there_is_one_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files = files_of("french")
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    variables = {"TMPDIR": str(tmp_path / "tmp"), "HF_HUB_CACHE": str(tmp_path / "file/hub"), "BASE_PATH": "/none"}
    folder = Path(download(hub, tmp_path, **variables))
    assert folder.is_relative_to(tmp_path / "tmp")
    before = (folder / WEIGHTS).stat()
    assert download(hub, tmp_path, **variables) == str(folder)
    assert (folder / WEIGHTS).stat() == before
    assert len(list((tmp_path / "tmp").iterdir())) == 1
