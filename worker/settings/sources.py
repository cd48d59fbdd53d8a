"""Where settings come from: the environment, then a file, then what a preset knows of the model.

All of them become one mapping of variables to text, as if everything had been said in the environment.
"""

import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from worker.errors import ConfigurationError
from worker.settings import legacy

ENVIRONMENT = "environment"
DEFAULT_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
PRESETS = Path(__file__).with_name("presets.yaml")
ALIASES = {
    "TOKENIZER_NAME": "TOKENIZER",
    "CUSTOM_CHAT_TEMPLATE": "CHAT_TEMPLATE",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "SERVED_MODEL_NAME",
    "GPU_MEMORY_UTIL": "GPU_MEMORY_UTILIZATION",
    "MAX_BATCHED_TOKENS": "MAX_NUM_BATCHED_TOKENS",
    "REVISION": "MODEL_REVISION",
    "MODEL": "MODEL_NAME",
    "VLLM_API_KEY": "WORKER_API_KEY",
    "API_KEY": "WORKER_API_KEY",
}
"""Names of the existing worker images, or of vLLM, and ours."""
OLD_LIMITS = re.compile(r"\w+=\d+(,\w+=\d+)*")
"""How vLLM once had `LIMIT_MM_PER_PROMPT`, which is JSON now."""
IN_FILES_ONLY = frozenset({"MODEL"})
"""Aliases that are too common a word to count in an environment."""
OF_A_CLUSTER = frozenset({"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"})
"""Variables that RunPod sets on every machine of a cluster; they are vLLM's flags only where NNODES is said."""
OTHERS = (
    "VLLM_",
    "HF_",
    "RUNPOD_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "TORCH",
    "PYTORCH_",
    "PYTHON",
    "OTEL_",
    "XDG_",
    "LC_",
    "SSL_",
)
"""How variables begin that are somebody else's."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What has been said, by whom, and what is to be said about it."""

    values: Mapping[str, str] = field(repr=False)
    origins: Mapping[str, str]
    """Of each value: `environment`, a file's name, `preset NAME`."""
    warnings: tuple[str, ...] = ()

    def told(self, variable: str) -> str:
        """Return a variable and where it comes from, for the beginning of a sentence."""
        origin = self.origins.get(variable, ENVIRONMENT)
        return variable if origin == ENVIRONMENT else f"{variable} ({origin})"


def gather(environ: Mapping[str, str]) -> Sources:
    """Bring together what is said; who comes first counts. Empty variables count as unset.

    Raises:
        ConfigurationError: the file or the preset is wrong.
    """
    values: dict[str, str] = {}
    origins: dict[str, str] = {}
    warnings: list[str] = []

    def add(more: Mapping[str, str], origin: str) -> None:
        for name, value in more.items():
            if name not in values:
                values[name], origins[name] = value, origin

    def take(said: dict[str, str], origin: str) -> None:
        renamed = list(_renamed(said, warnings))
        add(said, origin)
        for name, more in renamed:
            add(more, name if origin == ENVIRONMENT else origin)

    others = IN_FILES_ONLY if environ.get("NNODES") else IN_FILES_ONLY | OF_A_CLUSTER
    take({name: value for name, value in environ.items() if value.strip() and name not in others}, ENVIRONMENT)
    if path := values.get("VLLM_CONFIG_FILE"):
        take(_read(Path(path)), Path(path).name)
    add({"MODEL_NAME": DEFAULT_MODEL}, "default")
    if (preset := _preset(values)) is not None:
        add(preset["settings"], f"preset {preset['name']}")
    return Sources(values, origins, tuple(warnings))


def _renamed(said: dict[str, str], warnings: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what one source says by names of its own, in ours, each with the name it was said by.

    A source is taken as a whole, so that an old name in the environment comes before a new one in a file.
    """
    warnings += [f"{name} has no effect: {why}." for name, why in legacy.WITHOUT_EFFECT.items() if name in said]
    if OLD_LIMITS.fullmatch(limits := said.get("LIMIT_MM_PER_PROMPT", "")):
        pairs = (one.split("=") for one in limits.split(","))
        said["LIMIT_MM_PER_PROMPT"] = json.dumps({kind: int(limit) for kind, limit in pairs})
    for alias, name in ALIASES.items():
        if alias in said and name not in said:
            yield alias, {name: said[alias]}
    for name in [name for name in said if name in legacy.TRANSLATED]:
        became = _translated(name, said[name], warnings)
        yield name, {new: value for new, value in became.items() if new not in said}


def presets() -> list[dict[str, Any]]:
    """Return every preset: its `name`, the `models` it is for, and its `settings`."""
    loaded: list[dict[str, Any]] = yaml.safe_load(PRESETS.read_text())
    return [{**one, "settings": {name: _text(value) for name, value in one["settings"].items()}} for one in loaded]


def _preset(values: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the preset that `PRESET` names, or else the first one for the model, if there is one."""
    chosen = values.get("PRESET", "auto").strip().lower()
    if chosen == "none":
        return None
    known = presets()
    if chosen == "auto":
        name = values["MODEL_NAME"].rstrip("/").lower()
        return next((one for one in known if any(_is_for(name, pattern) for pattern in one["models"])), None)
    for one in known:
        if one["name"] == chosen:
            return one
    names = ", ".join(one["name"] for one in known)
    raise ConfigurationError(f"PRESET={chosen!r}: no such preset; expected auto, none, or one of {names}")


def _is_for(model: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(model if "/" in pattern else model.rpartition("/")[2], pattern)


def _read(path: Path) -> dict[str, str]:
    try:
        read = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"VLLM_CONFIG_FILE={str(path)!r}: {error.strerror}; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"VLLM_CONFIG_FILE={str(path)!r}: no valid YAML{where}") from None
    if not isinstance(read, dict):
        raise ConfigurationError(
            f"VLLM_CONFIG_FILE={str(path)!r}: expected keys and values, such as 'max-model-len: 8192'"
        )
    return {str(key).replace("-", "_").upper(): _text(value) for key, value in read.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _translated(name: str, value: str, warnings: list[str]) -> dict[str, str]:
    try:
        became = legacy.TRANSLATED[name](value)
    except ValueError:
        became = {}
    if became:
        said = ", ".join(f"{new}={text}" for new, text in became.items())
        warnings.append(f"{name} has another name now: it is taken as {said}.")
    else:
        warnings.append(f"{name}={value!r} has no effect: it cannot be translated for this vLLM.")
    return became


def near_misses(sources: Sources, known: Iterable[str]) -> list[str]:
    """Return a sentence for every variable that is not known but nearly so."""
    names = {name for name in known if len(name) > 3}
    said = [name for name in sources.values if name not in names and not name.startswith(OTHERS) and name.isupper()]
    said = [name for name in said if name not in legacy.TRANSLATED and name not in legacy.WITHOUT_EFFECT]
    probable = ((name, difflib.get_close_matches(name, names, 1, 0.84)) for name in said if name not in ALIASES)
    return [f"{sources.told(name)} is no setting. Is {close[0]} meant?" for name, close in probable if close]
