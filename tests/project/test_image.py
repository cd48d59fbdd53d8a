"""Checks of the image without a Docker engine: the files, the steps and the linter."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from builder import install
from tests.support.tiny import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BAKE = (ROOT / "docker-bake.hcl").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


def steps(instruction: str) -> list[str]:
    """Return the arguments of every occurrence of an instruction, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [line.split(" ", 1)[1] for line in joined.splitlines() if line.startswith(f"{instruction} ")]


def stages() -> dict[str, str]:
    """Return the text of every stage by its name, in their order. The first line is the name of the stage's base."""
    parts = re.split("^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    named = ((part.split("\n", 1)[0].split(" AS "), part) for part in parts)
    return {name: f"{base}\n{part}" for (base, name), part in named}


def target(name: str) -> str:
    """Return the text of a target in the bake file."""
    return BAKE.partition(f'target "{name}" {{\n')[2].partition("\n}")[0]


def test_a_build_without_a_target_makes_the_gpu_image() -> None:
    """RunPod's Hub and its builds from GitHub know no target: they build the last stage."""
    assert list(stages())[-1] == "gpu"
    base = stages()["gpu"].split("\n")[0]
    assert stages()[base].split("\n")[0] == "${VLLM_REPOSITORY}:${VLLM_TAG}"
    assert {"VLLM_REPOSITORY=vllm/vllm-openai", "VLLM_TAG=v0.32.0"} <= set(steps("ARG"))
    assert re.search(r'^group "default" { targets = \["gpu"\] }$', BAKE, re.MULTILINE)
    assert re.search(r'target += "gpu"', target("gpu"))
    assert re.search(r'target += "cpu"', target("cpu"))


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_the_bake_file_passes_arguments_that_the_stage_has(name: str) -> None:
    passed = re.findall(r"([A-Z_]+) += [A-Z_]+", target(name))
    assert "VERSION" in passed
    declared = re.findall("^ARG ([A-Z_]+)", stages()[name] + DOCKERFILE.partition("\nFROM ")[0], re.MULTILINE)
    assert set(passed) <= set(declared)


def test_a_build_without_a_token_is_possible() -> None:
    """Without `env`, buildx looks for a file of that name (https://github.com/docker/buildx/issues/3285)."""
    assert 'secret = ["type=env,id=HF_TOKEN,env=HF_TOKEN"]' in target("gpu")


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_the_image_is_a_server(name: str) -> None:
    stage = stages()[name]
    assert "ARG VERSION=dev\n" in stage
    assert "ENV WORKER_IMAGE=${VERSION}\n" in stage
    assert "EXPOSE 8000\n" in stage
    assert 'ENTRYPOINT ["/worker/builder/entrypoint.sh"]' in stage
    assert 'CMD ["python3", "/worker/builder/healthcheck.py"]' in stage


def test_a_large_model_has_time_to_load_before_the_container_is_unhealthy() -> None:
    assert "--start-period=30m" in stages()["gpu"]


@pytest.mark.parametrize("label", ["title", "description", "version", "revision", "source", "licenses"])
def test_the_gpu_image_has_the_usual_labels(label: str) -> None:
    assert f'org.opencontainers.image.{label}="' in stages()["gpu"]


def test_the_image_has_a_command_python() -> None:
    """RunPod's guides start workers with `python handler.py`; the base image may have `python3` only."""
    assert 'command -v python || ln -s "$(command -v python3)" /usr/local/bin/python' in stages()["base"]


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


def test_shell_scripts_are_valid_and_executable() -> None:
    for script, shell in (("builder/entrypoint.sh", "sh"), ("builder/image_check.sh", "bash")):
        subprocess.run([shell, "-n", script], cwd=ROOT, check=True)
        assert os.access(ROOT / script, os.X_OK)
