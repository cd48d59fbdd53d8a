"""What a start needs of the Hugging Face Hub: the model, and what settings name besides it. Pure: asks nobody."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.settings import flags
from worker.settings.settings import Settings

CONFIGURATION = ("config.json", "params.json")
TOKENIZER = ("tokenizer*", "vocab.*", "tekken.json", "spiece.model", "*.tiktoken")
ADAPTER = ("adapter_config.json",)
GGUF = ".gguf"

_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository of the Hub, or what is meant of it."""

    name: str
    variable: str
    """Which names it."""
    revision: str | None = None
    path: str | None = None
    """Its folder or its file that is meant, if not all of it."""
    needs: tuple[tuple[str, ...], ...] = (CONFIGURATION,)
    """Patterns in groups: of each group a file has to be there."""
    has_weights: bool = True

    @property
    def written(self) -> str:
        """How settings name it."""
        return f"{self.name}/{self.path}" if self.is_file else self.name

    @property
    def is_file(self) -> bool:
        """Whether one file is meant."""
        return self.path is not None and self.path.endswith(GGUF)


def model(settings: Settings, values: Mapping[str, str]) -> Repository:
    """Return the model, `ORG/NAME` or, with a file of it, `ORG/NAME/FILE.gguf`."""
    name, path = settings.model_name, settings.model_subfolder
    if name.endswith(GGUF) and name.count("/") > 1:
        organization, repository, path = name.split("/", 2)
        name = f"{organization}/{repository}"
    brings_tokenizer = values.get("TOKENIZER", name) == name
    needs = (CONFIGURATION, TOKENIZER) if brings_tokenizer else (CONFIGURATION,)
    return Repository(name, "MODEL_NAME", settings.model_revision, path, needs)


def wanted(settings: Settings, values: Mapping[str, str]) -> list[Repository]:
    """Return all that is needed, the model first."""
    return [model(settings, values), *besides(settings, values)]


def besides(settings: Settings, values: Mapping[str, str]) -> list[Repository]:
    """Return what is needed beside the model: a tokenizer, LoRA adapters, a draft model."""
    named = {one.name: one for one in _named(values) if _ID.fullmatch(one.name) and not Path(one.name).exists()}
    return [one for name, one in named.items() if name != settings.model_name]


def _named(values: Mapping[str, str]) -> Iterator[Repository]:
    yield Repository(
        values.get("TOKENIZER", ""),
        "TOKENIZER",
        values.get("TOKENIZER_REVISION"),
        needs=(TOKENIZER,),
        has_weights=False,
    )
    yield Repository(values.get("HF_CONFIG_PATH", ""), "HF_CONFIG_PATH", has_weights=False)
    yield Repository(values.get("SPEC_MODEL", ""), "SPEC_MODEL")
    draft = _object(values.get("SPECULATIVE_CONFIG", ""))
    yield Repository(str(draft.get("model", "")), "SPECULATIVE_CONFIG", draft.get("revision"))
    for path in _object(values.get("DEFAULT_MM_LORAS", "")).values():
        yield Repository(str(path), "DEFAULT_MM_LORAS", needs=(ADAPTER,))
    with suppress(ValueError):
        for item in flags.items(values.get("LORA_MODULES", "")):
            path = _object(item).get("path", "") if item.startswith("{") else item.partition("=")[2]
            yield Repository(str(path), "LORA_MODULES", needs=(ADAPTER,))


def _object(text: str) -> dict[str, Any]:
    """Return the JSON object that a value is; what is none is told by vLLM's parser."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
