"""The files that are generated from the settings are current, and RunPod's Hub can read them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.support.tiny import ROOT
from worker.request.inputs import JobInput
from worker.settings import read, sources

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


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / name).read_text())
    return loaded


def test_generated_files_are_current() -> None:
    command = [sys.executable, "builder/generate.py", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("name", LISTINGS)
def test_the_hub_can_read_a_listing(name: str) -> None:
    listing = load(name)
    jsonschema.validate(listing, HUB)
    fields = {variable["key"]: variable.get("input", {}) for variable in listing["config"]["env"]}
    assert len(fields) == len(listing["config"]["env"])
    basic = [key for key, field in fields.items() if field and not field.get("advanced")]
    assert len(basic) == 12
    assert basic[0] == "MODEL_NAME"
    # A default in the form would override the preset.
    presets = {name for preset in sources.presets() for name in preset["settings"]}
    assert not [key for key in presets if "default" in fields.get(key, {})]
    assert all(preset["defaults"].keys() <= fields.keys() for preset in listing["config"]["presets"])


@pytest.mark.parametrize("preset", sources.presets(), ids=lambda preset: str(preset["name"]))
def test_the_example_of_a_preset_matches_its_patterns(preset: dict[str, Any]) -> None:
    origins = sources.collect({"MODEL_NAME": preset["example"]}).origins
    assert all(origins[name] == f"preset {preset['name']}" for name in preset["settings"])


def test_the_worker_accepts_the_jobs_of_the_hubs_tests() -> None:
    listing = load(".runpod/tests.json")
    jsonschema.validate(listing, TESTS)
    jobs = [JobInput(test["input"]) for test in listing["tests"]]
    assert {job.call().path for job in jobs} == {"/v1/chat/completions"}
    assert any(job.stream_form for job in jobs)
    read({variable["key"]: variable["value"] for variable in listing["config"]["env"]})


def test_the_example_environment_sets_nothing() -> None:
    lines = Path(ROOT / ".env.example").read_text().splitlines()
    assert all(line.startswith("#") or not line for line in lines)
