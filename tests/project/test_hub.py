"""RunPod's Hub: its form sets nothing that its user did not set, its listing follows RunPod's documentation, and the
worker accepts its tests. The facts are in RunPod's publishing guide and its list of GPU pools."""

import asyncio
import base64
import json
import re
from typing import Any

import jsonschema
import pytest
import torch
from PIL.Image import Image
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.tool_parsers import ToolParserManager

from builder import generate
from tests.support.tiny import ROOT
from worker.engine import parse_arguments
from worker.media.checks import Limits
from worker.media.decoders import Decoders, Look
from worker.media.video import Capture
from worker.memory import Budget
from worker.request.inputs import JobInput
from worker.settings import read, sources

Json = dict[str, Any]

FORM = generate.load()
LISTING: Json = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS: Json = json.loads((ROOT / ".runpod/tests.json").read_text())
FIELDS: dict[str, Json] = {variable["key"]: variable["input"] for variable in LISTING["config"]["env"]}
POOLS_GB = {"ADA_24": 24, "AMPERE_48": 48, "ADA_48_PRO": 48}
"""The memory of the smallest GPU of each pool."""
OVERHEAD_GB = 1.5
USABLE = 0.9
"""The share of a GPU's memory that the examples may need."""

TEXT = {"type": "string", "minLength": 1}
VALUE = {"type": ["string", "number", "boolean"]}
OPTION = {"type": "object", "required": ["label", "value"], "properties": {"label": TEXT, "value": VALUE}}
INPUT = {
    "type": "object",
    "required": ["name", "type", "description", "default"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "type": {"enum": ["string", "number", "huggingface"]},
        "description": TEXT,
        "default": VALUE,
        "advanced": {"type": "boolean"},
        "options": {"type": "array", "items": OPTION},
        "min": {"type": "number"},
        "max": {"type": "number"},
    },
}
PRESET = {
    "type": "object",
    "required": ["name", "defaults"],
    "additionalProperties": False,
    "properties": {"name": TEXT, "defaults": {"type": "object", "additionalProperties": VALUE}},
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
                "runsOn": {"const": "GPU"},
                "containerDiskInGb": {"type": "integer"},
                "gpuCount": {"type": "integer"},
                "gpuIds": TEXT,
                "allowedCudaVersions": VERSIONS,
                "presets": {"type": "array", "items": PRESET},
                "env": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["key", "input"],
                        "additionalProperties": False,
                        "properties": {"key": {"pattern": "^[A-Z][A-Z0-9_]*$"}, "input": INPUT},
                    },
                },
            },
        },
    },
}
JOBS = {
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
            "properties": {"env": {"type": "array"}, "allowedCudaVersions": VERSIONS},
        },
    },
}

fields = pytest.mark.parametrize("name", FIELDS)
presets = pytest.mark.parametrize("preset", FORM["presets"], ids=lambda preset: str(preset["name"]))


def outcome(environ: dict[str, str]) -> tuple[Json, Json]:
    """Return the worker's settings and vLLM's arguments."""
    settings = read(environ)
    return settings.model_dump(), vars(parse_arguments(settings))


def text(value: object) -> str:
    """Return a value of the form as it arrives in the environment."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_the_listing_has_the_documented_shape() -> None:
    jsonschema.validate(LISTING, HUB)
    assert len(FIELDS) == len(LISTING["config"]["env"])


def test_the_form_is_short_enough_to_read() -> None:
    shown = [name for name, field in FIELDS.items() if not field.get("advanced")]
    assert len(shown) <= 14
    assert len(FIELDS) - len(shown) <= 45
    assert shown[0] == "MODEL_NAME"
    assert list(FIELDS)[: len(shown)] == shown


def test_labels_are_written_for_people() -> None:
    labels = [field["name"] for field in FIELDS.values()]
    assert len(set(labels)) == len(labels)
    assert not [label for label in labels if "_" in label or not label[0].isupper()]


def test_no_field_asks_for_a_secret() -> None:
    assert not [name for name in FIELDS if re.search("(TOKEN|KEY|SECRET|PASSWORD)$", name)]


@fields
def test_a_field_that_was_left_alone_changes_nothing(name: str) -> None:
    field = FIELDS[name]
    untouched = {text(field["default"]), "", *(["0"] if field["type"] == "number" else [])}
    expected = outcome({})
    for value in untouched:
        assert outcome({name: value}) == expected, value


@fields
def test_every_value_that_the_form_offers_is_accepted(name: str) -> None:
    field = FIELDS[name]
    offered = [option["value"] for option in field.get("options", [])]
    offered += [field[key] for key in ("min", "max") if key in field]
    entry = next(group[name] for group in FORM["groups"].values() if name in group)
    offered += [entry[key] for key in ("example",) if key in entry]
    for value in offered:
        outcome({name: text(value)})


@pytest.mark.parametrize("preset", [preset["name"] for preset in sources.presets()])
def test_the_untouched_form_leaves_a_preset_as_it_is(preset: str) -> None:
    chosen = {"MODEL_NAME": "org/model", "PRESET": preset}
    untouched = {name: text(field["default"]) for name, field in FIELDS.items()}
    assert outcome({**untouched, **chosen}) == outcome(chosen)


def test_selections_offer_what_vllm_has() -> None:
    """vLLM's parser does not check these names."""
    options = {name: {option["value"] for option in field.get("options", [])} for name, field in FIELDS.items()}
    assert options["QUANTIZATION"] - {""} <= set(QUANTIZATION_METHODS)
    assert options["TOOL_CALL_PARSER"] - {""} <= set(ToolParserManager.list_registered())


def test_the_pools_and_cuda_versions_are_those_of_the_documentation() -> None:
    config = LISTING["config"]
    pools = config["gpuIds"].split(",")
    assert len(pools) <= 3
    assert set(pools) <= POOLS_GB.keys()
    # The image's own version, and higher ones of the same series, which run it too.
    own = str(torch.version.cuda)
    assert config["allowedCudaVersions"][0] == own
    assert all(version.split(".")[0] == own.split(".")[0] for version in config["allowedCudaVersions"])
    assert TESTS["config"]["allowedCudaVersions"] == config["allowedCudaVersions"]


@presets
def test_a_preset_of_the_form_fits_the_disk_and_every_gpu(preset: Json) -> None:
    environ = {name: text(value) for name, value in preset["defaults"].items()}
    assert environ.keys() <= FIELDS.keys()
    arguments = outcome(environ)[1]
    limit = arguments["max_model_len"]
    # -1: as many as fit. There should be room for a conversation.
    tokens = 16_384 if limit == -1 else limit or preset["context"]
    needed = preset["weights_gb"] + tokens * preset["kib_per_token"] * 1024 / 1e9 + OVERHEAD_GB
    config = LISTING["config"]
    smallest = min(POOLS_GB[pool] for pool in config["gpuIds"].split(","))
    assert needed <= USABLE * smallest * config["gpuCount"]
    assert arguments["tensor_parallel_size"] <= config["gpuCount"]
    assert preset["weights_gb"] + max(POOLS_GB.values()) / 2 <= config["containerDiskInGb"]


def test_the_default_model_is_one_of_the_presets() -> None:
    assert FIELDS["MODEL_NAME"]["default"] == FORM["presets"][0]["defaults"]["MODEL_NAME"] == sources.DEFAULT_MODEL


def test_the_worker_accepts_the_jobs_of_the_hubs_tests() -> None:
    jsonschema.validate(TESTS, JOBS)
    jobs = {test["name"]: JobInput(test["input"]) for test in TESTS["tests"]}
    assert {"text", "image", "video", "stream"} <= jobs.keys()
    assert {job.call().path for job in jobs.values()} == {"/v1/chat/completions"}
    assert [name for name, job in jobs.items() if job.stream_form] == ["stream"]
    outcome({variable["key"]: variable["value"] for variable in TESTS["config"]["env"]})


def test_the_media_of_the_hubs_tests_can_be_decoded() -> None:
    media = {test["name"]: _media(test["input"]) for test in TESTS["tests"] if test["name"] in ("image", "video")}
    image, frames = asyncio.run(_decoded(media["image"], media["video"]))
    assert image.size == (64, 64)
    assert frames == 8


async def _decoded(image: bytes, video: bytes) -> tuple[Image, int]:
    """Return an image, and the number of frames of a video, as the worker's decoders read them."""
    decoders, account = Decoders(Limits(read({}))), Budget(1 << 30).account()
    async with decoders.capture(account) as capture:
        frames = await decoders.pool.in_thread(_frames, capture, video)
    picture = (await decoders.image(image, Look(), account)).image
    decoders.close()
    return picture, frames


def _frames(capture: Capture, video: bytes) -> int:
    capture.open(video)
    frames = 0
    while capture.read()[0]:
        frames += 1
    capture.close()
    return frames


def _media(job_input: Json) -> bytes:
    """Return the file in a job's first message."""
    part = job_input["messages"][0]["content"][0]
    return base64.b64decode(part[part["type"]]["url"].partition(",")[2])
