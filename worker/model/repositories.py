"""The Hugging Face repositories that the settings name, and the files that each must have. Makes no requests."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from worker.settings import Settings

GGUF = ".gguf"
FORMATS = (".safetensors", ".bin", ".pt", GGUF)
"""Formats of weights. vLLM loads the first one that a folder has."""
CONFIGURATION = ("config.json", "params.json")
TOKENIZER = ("tokenizer*", "vocab.*", "tekken.json", "spiece.model", "*.tiktoken")
ADAPTER = ("adapter_config.json",)
NO_GGUF = (
    "vLLM loads GGUF files only with a plugin, which is not installed. Choose a repository with safetensors; AWQ, GPTQ "
    "and FP8 models are small too."
)

_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the Hugging Face Hub, or the part of it that is needed."""

    name: str
    """ORG/NAME."""
    variable: str = ""
    """The variable that names it. Empty: requests name it as a LoRA adapter."""
    revision: str | None = None
    path: str | None = None
    """The folder or the GGUF file that is needed. None: the whole repository."""
    required: tuple[tuple[str, ...], ...] = (CONFIGURATION,)
    """Groups of file name patterns. A complete snapshot has a file of each group."""
    has_weights: bool = True
    files: tuple[str, ...] | None = None
    """The only files to download. None: all that vLLM may need."""
    max_bytes: int | None = None
    """The size above which these files are not downloaded."""

    @property
    def value(self) -> str:
        """The name as the variable has it: with the GGUF file, if only that is needed."""
        return f"{self.name}/{self.path}" if self.is_file else self.name

    @property
    def label(self) -> str:
        """How messages refer to it."""
        return f"{self.variable}={self.value!r}" if self.variable else f"The LoRA adapter {self.name!r}"

    @property
    def is_file(self) -> bool:
        """Whether only one GGUF file is needed."""
        return self.path is not None and self.path.endswith(GGUF)


def model(settings: Settings) -> Repository:
    """Return the model's repository. MODEL_NAME is ORG/NAME or ORG/NAME/FILE.gguf."""
    name, path = settings.model_name, settings.model_subfolder
    if name.endswith(GGUF) and name.count("/") > 1:
        organization, repository, path = name.split("/", 2)
        name = f"{organization}/{repository}"
    has_tokenizer = settings.libraries.tokenizer in (None, name)
    required = (CONFIGURATION, TOKENIZER) if has_tokenizer else (CONFIGURATION,)
    return Repository(name, "MODEL_NAME", settings.model_revision, path, required)


def others(settings: Settings) -> list[Repository]:
    """Return the repositories needed besides the model: tokenizer, configuration, draft models and LoRA adapters."""
    libraries, tokenizer = settings.libraries, settings.libraries.tokenizer or ""
    repositories = [
        Repository(tokenizer, "TOKENIZER", libraries.tokenizer_revision, required=(TOKENIZER,), has_weights=False),
        Repository(libraries.hf_config_path or "", "HF_CONFIG_PATH", has_weights=False),
        *(Repository(name, variable, revision) for variable, name, revision in libraries.draft_models),
        *(Repository(name, variable, required=(ADAPTER,)) for variable, name in libraries.adapters),
    ]
    by_name = {each.name: each for each in repositories if _ID.fullmatch(each.name) and not Path(each.name).exists()}
    return [repository for name, repository in by_name.items() if name != settings.model_name]


def weight_files(names: Iterable[str]) -> list[str]:
    """Return the names of the files that vLLM loads weights from if a folder has files with these `names`.

    vLLM loads one format, and of the two copies in Mistral's repositories the one named `consolidated`
    (vllm/model_executor/model_loader/default_loader.py).
    """
    names = sorted(names)
    files = next(filter(None, ([name for name in names if name.endswith(suffix)] for suffix in FORMATS)), [])
    return [name for name in files if name.startswith("consolidated")] or files
