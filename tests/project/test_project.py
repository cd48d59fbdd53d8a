"""The project's files on GitHub: workflows and forms can be parsed, and what they name exists."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.release_notes import notes
from tests.support.tiny import ROOT
from worker import __version__

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-01

### Added

- A feature of 0.2.0.

## [0.1.0] - 2026-11-23

- The first release.
"""

workflows = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def read(path: Path) -> Any:
    # YAML 1.1 takes `on` for true.
    content = yaml.safe_load(path.read_text())
    return {("on" if key is True else key): value for key, value in content.items()}


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job.get("steps", ())]


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.relative_to(GITHUB).as_posix())
def test_every_file_is_yaml(path: Path) -> None:
    assert read(path)


@workflows
def test_a_workflow_may_only_read_unless_a_job_says_more(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    rights = {job: set(details.get("permissions", {}).items()) for job, details in workflow["jobs"].items()}
    writing = {job: {right for right in given if right[1] == "write"} for job, given in rights.items()}
    allowed = {"image": {("packages", "write")}, "release": {("contents", "write")}}
    assert {job: given for job, given in writing.items() if given} == (allowed if path.stem == "release" else {})


@workflows
def test_actions_are_pinned_and_what_workflows_run_exists(path: Path) -> None:
    for job in read(path)["jobs"].values():
        if used := job.get("uses"):
            assert (ROOT / used).is_file()
    for step in steps(path):
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", step.get("uses", "actions/x@v1"))
        for file in re.findall(r"(?<![\w/])\.?[\w-]+/[\w./-]+\.(?:py|sh)|^\.ci/\w+", step.get("run", "")):
            assert (ROOT / file).is_file()


@workflows
def test_scripts_of_workflows_are_valid(path: Path) -> None:
    for step in steps(path):
        if script := step.get("run"):
            # An expression in a script could run code from the name of a branch: scripts use the environment.
            assert "${{" not in script
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_ci_runs_the_local_commands() -> None:
    workflow = GITHUB / "workflows/ci.yml"
    assert read(workflow)["jobs"]["test"]["strategy"]["matrix"]["command"] == [".ci/run", "make coverage"]
    assert "$COMMAND" in [step.get("run") for step in steps(workflow)]
    targets = re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert targets == ["check", "test"]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)


def test_the_release_builds_a_target_with_variables_of_the_bake_file() -> None:
    bake = (ROOT / "docker-bake.hcl").read_text()
    workflow = (GITHUB / "workflows/release.yml").read_text()
    [step] = [step for step in steps(GITHUB / "workflows/release.yml") if "bake-action" in step.get("uses", "")]
    assert f'target "{step["with"]["targets"]}"' in bake
    assert step["with"]["provenance"]
    assert step["with"]["sbom"] is True
    for name in re.findall(r'echo "(\w+)=', workflow):
        assert f'variable "{name}"' in bake
    assert "OWNER" not in workflow


def test_the_release_comes_after_checks_and_image() -> None:
    jobs = read(GITHUB / "workflows/release.yml")["jobs"]
    assert set(jobs["image"]["needs"]) == {"version", "test"}
    assert jobs["release"]["needs"] == "image"


def test_versions_and_licenses_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    images = {tag for page in pages for tag in re.findall(r"/(?:runpod-)?vllm-worker:([\w.]+)", page.read_text())}
    assert images - {"VERSION"} == {__version__}


def test_dependabot_watches_folders_that_exist() -> None:
    updates = read(GITHUB / "dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions", "docker", "docker-compose"}
    assert all((ROOT / update["directory"].lstrip("/")).is_dir() for update in updates)


def test_forms_ask_for_what_a_bug_report_needs() -> None:
    form = read(GITHUB / "ISSUE_TEMPLATE/bug.yml")
    ids = [field["id"] for field in form["body"] if "id" in field]
    assert len(ids) == len(set(ids))
    assert {"version", "settings", "log"} <= set(ids)
    assert "--check" in str(form)
    assert "/info" in str(form)


# ---- builder/release_notes.py


def test_the_notes_are_the_section_of_the_version() -> None:
    assert notes("v0.2.0", "0.2.0", CHANGELOG) == "### Added\n\n- A feature of 0.2.0."
    assert notes("v0.1.0", "0.1.0", CHANGELOG) == "- The first release."


@pytest.mark.parametrize(
    ("tag", "version", "message"),
    [
        pytest.param("v0.3.0", "0.2.0", r"The tag is v0\.3\.0, but .* is 0\.2\.0", id="a tag of another version"),
        pytest.param("0.2.0", "0.2.0", r"Use the tag v0\.2\.0", id="a tag without v"),
        pytest.param("v0.3.0", "0.3.0", r"no text under '## \[0\.3\.0\]'", id="a version without a section"),
        pytest.param("v0", "0", r"no text under '## \[0\]'", id="the beginning of a version"),
        pytest.param("vUnreleased", "Unreleased", "no text under", id="an empty section"),
    ],
)
def test_a_release_needs_its_tag_and_its_section(tag: str, version: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        notes(tag, version, CHANGELOG)


def test_the_command_fails_with_a_wrong_tag() -> None:
    command = [sys.executable, str(ROOT / "builder/release_notes.py")]
    result = subprocess.run([*command, "v999.0.0"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"Use the tag v{__version__}." in result.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
