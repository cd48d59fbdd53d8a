"""Checks of the image without a Docker engine: the files, the steps and the linter."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from builder import install
from tests.conftest import HttpWorker
from tests.support.ports import free_port
from tests.support.tiny import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


def steps(instruction: str) -> list[str]:
    """Return the arguments of every occurrence of an instruction, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [line.split(" ", 1)[1] for line in joined.splitlines() if line.startswith(f"{instruction} ")]


def test_the_linter_reports_nothing() -> None:
    done = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_copied_file_exists_and_is_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for step in steps("COPY") if "--from" not in step for source in step.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_the_cpu_image_has_the_settings_of_the_tests() -> None:
    (step,) = (step for step in steps("ENV") if "SERVED_MODEL_NAME" in step)
    image = dict(re.findall(r"([A-Z_]+)=('[^']*'|\S+)", step))
    lines = (ROOT / "tests/models/tiny-vlm.env").read_text().splitlines()
    tests = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    shared = image.keys() & tests.keys() - {"MODEL_NAME"}
    assert len(shared) > 8
    assert {name: image[name].strip("'") for name in shared} == {name: tests[name].strip("'") for name in shared}


def test_packages_of_the_base_image_are_not_replaced() -> None:
    installed = {"six": "1.0", "python-dateutil": "2.0"}
    pins = "# a list\nsix==1.17.0\nprettytable==3.18.0\npython_dateutil==2.9.0\nnever==1 ; python_version < '3'\n"
    assert install.missing(pins, installed) == ["prettytable==3.18.0"]
    assert install.replaced(installed, {"six": "1.0"}) == ["python-dateutil 2.0 → None"]
    assert install.replaced(installed, {**installed, "new": "1"}) == []


def test_the_image_installs_only_missing_packages(tmp_path: Path) -> None:
    """Runs the step of the Dockerfile in a new environment that has another version of one package."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "packaging", "six==1.16.0"], check=True)
    (step,) = (step for step in steps("RUN") if "install.py" in step)
    command = [str(python), *step.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    assert "six==1.16.0" in listed
    assert "runpod==" in listed
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Installed 0 packages" in again.stdout


@pytest.mark.parametrize(
    ("settings", "as_worker"),
    [
        pytest.param({}, True, id="no volume"),
        pytest.param({"RUN_AS_ROOT": "true"}, False, id="RUN_AS_ROOT"),
        pytest.param({"BASE_PATH": "writable"}, True, id="volume that the user worker may write to"),
        pytest.param({"BASE_PATH": "private"}, False, id="volume that only root may write to"),
    ],
)
def test_the_entry_point_drops_root_where_possible(tmp_path: Path, settings: dict[str, str], as_worker: bool) -> None:
    """Runs the entry point with scripts in place of `setpriv`, `id` and `python3` that print their calls."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "id": "echo 0",
        "python3": 'echo "python3 $*"',
        "setpriv": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
        '[ "$1" = true ] && exit; [ "$1" = test ] && { [ "${3##*/}" = writable ]; exit; }\necho worker; exec "$@"',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    volume = tmp_path / settings.get("BASE_PATH", "none")
    if "BASE_PATH" in settings:
        volume.mkdir()
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", **settings, "BASE_PATH": str(volume), "WORKER_MODE": "queue"}
    done = subprocess.run(
        ["builder/entrypoint.sh", "--check"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [*(["worker"] if as_worker else []), "python3 -u handler.py --check"]


def healthy(**environ: str) -> bool:
    command = [sys.executable, "builder/healthcheck.py"]
    return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode == 0


def test_the_health_check_asks_the_port_of_the_settings(http_worker: HttpWorker) -> None:
    assert httpx.get(f"{http_worker.url}/ping").status_code == 200
    assert healthy(PORT=str(http_worker.port))
    assert healthy(RUNPOD_WEBHOOK_GET_JOB="http://platform/job-take/$ID?")
    assert not healthy(PORT=str(free_port()))
    assert not healthy(WORKER_MODE="http", PORT_HEALTH=str(free_port()))


def test_shell_scripts_are_valid_and_executable() -> None:
    for script in ("builder/entrypoint.sh", "builder/build_and_push.sh"):
        subprocess.run([shutil.which("sh") or "sh", "-n", script], cwd=ROOT, check=True)
        assert os.access(ROOT / script, os.X_OK)
