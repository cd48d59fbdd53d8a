"""Collects variables from the environment, the configuration file and the model's preset into one mapping.

The first source that sets a variable wins. Everything later reads the result as if all of it were in the environment.
"""

import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from worker import redaction
from worker.cluster.role import NODES
from worker.errors import ConfigurationError
from worker.settings import flags, legacy

ENVIRONMENT = "environment"
PRESET = "preset "
"""The beginning of the source of a variable that a preset has set. The preset's name follows."""
DEFAULT_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
ONLY_ENVIRONMENT = {"VLLM_CONFIG_FILE": "", "PRESET": "none"}
"""Variables that turn off the sources other than the environment."""
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Reads the presets in 3 ms instead of 20, where PyYAML has its C library."""
PRESETS = Path(__file__).with_name("presets.yaml")
OLD_MEDIA_LIMITS = re.compile(r"\w+=\d+(,\w+=\d+)*")
"""The former format of `LIMIT_MM_PER_PROMPT`, which is JSON now."""
IN_FILES_ONLY = frozenset({"MODEL"})
"""Aliases that count in a file only: in an environment, so common a name may belong to another program."""
CLUSTER_VARIABLES = frozenset({"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"})
"""Variables that RunPod sets on every machine of a cluster. They count only if there are several machines."""
FOREIGN = re.compile("(VLLM|HF|RUNPOD|CUDA|NVIDIA|NCCL|GLOO|PYTORCH|OTEL|XDG|LC|SSL)_|TORCH|PYTHON")
"""Variables with these prefixes belong to other programs and are never taken for misspelt settings."""


@dataclass(frozen=True, slots=True)
class Variables:
    """All variables, the source of each, and warnings about them."""

    values: Mapping[str, str] = field(repr=False)
    origins: Mapping[str, str]
    """The source of each variable: `environment`, `default`, a file name, an alias, or `preset NAME`."""
    warnings: tuple[str, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets in the values, for `redaction.remover`."""
        return redaction.secrets_in(self.values)

    @property
    def chosen(self) -> dict[str, str]:
        """The variables that the user has set, or the platform: those of a preset do not count."""
        return {name: value for name, value in self.values.items() if not self.is_from_preset(name)}

    def is_from_preset(self, variable: str) -> bool:
        """Return whether a preset has set the variable."""
        return self.origins.get(variable, "").startswith(PRESET)

    def described(self, variable: str) -> str:
        """Return the variable's name, with its source unless that is the environment."""
        origin = self.origins.get(variable, ENVIRONMENT)
        return variable if origin == ENVIRONMENT else f"{variable} ({origin})"


def collect(environ: Mapping[str, str]) -> Variables:
    """Collect the variables of all sources. Those that `legacy.is_unset` describes count as unset.

    Raises:
        ConfigurationError: the file cannot be read, or the preset does not exist.
    """
    values: dict[str, str] = {}
    origins: dict[str, str] = {}
    warnings: list[str] = []

    def add(more: Mapping[str, str], origin: str) -> None:
        for name, value in more.items():
            if name not in values:
                values[name], origins[name] = value, origin

    def add_source(every: Mapping[str, str], origin: str) -> None:
        source = {name: value for name, value in every.items() if not legacy.is_unset(name, value)}
        add(source, origin)
        # An old name in the environment wins over a new name in a file, so each source is renamed as a whole.
        for old_name, more in _renamed(source, warnings):
            add(more, old_name if origin == ENVIRONMENT else origin)

    add_source({name: value for name, value in environ.items() if name not in IN_FILES_ONLY}, ENVIRONMENT)
    if path := values.get("VLLM_CONFIG_FILE"):
        add_source(_read_file(path), Path(redaction.public(path)).name)
    if all(values.get(name, "1").strip() == "1" for name in NODES):
        values = {name: value for name, value in values.items() if name not in CLUSTER_VARIABLES}
    add({"MODEL_NAME": DEFAULT_MODEL}, "default")
    if (preset := _preset(values)) is not None:
        # Without chunked prefill, vLLM needs batches as long as the context, which is its default then.
        is_whole = flags.boolean(values, "ENABLE_CHUNKED_PREFILL") is False
        omitted = ("MAX_NUM_BATCHED_TOKENS",) if is_whole else ()
        kept = {name: value for name, value in preset["settings"].items() if name not in omitted}
        add(kept, f"{PRESET}{preset['name']}")
    if OLD_MEDIA_LIMITS.fullmatch(limits := values.get("LIMIT_MM_PER_PROMPT", "")):
        pairs = (pair.split("=") for pair in limits.split(","))
        values["LIMIT_MM_PER_PROMPT"] = json.dumps({kind: int(limit) for kind, limit in pairs})
    return Variables(values, origins, tuple(warnings))


def _renamed(source: Mapping[str, str], warnings: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each old name in a source with the variables that replace it; add a warning where the user should act."""
    warnings += [f"{name} has no effect: {why}." for name, why in legacy.without_effect().items() if name in source]
    for alias, name in legacy.aliases().items():
        if alias in source and source.get(name, source[alias]) != source[alias]:
            warnings.append(f"{alias} has no effect: {name} is set.")
        elif alias in source:
            yield alias, {name: source[alias]}
    for old, translation in legacy.translations(source):
        names, is_one = ", ".join(old), len(old) == 1
        try:
            new = translation(old)
            if taken := ", ".join(new.keys() & source.keys()):
                raise ValueError(f"{taken} is set")
        except ValueError as error:
            warnings.append(f"{names} {'has' if is_one else 'have'} no effect: {error}.")
            continue
        settings = ", ".join(f"{name}={redaction.public(text, name)}" for name, text in new.items())
        warnings.append(
            f"{names} {'is an old name' if is_one else 'are old names'}. The worker uses {settings} instead."
        )
        yield names, new


@cache
def presets() -> list[dict[str, Any]]:
    """Return all presets. Nobody changes them. Each has a `name`, the `models` that it is for, and its `settings`."""
    loaded: list[dict[str, Any]] = yaml.load(PRESETS.read_text(), Loader=FAST_LOADER)  # noqa: S506 - it is safe
    return [
        {**preset, "settings": {name: _text(value) for name, value in preset["settings"].items()}} for preset in loaded
    ]


def _preset(values: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the preset that `PRESET` names, or the first one for the model; None without one."""
    chosen = values.get("PRESET", "auto").strip().lower()
    if chosen == "none":
        return None
    by_name = {preset["name"]: preset for preset in presets()}
    if chosen == "auto":
        model = values["MODEL_NAME"].rstrip("/").lower()
        matching = (preset for preset in by_name.values() if any(_matches(model, each) for each in preset["models"]))
        return next(matching, None)
    if chosen not in by_name:
        names = ", ".join(by_name)
        raise ConfigurationError(
            f"PRESET={redaction.public(chosen)!r}: no such preset; expected auto, none, or one of {names}"
        )
    return by_name[chosen]


def _matches(model: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(model if "/" in pattern else model.rpartition("/")[2], pattern)


def _read_file(path: str) -> dict[str, str]:
    setting = f"VLLM_CONFIG_FILE={redaction.public(path)!r}"
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigurationError(f"{setting}: {error.strerror}; expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigurationError(f"{setting}: invalid YAML{where}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{setting}: expected keys and values, such as 'max-model-len: 8192'")
    return {str(key).replace("-", "_").upper(): _text(value) for key, value in content.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def near_misses(variables: Variables, known: Iterable[str]) -> list[str]:
    """Return a sentence for every variable that looks like a misspelt setting."""
    known = {name for name in known if len(name) > 3}
    ignored = {*known, *legacy.TRANSLATED, *legacy.without_effect(), *legacy.aliases()}
    unknown = (name for name in variables.values if name.isupper() and name not in ignored and not FOREIGN.match(name))
    return [
        f"{variables.described(name)} is not a setting. Did you mean {match}?"
        for name in unknown
        for match in difflib.get_close_matches(name, known, 1, 0.84)
    ]
