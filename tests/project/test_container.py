"""The image's entry point, with the real `setpriv`: the user, its rights, and the folders that it gets."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

ENTRYPOINT = ROOT / "builder/entrypoint.sh"
NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
AS_ROOT: list[str] = []
AS_IN_COMPOSE = ["setpriv", "--no-new-privs", "--bounding-set=-all,+setuid,+setgid,+net_bind_service"]
AS_ANOTHER_USER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
IS_POD = {"RUNPOD_POD_ID": "pod"}
IS_ENDPOINT = {"RUNPOD_POD_ID": "worker", "RUNPOD_ENDPOINT_ID": "endpoint"}


def start(folder: Path, prefix: list[str], **environ: str) -> tuple[list[str], str]:
    """Run the entry point and return the lines of the fake `python3`, and stderr.

    The user `nobody` takes the place of `worker`, which exists in the image only. Its home folder and the default
    volumes are in `folder`, which also takes the place of /tmp.
    """
    tools = folder / "bin"
    tools.mkdir()
    scripts = {
        "python3": 'id -u; grep -E "NoNewPrivs|CapEff" /proc/self/status; '
        'echo "$HOME $VLLM_CACHE_ROOT $USER"; echo "$*"',
        "setpriv": f'exec {shutil.which("setpriv")} $(echo "$@" | sed \'s/reuid=worker/reuid=65534/; '
        "s/regid=worker/regid=65534/; s/--init-groups/--clear-groups/')",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    (home := folder / "home").mkdir(exist_ok=True)
    if os.getuid() == 0:
        os.chown(home, 65534, 65534)
    text = ENTRYPOINT.read_text().replace("/tmp", str(folder / "tmp")).replace("/home/worker", str(home))
    for volume in ("/runpod-volume", "/workspace"):
        text = text.replace(volume, f"{folder}{volume}")
    (folder / "entrypoint.sh").write_text(text)
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    done = subprocess.run(
        [*prefix, "/bin/sh", str(folder / "entrypoint.sh"), "--check"],
        env={"PATH": f"{tools}:/usr/bin:/bin", **environ},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


def private(folder: Path) -> Path:
    """Make a folder that only root may write to."""
    folder.mkdir(mode=0o755)
    return folder


@NEEDS_ROOT
@pytest.mark.parametrize("prefix", [AS_ROOT, AS_IN_COMPOSE], ids=["docker run", "docker compose"])
def test_the_worker_runs_without_root_and_may_open_low_ports(tmp_path: Path, prefix: list[str]) -> None:
    (user, capabilities, no_new_privileges, variables, words), errors = start(tmp_path, prefix)
    assert (user, errors) == ("65534", "")
    assert int(capabilities.split()[1], 16) == 1 << 10
    assert no_new_privileges.split()[1] == "1"
    assert variables.split() == [str(tmp_path / "home"), "worker"]
    assert words == f"-u {tmp_path}/../handler.py --check"


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param("RUN_AS_ROOT", "RUN_AS_ROOT is set", id="by setting"),
        pytest.param("BASE_PATH", "only root may write to ", id="volume"),
        pytest.param("DOWNLOAD_DIR", "only root may write to ", id="folder for downloads"),
    ],
)
def test_a_worker_that_runs_as_root_says_why(tmp_path: Path, setting: str, message: str) -> None:
    value = "true" if setting == "RUN_AS_ROOT" else str(private(tmp_path / "private"))
    lines, errors = start(tmp_path, AS_ROOT, **{setting: value})
    assert lines[0] == "0"
    assert errors.startswith(f"Running as root: {message}")


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("environ", "volume"),
    [
        pytest.param({}, "runpod-volume", id="own machine"),
        pytest.param(IS_ENDPOINT, "runpod-volume", id="serverless"),
        pytest.param(IS_POD, "workspace", id="pod"),
        pytest.param(IS_POD | {"RUNPOD_ENDPOINT_ID": ""}, "workspace", id="pod with an empty endpoint"),
        pytest.param(IS_POD | {"BASE_PATH": "BASE"}, "chosen", id="pod with BASE_PATH"),
    ],
)
def test_only_the_rights_on_the_volume_of_the_platform_count(
    tmp_path: Path, environ: dict[str, str], volume: str
) -> None:
    for name in ("runpod-volume", "workspace", "chosen"):
        private(tmp_path / name)
    environ = {name: value.replace("BASE", str(tmp_path / "chosen")) for name, value in environ.items()}
    _, errors = start(tmp_path, AS_ROOT, **environ)
    assert errors == f"Running as root: only root may write to {tmp_path / volume}\n"


@NEEDS_ROOT
def test_folders_of_root_on_the_volume_are_no_reason_to_run_as_root(tmp_path: Path) -> None:
    volume = private(tmp_path / "runpod-volume")
    private(volume / "huggingface-cache")
    os.chown(volume, 65534, 65534)
    lines, errors = start(tmp_path, AS_ROOT)
    assert (lines[0], errors) == ("65534", "")


@NEEDS_ROOT
def test_another_user_gets_folders_that_it_can_write_to(tmp_path: Path) -> None:
    cache = private(tmp_path / "cache")
    lines, errors = start(tmp_path, AS_ANOTHER_USER, HOME="/", VLLM_CACHE_ROOT=str(cache))
    assert (lines[0], errors) == ("1234", "")
    assert lines[3].split() == [f"{tmp_path}/tmp", f"{tmp_path}/tmp/vllm", "worker"]


@NEEDS_ROOT
@pytest.mark.parametrize("prefix", [AS_ROOT, AS_ANOTHER_USER], ids=["the user worker", "another user"])
def test_a_cache_that_cannot_be_written_is_replaced_by_a_copy(tmp_path: Path, prefix: list[str]) -> None:
    """As on a read-only root file system. Without the copy, a start takes ten seconds longer."""
    cache = private(tmp_path / "cache")
    private(cache / "modelinfos")
    (cache / "modelinfos/model.json").write_text("{}")
    (home := tmp_path / "home").mkdir()
    lines, errors = start(tmp_path, prefix, HOME=str(home), VLLM_CACHE_ROOT=str(cache))
    assert errors == ""
    assert lines[3].split()[1] == f"{tmp_path}/tmp/vllm"
    copy = tmp_path / "tmp/vllm/modelinfos/model.json"
    assert copy.read_text() == "{}"
    assert str(copy.stat().st_uid) == lines[0]


def test_a_cache_folder_that_does_not_exist_yet_is_created(tmp_path: Path) -> None:
    cache = tmp_path / "tmp/cache/vllm"
    cache.parent.mkdir(parents=True)
    cache.parent.chmod(0o777)
    lines, errors = start(tmp_path, AS_ROOT, HOME=str(tmp_path), VLLM_CACHE_ROOT=str(cache))
    assert (lines[3].split()[1], errors) == (str(cache), "")
    assert cache.is_dir()
