"""Writes the files that list the settings: RunPod's Hub listings, docs/configuration.md and .env.example.

They are generated from the worker's `Settings`, vLLM's parser and worker/settings/presets.yaml. With `--check`, the
files are compared and not written.
"""

import ast
import inspect
import itertools
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
CHECK = "--check" in sys.argv
# vLLM loads the descriptions of its flags only if the command line asks for help.
sys.argv.append("--help")

import torch
import vllm.config
from pydantic.fields import FieldInfo
from vllm.entrypoints.launchers.cli_args import make_arg_parser

from worker import __version__
from worker.engine import arguments
from worker.settings import Settings, flags, sources

Json = dict[str, Any]

FIRST = (
    "MODEL_NAME", "HF_TOKEN", "MAX_MODEL_LEN", "GPU_MEMORY_UTILIZATION", "MAX_NUM_SEQS", "QUANTIZATION", "DTYPE",
    "TENSOR_PARALLEL_SIZE", "IMAGE_LIMIT", "VIDEO_LIMIT", "TOOL_CALL_PARSER", "REASONING_PARSER",
)  # fmt: skip
"""The settings that most people use. The form hides the others under "advanced"."""
COMMON = (
    *FIRST, "MODEL_REVISION", "PRESET", "MAX_CONCURRENCY", "REQUEST_TIMEOUT", "WORKER_API_KEY", "LOG_FORMAT",
    "WORKER_MODE", "PORT",
)  # fmt: skip
SET_BY_RUNPOD = {"RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_POD_ID"}
ONLY_HTTP = {"PORT", "PORT_HEALTH", "METRICS_PORT", "WORKER_API_KEY", "MAX_REQUEST_BYTES", "MAX_QUEUE", "PLAYGROUND"}
OTHER = {
    "PRESET": (
        "auto",
        "Values for unset settings: `auto` (the model's preset), a name from worker/settings/presets.yaml, or `none`.",
    ),
    "VLLM_CONFIG_FILE": ("", "A YAML file in the format of `vllm serve --config`. Environment variables override it."),
}
OF_PRESETS = {name for preset in sources.presets() for name in preset["settings"]} | {"MODEL_NAME"}
GPUS = "ADA_24,AMPERE_24,ADA_48_PRO,AMPERE_48,AMPERE_80,ADA_80_PRO,HOPPER_141"
DISK_GB = 60
"""Enough for the image's caches and a model of 16 GB without a network volume."""


class Setting:
    """One variable: its source, type, default, meaning, options and limits."""

    def __init__(self, name: str, source: str, kind: str, default: Any, meaning: str, **bounds: Any) -> None:
        self.name, self.source, self.kind, self.default, self.meaning = name, source, kind, default, meaning
        self.options: list[str] = bounds.pop("options", [])
        self.bounds: Json = bounds

    @property
    def has_default(self) -> bool:
        """Whether the default is a value, not empty."""
        return self.default not in (None, "", (), {}, [])

    def field(self) -> Json:
        """Return the field of the Hub's form."""
        field: Json = {"name": self.name.replace("_", " ").capitalize(), "type": self.kind, "description": self.meaning}
        options = self.options
        if self.name == "MODEL_NAME":
            field["type"] = "huggingface"
        if self.name in OF_PRESETS:
            # A default in the form would be set in the environment and override the preset.
            if self.has_default:
                field["description"] += f" If empty: the preset's value, or {_text(self.default)} without one."
            if self.kind == "boolean":
                field["type"], options = "string", ["true", "false"]
            options = ["", *options] if options else []
        else:
            if self.kind == "boolean":
                field |= {"trueValue": "true", "falseValue": "false"}
            if self.has_default:
                field["default"] = self.default if self.kind != "string" else _text(self.default)
        if options:
            field["options"] = [{"label": option or "set by the preset", "value": option} for option in options]
        field |= self.bounds
        if self.name not in FIRST:
            field["advanced"] = True
        return {"key": self.name, "input": field}

    def row(self) -> str:
        """Return the row of the documentation's table."""
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
    fields = [
        Setting(
            name.upper(), "worker", _kind(field), field.default, docs[name], options=_options(field), **_bounds(field)
        )
        for name, field in Settings.model_fields.items()
        if name.upper() not in SET_BY_RUNPOD
    ]
    return fields + [Setting(name, "worker", "string", *described) for name, described in OTHER.items()]


def _docstrings() -> dict[str, str]:
    """Return the docstring below each field of the worker's settings, on one line."""
    source = ast.parse(textwrap.dedent(inspect.getsource(Settings)))
    (body,) = (node.body for node in source.body if isinstance(node, ast.ClassDef))
    pairs = itertools.pairwise(body)
    return {
        field.target.id: _one_line(text.value.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


def _kind(field: FieldInfo) -> str:
    if get_origin(field.annotation) is tuple:
        return "string"
    types = {*get_args(field.annotation), field.annotation}
    return "boolean" if bool in types else "number" if {int, float} & types else "string"


def _options(field: FieldInfo) -> list[str]:
    return [option for option in get_args(field.annotation) if isinstance(option, str)]


def _bounds(field: FieldInfo) -> Json:
    """Return a field's limits. The form cannot exclude a limit itself, as `gt` and `lt` do."""
    bounds: Json = {}
    for limit in field.metadata:
        for name, bound in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if (value := getattr(limit, name, None)) is not None:
                bounds[bound] = value
    return bounds


def _of_vllm() -> list[Setting]:
    parser = make_arg_parser(arguments._Parser())  # type: ignore[no-untyped-call]
    groups = {id(action): str(group.title) for group in parser._action_groups for action in group._group_actions}
    own = {*map(str.upper, Settings.model_fields)}
    listed = []
    for name, action in sorted(flags.settable(parser, arguments.SERVER_FLAGS).items()):
        if name in own:
            continue
        field = getattr(getattr(vllm.config, groups[id(action)], None), "__pydantic_fields__", {}).get(action.dest)
        is_number = action.type in (int, float) and not action.nargs and name != "TENSOR_PARALLEL_SIZE"
        kind = "boolean" if action.nargs == 0 else "number" if is_number else "string"
        default = "auto" if name == "TENSOR_PARALLEL_SIZE" else action.default
        more = _bounds(field) if is_number and isinstance(field, FieldInfo) else {}
        more["options"] = [str(choice) for choice in action.choices or []]
        listed.append(Setting(name, groups[id(action)], kind, default, _meaning(name, action.help), **more))
    return listed


def _meaning(name: str, description: str | None) -> str:
    """Return the first paragraph of vLLM's description, on one line."""
    text = _one_line((description or "").replace("%%", "%").strip().split("\n\n")[0])
    if name == "TENSOR_PARALLEL_SIZE":
        text += " `auto`: as many of the visible GPUs as the model's heads and layers can be divided among."
    return text or "The same as vLLM's flag of this name."


def _one_line(text: str) -> str:
    return " ".join(text.split())


def hub(every: list[Setting], balanced: bool = False) -> Json:
    """Return the listing for queue endpoints, or the one for load-balancing endpoints."""
    order = {name: place for place, name in enumerate(FIRST)}
    omitted = {"WORKER_MODE", "PORT", "VLLM_CONFIG_FILE", "BASE_PATH"} | (set() if balanced else ONLY_HTTP)
    offered = [setting for setting in every if setting.name not in omitted]
    offered.sort(key=lambda setting: order.get(setting.name, len(order)))
    fixed = [{"key": "WORKER_MODE", "value": "http"}, {"key": "PORT", "value": "80"}] if balanced else []
    presets = [
        {"name": preset["name"], "defaults": {"MODEL_NAME": preset["example"], **preset["settings"]}}
        for preset in sources.presets()
    ]
    return {
        "title": "vLLM worker" + (" over HTTP" if balanced else ""),
        "description": "Runs any model that vLLM supports, with text, images and video: OpenAI's routes, streaming, "
        "tools, structured output, metrics.",
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
            "env": [*fixed, *(setting.field() for setting in offered)],
        },
    }


def cuda_versions() -> list[str]:
    """Return the CUDA versions that a host's driver must support to run the base image: only the image's own."""
    return [str(torch.version.cuda)]


def hub_tests() -> Json:
    """Return the jobs that the Hub runs before it lists a release."""
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
        "Every setting is an environment variable, or a key of the YAML file that `VLLM_CONFIG_FILE` names. The\n"
        "environment overrides the file, and the file overrides the model's preset. `python handler.py --check` shows\n"
        "the values that a worker would use, and the source of each.\n"
    )
    text = head
    for source in dict.fromkeys(setting.source for setting in every):
        title = "The worker's own settings" if source == "worker" else f"vLLM: {source}"
        rows = "".join(setting.row() for setting in every if setting.source == source)
        text += f"\n## {title}\n\n| variable | type | default | meaning |\n| --- | --- | --- | --- |\n{rows}"
    return text


def env_example(every: list[Setting]) -> str:
    """Return .env.example."""
    by_name = {setting.name: setting for setting in every}
    lines = ["# Copy this file to .env and set what you need. docs/configuration.md lists all settings.", ""]
    for name in COMMON:
        lines += [*textwrap.wrap(by_name[name].meaning, 110, initial_indent="# ", subsequent_indent="# ")]
        default = by_name[name].default
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
    """Write the files that have changed, or with `--check` report them; return the exit code."""
    every = settings()
    files = {
        ".runpod/hub.json": _json(hub(every)),
        ".runpod/load-balancing/hub.json": _json(hub(every, balanced=True)),
        ".runpod/tests.json": _json(hub_tests()),
        "docs/configuration.md": documentation(every),
        ".env.example": env_example(every),
    }
    stale = [name for name, text in files.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if not CHECK:
        for name in stale:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(files[name])
    result = "not current; run make generate" if CHECK else "written"
    lines = "".join(f"{name}: {result}\n" for name in stale)
    sys.stdout.write(lines or f"{len(files)} files are current ({__version__})\n")
    return int(CHECK and bool(stale))


def _json(value: Json) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
