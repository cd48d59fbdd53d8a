"""What can be checked of the image without a Docker engine: its files, its steps, its linter's opinion."""

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
    """Return the arguments of an instruction, wherever it stands, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [line.split(" ", 1)[1] for line in joined.splitlines() if line.startswith(f"{instruction} ")]


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_file_that_is_copied_is_there_and_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for step in steps("COPY") if "--from" not in step for source in step.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_the_settings_of_the_image_without_a_gpu_are_those_of_the_tests() -> None:
    (step,) = (step for step in steps("ENV") if "SERVED_MODEL_NAME" in step)
    told = dict(re.findall(r"([A-Z_]+)=('[^']*'|\S+)", step))
    lines = (ROOT / "tests/models/tiny-vlm.env").read_text().splitlines()
    tests = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    shared = told.keys() & tests.keys() - {"MODEL_NAME"}
    assert len(shared) > 8
    assert {name: told[name].strip("'") for name in shared} == {name: tests[name].strip("'") for name in shared}


def test_what_the_base_image_has_stays_as_it_is() -> None:
    there = {"six": "1.0", "python-dateutil": "2.0"}
    wanted = "# a list\nsix==1.17.0\nprettytable==3.18.0\npython_dateutil==2.9.0\nnever==1 ; python_version < '3'\n"
    assert install.missing(wanted, there) == ["prettytable==3.18.0"]
    assert install.replaced(there, {"six": "1.0"}) == ["python-dateutil 2.0 → None"]
    assert install.replaced(there, {**there, "new": "1"}) == []


def test_the_packages_of_the_image_install_beside_others(tmp_path: Path) -> None:
    """The image's own step, in a fresh environment that has one of the packages already, in another version."""
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
    ("given", "worker"),
    [
        pytest.param({}, True, id="no volume"),
        pytest.param({"RUN_AS_ROOT": "true"}, False, id="told to stay root"),
        pytest.param({"BASE_PATH": "writable"}, True, id="a volume that it may write to"),
        pytest.param({"BASE_PATH": "private"}, False, id="a volume of root's"),
    ],
)
def test_who_runs_the_worker(tmp_path: Path, given: dict[str, str], worker: bool) -> None:
    """The entry point with stand-ins for `setpriv`, `id` and `python3`, which tell who was to run what."""
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
    volume = tmp_path / given.get("BASE_PATH", "none")
    if "BASE_PATH" in given:
        volume.mkdir()
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", **given, "BASE_PATH": str(volume), "WORKER_MODE": "queue"}
    done = subprocess.run(
        ["builder/entrypoint.sh", "--check"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [*(["worker"] if worker else []), "python3 -u handler.py --check"]


def healthy(**environ: str) -> bool:
    command = [sys.executable, "builder/healthcheck.py"]
    return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode == 0


def test_the_health_check(http_worker: HttpWorker) -> None:
    assert httpx.get(f"{http_worker.url}/ping").status_code == 200
    assert healthy(PORT=str(http_worker.port))
    assert healthy(RUNPOD_WEBHOOK_GET_JOB="http://platform/job-take/$ID?")
    assert not healthy(PORT=str(free_port()))
    assert not healthy(WORKER_MODE="http", PORT_HEALTH=str(free_port()))


def test_scripts_are_shell() -> None:
    for script in ("builder/entrypoint.sh", "builder/build_and_push.sh"):
        subprocess.run([shutil.which("sh") or "sh", "-n", script], cwd=ROOT, check=True)
        assert os.access(ROOT / script, os.X_OK)
