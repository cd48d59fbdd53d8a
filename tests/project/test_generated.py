"""What is generated from the settings: that it is current, and what RunPod's Hub would read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.tiny import ROOT
from worker.request import inputs as jobs
from worker.settings import settings as config
from worker.settings import sources

LISTINGS = [".runpod/hub.json", ".runpod/load-balancing/hub.json"]
TEXT = {"type": "string", "minLength": 1}
VALUE = {"type": ["string", "number", "boolean"]}
INPUT = {
    "type": "object",
    "required": ["name", "type", "description"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "type": {"enum": ["string", "number", "boolean", "huggingface"]},
        "description": TEXT,
        "default": VALUE,
        "required": {"type": "boolean"},
        "advanced": {"type": "boolean"},
        "options": {
            "type": "array",
            "items": {"type": "object", "required": ["label", "value"], "properties": {"label": TEXT, "value": VALUE}},
        },
        "min": {"type": "number"},
        "max": {"type": "number"},
        "trueValue": VALUE,
        "falseValue": VALUE,
    },
}
VARIABLE = {
    "type": "object",
    "required": ["key"],
    "oneOf": [{"required": ["value"]}, {"required": ["input"]}],
    "properties": {"key": {"pattern": "^[A-Z][A-Z0-9_]*$"}, "value": {"type": "string"}, "input": INPUT},
}
VERSIONS = {"type": "array", "minItems": 1, "items": {"pattern": r"^\d+\.\d+$"}}
HUB = {
    "type": "object",
    "required": ["title", "description", "type", "category", "iconUrl", "config"],
    "additionalProperties": False,
    "properties": {
        "title": TEXT,
        "description": TEXT,
        "type": {"const": "serverless"},
        "category": {"enum": ["audio", "embedding", "image", "language", "video"]},
        "iconUrl": TEXT,
        "config": {
            "type": "object",
            "required": ["runsOn", "containerDiskInGb", "gpuCount", "gpuIds", "env"],
            "additionalProperties": False,
            "properties": {
                "runsOn": {"enum": ["GPU", "CPU"]},
                "endpointType": {"const": "LB"},
                "containerDiskInGb": {"type": "integer"},
                "gpuCount": {"type": "integer"},
                "gpuIds": TEXT,
                "allowedCudaVersions": VERSIONS,
                "presets": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name", "defaults"], "properties": {"name": TEXT}},
                },
                "env": {"type": "array", "items": VARIABLE},
            },
        },
    },
}
TESTS = {
    "type": "object",
    "required": ["tests", "config"],
    "additionalProperties": False,
    "properties": {
        "tests": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "input", "timeout"],
                "additionalProperties": False,
                "properties": {"name": TEXT, "input": {"type": "object"}, "timeout": {"type": "integer"}},
            },
        },
        "config": {
            "type": "object",
            "required": ["gpuTypeId", "gpuCount", "env", "allowedCudaVersions"],
            "properties": {"env": {"type": "array", "items": VARIABLE}, "allowedCudaVersions": VERSIONS},
        },
    },
}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / name).read_text())
    return loaded


def test_what_is_generated_is_current() -> None:
    command = [sys.executable, "builder/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_one_that_the_hub_reads(name: str) -> None:
    listing = read(name)
    jsonschema.validate(listing, HUB)
    offered = {one["key"]: one.get("input", {}) for one in listing["config"]["env"]}
    assert len(offered) == len(listing["config"]["env"])
    in_front = [key for key, told in offered.items() if told and not told.get("advanced")]
    assert len(in_front) == 12
    assert in_front[0] == "MODEL_NAME"
    # Whatever the form fills in would count before a preset.
    presets = {name for preset in sources.presets() for name in preset["settings"]}
    assert not [key for key in presets if "default" in offered.get(key, {})]
    assert all(preset["defaults"].keys() <= offered.keys() for preset in listing["config"]["presets"])


@pytest.mark.parametrize("preset", sources.presets(), ids=lambda preset: str(preset["name"]))
def test_the_example_of_a_preset_is_one_of_its_models(preset: dict[str, Any]) -> None:
    said = sources.gather({"MODEL_NAME": preset["example"]})
    assert all(said.origins[name] == f"preset {preset['name']}" for name in preset["settings"])


def test_the_hubs_tests_are_jobs_that_the_worker_takes() -> None:
    listed = read(".runpod/tests.json")
    jsonschema.validate(listed, TESTS)
    assert {jobs.parse(one["input"]).path for one in listed["tests"]} == {"/v1/chat/completions"}
    assert any(jobs.stream_form(one["input"]) for one in listed["tests"])
    config.load({one["key"]: one["value"] for one in listed["config"]["env"]})


def test_the_example_of_an_environment_is_empty_until_somebody_fills_it() -> None:
    lines = Path(ROOT / ".env.example").read_text().splitlines()
    assert all(line.startswith("#") or not line for line in lines)
