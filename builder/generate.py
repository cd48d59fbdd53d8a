"""Writes what repeats the settings: the Hub's listings, docs/configuration.md and .env.example.

`--check` only compares. All of it comes from `worker.config.Settings`, vLLM's own
parser and worker/settings/presets.yaml.
"""

import ast
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CHECK = "--check" in sys.argv
# vLLM reads the descriptions of its settings only for somebody who asks for help.
sys.argv.append("--help")

import torch
import vllm.config
from pydantic.fields import FieldInfo
from vllm.entrypoints.launchers.cli_args import make_arg_parser

from worker import __version__
from worker.engine import arguments
from worker.settings import flags, sources
from worker.settings import settings as config

Json = dict[str, Any]

FIRST = (
    "MODEL_NAME", "HF_TOKEN", "MAX_MODEL_LEN", "GPU_MEMORY_UTILIZATION", "MAX_NUM_SEQS", "QUANTIZATION", "DTYPE",
    "TENSOR_PARALLEL_SIZE", "IMAGE_LIMIT", "VIDEO_LIMIT", "TOOL_CALL_PARSER", "REASONING_PARSER",
)  # fmt: skip
"""What most people set; the rest of the form is folded away."""
COMMON = (
    *FIRST, "MODEL_REVISION", "PRESET", "MAX_CONCURRENCY", "REQUEST_TIMEOUT", "WORKER_API_KEY", "LOG_FORMAT",
    "WORKER_MODE", "PORT",
)  # fmt: skip
PLATFORMS = {"RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_POD_ID", "WORKER_JOB_LOOP"}
"""Settings that RunPod makes itself, or that are for the worker's own tests."""
ONLY_HTTP = {"PORT", "PORT_HEALTH", "METRICS_PORT", "WORKER_API_KEY", "MAX_REQUEST_BYTES", "MAX_QUEUE", "PLAYGROUND"}
OTHER = {
    "PRESET": (
        "auto",
        "Which of worker/settings/presets.yaml fills in what is not set: the model's own, or `none`.",
    ),
    "VLLM_CONFIG_FILE": ("", "A YAML file as for `vllm serve --config`; the environment comes before it."),
}
OF_PRESETS = {name for preset in sources.presets() for name in preset["settings"]} | {"MODEL_NAME"}
GPUS = "ADA_24,AMPERE_24,ADA_48_PRO,AMPERE_48,AMPERE_80,ADA_80_PRO,HOPPER_141"
DISK_GB = 60
"""For the image's caches and a model of some 16 GB, where no network volume holds it."""


class Setting:
    """One variable: where it comes from, what it takes, and what it means."""

    def __init__(self, name: str, source: str, kind: str, default: Any, meaning: str, **bounds: Any) -> None:
        self.name, self.source, self.kind, self.default, self.meaning = name, source, kind, default, meaning
        self.options: list[str] = bounds.pop("options", [])
        self.bounds: Json = bounds

    @property
    def has_default(self) -> bool:
        """Whether there is a value that counts when nobody says one."""
        return self.default not in (None, "", (), {}, [])

    def field(self) -> Json:
        """Return its field of the Hub's form."""
        told: Json = {"name": self.name.replace("_", " ").capitalize(), "type": self.kind, "description": self.meaning}
        options = self.options
        if self.name == "MODEL_NAME":
            told["type"] = "huggingface"
        if self.name in OF_PRESETS:
            # What the form fills in counts as said, and a preset fills in only what is not.
            if self.has_default:
                told["description"] += f" Left empty: the preset's, or else {_text(self.default)}."
            if self.kind == "boolean":
                told["type"], options = "string", ["true", "false"]
            options = ["", *options] if options else []
        else:
            if self.kind == "boolean":
                told |= {"trueValue": "true", "falseValue": "false"}
            if self.has_default:
                told["default"] = self.default if self.kind != "string" else _text(self.default)
        if options:
            told["options"] = [{"label": option or "by the preset", "value": option} for option in options]
        told |= self.bounds
        if self.name not in FIRST:
            told["advanced"] = True
        return {"key": self.name, "input": told}

    def row(self) -> str:
        """Return its row of the documentation's table."""
        kind = f"one of {', '.join(self.options)}" if self.options else self.kind
        bounds = "".join(f", {name} {value:g}" for name, value in self.bounds.items())
        default = f"`{_text(self.default)}`" if self.has_default else ""
        cells = (f"`{self.name}`", kind + bounds, default, self.meaning)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def settings() -> list[Setting]:
    """Return every variable, the worker's own first."""
    return [*_own(), *_of_vllm()]


def _own() -> list[Setting]:
    docs = _docstrings()
    found = []
    for name, field in config.Settings.model_fields.items():
        if name.upper() in PLATFORMS:
            continue
        more = {**_bounds(field), "options": _options(field)}
        found.append(Setting(name.upper(), "worker", _kind(field), field.default, docs[name], **more))
    return found + [Setting(name, "worker", "string", *told) for name, told in OTHER.items()]


def _docstrings() -> dict[str, str]:
    """Return the text below each field of the worker's settings."""
    source = ast.parse(textwrap.dedent(inspect.getsource(config.Settings)))
    (body,) = (node.body for node in source.body if isinstance(node, ast.ClassDef))
    pairs = itertools.pairwise(body)
    return {
        one.target.id: text.value.value
        for one, text in pairs
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def _kind(field: FieldInfo) -> str:
    if get_origin(field.annotation) is tuple:
        return "string"
    named = {*get_args(field.annotation), field.annotation}
    return "boolean" if bool in named else "number" if {int, float} & named else "string"


def _options(field: FieldInfo) -> list[str]:
    return [str(one) for one in get_args(field.annotation) if isinstance(one, str)]


def _bounds(field: FieldInfo) -> Json:
    """Return a field's limits; what must be above a limit may, in a form, not be it, which no form can say."""
    found: Json = {}
    for limit in field.metadata:
        for name, bound in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if (value := getattr(limit, name, None)) is not None:
                found[bound] = value
    return found


def _of_vllm() -> list[Setting]:
    parser = make_arg_parser(arguments._Parser())  # type: ignore[no-untyped-call]
    groups = {id(action): str(group.title) for group in parser._action_groups for action in group._group_actions}
    mine = {*map(str.upper, config.Settings.model_fields)}
    found = []
    for name, action in sorted(flags.settable(parser, arguments.SERVER_FLAGS).items()):
        if name in mine:
            continue
        field = getattr(getattr(vllm.config, groups[id(action)], None), "__pydantic_fields__", {}).get(action.dest)
        is_number = action.type in (int, float) and not action.nargs and name != "TENSOR_PARALLEL_SIZE"
        kind = "boolean" if action.nargs == 0 else "number" if is_number else "string"
        default = "auto" if name == "TENSOR_PARALLEL_SIZE" else action.default
        more = _bounds(field) if is_number and isinstance(field, FieldInfo) else {}
        more["options"] = [str(choice) for choice in action.choices or []]
        found.append(Setting(name, groups[id(action)], kind, default, _meaning(name, action.help), **more))
    return found


def _meaning(name: str, told: str | None) -> str:
    """Return the first paragraph of vLLM's own description, on one line."""
    first = (told or "").replace("%%", "%").strip().split("\n\n")[0]
    text = re.sub(r"\s+", " ", first).strip()
    if name == "TENSOR_PARALLEL_SIZE":
        text += " `auto`: as many of the visible GPUs as the model's heads and layers can be divided among."
    return text or "As vLLM's flag of the same name."


def hub(kind: str, every: list[Setting]) -> Json:
    """Return a listing: a form for the queue, or for a load balancer."""
    balanced = kind == "LB"
    order = {name: place for place, name in enumerate(FIRST)}
    offered = [one for one in every if balanced or one.name not in ONLY_HTTP]
    offered = [one for one in offered if one.name not in ("WORKER_MODE", "PORT", "VLLM_CONFIG_FILE", "BASE_PATH")]
    offered.sort(key=lambda one: order.get(one.name, len(order)))
    fixed = [{"key": "WORKER_MODE", "value": "http"}, {"key": "PORT", "value": "80"}] if balanced else []
    presets = [
        {"name": preset["name"], "defaults": {"MODEL_NAME": preset["example"], **preset["settings"]}}
        for preset in sources.presets()
    ]
    return {
        "title": "vLLM worker" + (" over HTTP" if balanced else ""),
        "description": "Any model that vLLM runs, text, images and video, in the worker's own process: OpenAI's "
        "routes, streaming, tools, structured output, metrics.",
        "type": "serverless",
        "category": "language",
        "iconUrl": "https://raw.githubusercontent.com/vllm-project/vllm/main/docs/assets/logos/vllm-logo-text-light.png",
        "config": {
            "runsOn": "GPU",
            **({"endpointType": "LB"} if balanced else {}),
            "containerDiskInGb": DISK_GB,
            "gpuCount": 1,
            "gpuIds": GPUS,
            "allowedCudaVersions": cuda_versions(),
            "presets": presets,
            "env": [*fixed, *(one.field() for one in offered)],
        },
    }


def cuda_versions() -> list[str]:
    """Return the CUDA versions of drivers that the base image runs with: its own."""
    return [str(torch.version.cuda)]


def hub_tests() -> Json:
    """Return what the Hub tries before it lists a release."""
    from tests.support.media import image_url

    question = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    picture = {"type": "image_url", "image_url": {"url": image_url("red")}}
    about = {"role": "user", "content": [picture, {"type": "text", "text": "What colour is this? Answer in one word."}]}
    route = "/v1/chat/completions"
    inputs: Mapping[str, Json] = {
        "text": {"messages": [question], "max_tokens": 10},
        "openai_route": {"openai_route": route, "openai_input": {"messages": [question], "max_tokens": 10}},
        "image": {"messages": [about], "max_tokens": 10},
        "streaming": {
            "openai_route": route,
            "openai_input": {"messages": [question], "max_tokens": 10, "stream": True},
        },
    }
    return {
        "tests": [{"name": name, "input": job_input, "timeout": 600_000} for name, job_input in inputs.items()],
        "config": {
            "gpuTypeId": "NVIDIA GeForce RTX 4090",
            "gpuCount": 1,
            "env": [
                {"key": "MODEL_NAME", "value": "Qwen/Qwen2-VL-2B-Instruct"},
                {"key": "MAX_MODEL_LEN", "value": "8192"},
            ],
            "allowedCudaVersions": cuda_versions(),
        },
    }


def documentation(every: list[Setting]) -> str:
    """Return docs/configuration.md."""
    head = (
        "# Configuration\n\nGenerated by `make generate` from the worker's settings and the parser of vLLM "
        f"{vllm.__version__}; do not edit.\n\n"
        "Every setting is an environment variable, or a key of the YAML file that `VLLM_CONFIG_FILE` names. What is\n"
        "said in the environment comes first, then the file, then the model's preset. `python handler.py --check`\n"
        "tells what a worker would run with, and where each value comes from.\n"
    )
    text = head
    for source in dict.fromkeys(one.source for one in every):
        title = "The worker's own" if source == "worker" else f"vLLM: {source}"
        rows = "".join(one.row() for one in every if one.source == source)
        text += f"\n## {title}\n\n| variable | takes | default | meaning |\n| --- | --- | --- | --- |\n{rows}"
    return text


def env_example(every: list[Setting]) -> str:
    """Return .env.example."""
    named = {one.name: one for one in every}
    lines = ["# Copy to .env and set what you need; docs/configuration.md has every setting.", ""]
    for name in COMMON:
        lines += [*textwrap.wrap(named[name].meaning, 110, initial_indent="# ", subsequent_indent="# ")]
        default = named[name].default
        lines += [f"# {name}={'' if default in (None, (), {}) else _text(default)}", ""]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def main() -> int:
    """Write the files, or tell which are not what they would be."""
    every = settings()
    files = {
        ".runpod/hub.json": _json(hub("queue", every)),
        ".runpod/load-balancing/hub.json": _json(hub("LB", every)),
        ".runpod/tests.json": _json(hub_tests()),
        "docs/configuration.md": documentation(every),
        ".env.example": env_example(every),
    }
    stale = [name for name, text in files.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if not CHECK:
        for name in stale:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(files[name])
    verb = "not current; run make generate" if CHECK else "written"
    told = "".join(f"{name}: {verb}\n" for name in stale)
    sys.stdout.write(told or f"{len(files)} files are current ({__version__})\n")
    return int(CHECK and bool(stale))


def _json(value: Json) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
