"""Errors about LoRA adapters that requests name, and checks that an adapter fits the model."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from worker.errors import JobError, Json, UnavailableError
from worker.model import snapshots
from worker.model.repositories import ADAPTER

CONFIG, WEIGHTS = ADAPTER[0], "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1_000_000
NO_WEIGHTS_BYTES = 2_000_000_000
"""The largest adapter of a model whose weights are no files."""
FLOATS = frozenset(("BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"))

_SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/")
_VARIANT = re.compile(r"[-_.](awq|gptq|fp8|nvfp4|mxfp4|int[48]|w\d+a\d+|[48]-?bit|bnb|unsloth|quantized)(?=[-_.]|$).*")
"""The end of a model's name that only says how its weights are stored."""
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_MODULE = re.compile(r"(?:^|\.)((?:layers|blocks)\.(\d+)\.(.+))")

Shape = tuple[int, ...]


class AdapterError(JobError, status=400, type="BadRequestError"):
    """An adapter that does not fit the model, or is damaged."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model")


class AdapterNotAllowedError(AdapterError, status=403, type="PermissionDeniedError"):
    """LORA_ALLOW does not match the adapter. The message does not reveal whether it exists."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name[:100]!r} is not the served model, and LORA_ALLOW does not allow it as a LoRA adapter. /v1/models "
            "lists what is served."
        )


class AdapterNotFoundError(AdapterError, status=404, type="NotFoundError"):
    """There is no such adapter, or the worker has no access to it."""

    @classmethod
    def of(cls, name: str) -> Self:
        """Return the error for a name that is neither in ADAPTER_FOLDER nor on the Hub."""
        return cls(
            f"There is no model and no LoRA adapter {name[:100]!r}. Use ORG/NAME of the Hugging Face Hub, or the name "
            "of a folder in ADAPTER_FOLDER. /v1/models lists what is served."
        )


class AdapterUnavailableError(UnavailableError):
    """The adapter cannot be downloaded or read now."""


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter has to fit."""

    names: frozenset[str]
    """The names of the served model, as `base_name` returns them."""
    shapes: Mapping[str, frozenset[Shape]]
    """The shapes of the model's matrices, by their names from `layers.` on."""
    max_rank: int
    max_bytes: int

    @classmethod
    def of(cls, folder: Path, names: Iterable[str], max_rank: int) -> "Base":
        """Read the headers of the weights in the model's `folder`. `names` are those by which the model is known."""
        files = snapshots.weight_paths(folder) if folder.is_dir() else []
        shapes: dict[str, set[Shape]] = {}
        for file in files:
            for name, shape, dtype in _tensors(file) if file.suffix == ".safetensors" else ():
                match = _MODULE.search(name.removesuffix(".weight"))
                # The shapes of packed weights are others.
                if match and name.endswith(".weight") and dtype in FLOATS:
                    shapes.setdefault(match[1], set()).add(shape)
        known = frozenset(map(base_name, names))
        size = sum(file.stat().st_size for file in files)
        return cls(known, {name: frozenset(each) for name, each in shapes.items()}, max_rank, size or NO_WEIGHTS_BYTES)


def base_name(name: str) -> str:
    """Return a model's name without organization, folder and quantization, in lower case.

    An adapter for `Qwen/Qwen3-8B` fits `RedHatAI/Qwen3-8B-FP8-dynamic`, and the folder `/models/Qwen3-8B`.
    """
    if match := _SNAPSHOT.search(name):
        name = match[1]
    return _VARIANT.sub("", re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower())


def check_size(file: Path, name: str, max_bytes: int) -> None:
    """Check the size of an adapter's configuration, or of its weights, which may have `max_bytes`."""
    is_config = file.name == CONFIG
    most = MAX_CONFIG_BYTES if is_config else max_bytes
    if (size := file.stat().st_size) > most:
        advice = "" if is_config else " An adapter may not be larger than the model's own weights."
        raise AdapterError(
            f"The LoRA adapter {name!r}: {file.name} has {size} bytes; at most {most} are accepted.{advice}"
        )


@contextmanager
def disk_errors(name: str, action: str) -> Iterator[None]:
    """Raise `AdapterUnavailableError` for errors of the disk in the block. `action` says what the block does."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise AdapterUnavailableError(
            f"The worker cannot {action} the files of the LoRA adapter {name!r}: {reason}. Try again later."
        ) from error


def rejected(name: str, message: str, folder: str) -> AdapterError:
    """Return the error for an adapter that vLLM does not load, from the `message` of its exception."""
    reason = message.partition("failed: ")[2] or message
    return AdapterError(f"vLLM cannot load the LoRA adapter {name!r}: {reason.replace(folder, 'its folder')[:500]}")


def check(folder: Path, name: str, base: Base) -> None:
    """Check that an adapter is a LoRA in safetensors for the model `base`.

    Raises:
        AdapterError: it is not.
        AdapterUnavailableError: its files cannot be read.
    """
    try:
        with disk_errors(name, "read"):
            for file in (CONFIG, WEIGHTS):
                check_size(folder / file, name, base.max_bytes)
            config: Any = json.loads((folder / CONFIG).read_bytes())
            _check_config(config, name, base)
            for tensor, shape, _ in _tensors(folder / WEIGHTS):
                _check_shape(tensor, shape, name, base)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"The LoRA adapter {name!r}: {CONFIG} is damaged ({type(error).__name__}).") from None
    except SafetensorError:
        raise AdapterError(f"The LoRA adapter {name!r}: {WEIGHTS} is damaged. Upload it again.") from None


def _check_config(config: Json, name: str, base: Base) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"The adapter {name!r} has peft_type={str(kind)[:50]!r}. Only LORA is supported.")
    trained = str(config.get("base_model_name_or_path") or "")
    if base_name(trained) not in base.names:
        model = repr(trained[:100]) if trained else "an unnamed model"
        raise AdapterError(
            f"The LoRA adapter {name!r} was trained for {model}, but this worker serves "
            f"{', '.join(sorted(base.names))}. Use an adapter of the served model. If that is the same model under "
            "another name, add the name to SERVED_MODEL_NAME."
        )
    ranks: list[Any] = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise AdapterError(f"The LoRA adapter {name!r}: the rank r in {CONFIG} must be a positive number.")
    if (rank := max(ranks)) > base.max_rank:
        raise AdapterError(f"The LoRA adapter {name!r} has rank {rank}, and MAX_LORA_RANK={base.max_rank}. Raise it.")


def _tensors(file: Path) -> Iterator[tuple[str, Shape, str]]:
    """Yield name, shape and type of each tensor in a file. Reads only the header."""
    with safe_open(file, "numpy") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            tensor = opened.get_slice(name)
            yield name, tuple(tensor.get_shape()), tensor.get_dtype()


def _check_shape(tensor: str, shape: Shape, name: str, base: Base) -> None:
    """Compare a tensor with the model's matrix. vLLM does not reject one that is too small.

    Modules whose shape is not known, such as those of quantized models, are left to vLLM.
    """
    match = _TENSOR.fullmatch(tensor)
    module = _MODULE.search(match[1]) if match else None
    if match is None or module is None:
        return
    known = base.shapes.get(module[1])
    if known is None:
        if not any(other.endswith(f".{module[3]}") for other in base.shapes):
            return
        raise AdapterError(f"The LoRA adapter {name!r} has weights for {module[1]}, which the model does not have.")
    axis = 1 if match[2] == "A" else 0
    if not any(len(shape) == len(each) == 2 and shape[axis] == each[axis] for each in known):
        raise AdapterError(
            f"The LoRA adapter {name!r} has a matrix of shape {list(shape)} for {module[1]}, which does not fit the "
            f"model's, of shape {', '.join(str(list(each)) for each in sorted(known))}."
        )
