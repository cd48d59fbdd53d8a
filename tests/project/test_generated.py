"""The files that are generated from builder/form.yaml are current; the page of settings and .env.example are right."""

import re
import subprocess
import sys

import pytest

from builder import generate
from tests.support.tiny import ROOT
from worker.engine import parse_arguments
from worker.settings import Settings, flags, read

PAGE = (ROOT / generate.PAGE).read_text()
ROW = re.compile(r"\| `([A-Z_]+)` \| (.*?) \| (.*?) \| (.*) \|")
ROWS = [pytest.param(*match.groups(), id=match[1]) for match in map(ROW.fullmatch, PAGE.splitlines()) if match]
PYTHON = re.compile(r"<\w|\w\(\w*=|==SUPPRESS==|Enum\.|\bNone\b|set\(\)|True|False")
"""What Python prints and people do not write."""
EXAMPLE = (ROOT / ".env.example").read_text().splitlines()


def test_generated_files_are_current() -> None:
    command = [sys.executable, "builder/generate.py", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


def test_the_page_has_every_setting_of_the_worker() -> None:
    listed = {row.id for row in ROWS}
    set_by_the_platform = {name for name, text in generate._docstrings().items() if "Set by RunPod" in text}
    set_by_the_platform |= {name for name, text in generate._docstrings().items() if "Set by the image" in text}
    assert {name.upper() for name in Settings.model_fields} - listed == set_by_the_platform


@pytest.mark.parametrize(("name", "values", "default", "meaning"), ROWS)
def test_a_setting_is_described_for_people(name: str, values: str, default: str, meaning: str) -> None:
    assert all((values, default, meaning)), name
    assert not PYTHON.search(f"{values} {default} {meaning}")
    if value := re.fullmatch(r"`([^`]+)`( \([0-9,]+ (?:million|MB)\))?", default):
        settings = read({name: value[1]})
        assert settings.model_dump() == read({}).model_dump()
        assert vars(parse_arguments(settings)) == vars(parse_arguments(read({})))


def test_the_example_environment_is_short_and_sets_no_setting() -> None:
    assert len(EXAMPLE) <= 40
    assert [line for line in EXAMPLE if line and not line.startswith("#")] == ["COMPOSE_PROFILES=gpu"]


def test_the_settings_of_the_example_environment_are_valid() -> None:
    lines = [line.removeprefix("# ") for line in EXAMPLE if line.startswith("#")]
    values = dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))
    known = {name.upper() for name in Settings.model_fields} | generate._flags().keys() | {"VLLM_CONFIG_FILE"}
    assert values.keys() <= known
    assert next(iter(values)) == "WORKER_API_KEY"
    assert flags.items(values["WORKER_API_KEY"])
    parse_arguments(read({name: value.strip("'") for name, value in values.items()}))
