"""What the choice of a loader looks at, and the second start after a loader has failed."""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from worker.engine import loaders, parse_arguments
from worker.engine.loaders import choose_for_gpus, choose_loader, start_engine
from worker.errors import ConfigurationError, StartupError
from worker.model.load_format import LoadFormat
from worker.settings import read

CONFIG: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
GPUS = [{"name": "a GPU", "memory": 80 << 30, "free": 80 << 30}]
CHOSEN = LoadFormat("instanttensor", "for a test", may_fall_back=True)


def arguments(folder: Path, **variables: str) -> Namespace:
    """Return vLLM's arguments for the model in `folder`."""
    return parse_arguments(read({"MODEL_NAME": str(folder), "PRESET": "none", **variables}))


def write_model(folder: Path, config: dict[str, Any] = CONFIG, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(4)}, folder / name)
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    """A folder on Python's path with the metadata of one loader's package."""
    metadata = tmp_path / "packages/instanttensor-0.2.2.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: instanttensor\nVersion: 0.2.2\n")
    sys.path.insert(0, str(tmp_path / "packages"))
    yield tmp_path
    sys.path.remove(str(tmp_path / "packages"))


def test_without_an_nvidia_gpu_vllms_own_loader_is_used(tmp_path: Path) -> None:
    args = arguments(write_model(tmp_path))
    assert choose_loader(args, GPUS) == LoadFormat("auto", "there is no NVIDIA GPU")


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"LOAD_FORMAT": "safetensors"}, id="variable"),
        pytest.param({"VLLM_EXTRA_ARGS": "--load-format safetensors"}, id="flag"),
    ],
)
def test_the_users_loader_is_kept_and_never_replaced(tmp_path: Path, variables: dict[str, str]) -> None:
    args = arguments(write_model(tmp_path), **variables)
    chosen = choose_loader(args, GPUS)
    assert (chosen.name, chosen.may_fall_back, args.load_format) == ("safetensors", False, "safetensors")


def test_an_installed_package_is_found(installed: Path) -> None:
    assert choose_for_gpus(arguments(write_model(installed / "model")), GPUS).reason == "the weights have only 0.0 GB"


def test_a_package_that_is_missing_is_not_chosen(tmp_path: Path) -> None:
    assert choose_for_gpus(arguments(write_model(tmp_path)), GPUS).reason == "no other loader is installed"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param({"SAFETENSORS_LOAD_STRATEGY": "eager"}, "SAFETENSORS_LOAD_STRATEGY is set", id="strategy"),
        pytest.param({"MODEL_LOADER_EXTRA_CONFIG": '{"a": 1}'}, "MODEL_LOADER_EXTRA_CONFIG is set", id="extra config"),
        pytest.param({"QUANTIZATION": "fp8"}, "QUANTIZATION is set", id="quantized while loading"),
        pytest.param({"CPU_OFFLOAD_GB": "4"}, "CPU_OFFLOAD_GB is set", id="offloading"),
        pytest.param({"PIPELINE_PARALLEL_SIZE": "2"}, "PIPELINE_PARALLEL_SIZE is more than 1", id="pipeline"),
        pytest.param({"VLLM_EXTRA_ARGS": "--enable-sleep-mode"}, "ENABLE_SLEEP_MODE is set", id="a flag"),
    ],
)
def test_settings_for_which_vllms_loader_is_needed(tmp_path: Path, variables: dict[str, str], reason: str) -> None:
    assert choose_for_gpus(arguments(write_model(tmp_path), **variables), GPUS) == LoadFormat("auto", reason)


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        pytest.param(CONFIG, "consolidated.safetensors", "not plain .safetensors files", id="Mistral's own files"),
        pytest.param(
            {**CONFIG, "quantization_config": {"quant_method": "torchao"}},
            "model.safetensors",
            "the model is quantized with torchao",
            id="quantization",
        ),
        pytest.param(
            {"architectures": ["UltravoxModel"]},
            "model.safetensors",
            "UltravoxModel may have weights in other files too",
            id="weights in several repositories",
        ),
        pytest.param(
            {"architectures": ["OfAPlugin"]}, "model.safetensors", "OfAPlugin may have weights", id="unknown model"
        ),
    ],
)
def test_models_for_which_vllms_loader_is_needed(
    tmp_path: Path, config: dict[str, Any], name: str, reason: str
) -> None:
    args = Namespace(**{**vars(arguments(write_model(tmp_path))), "model": str(write_model(tmp_path, config, name))})
    assert reason in choose_for_gpus(args, GPUS).reason


def test_files_in_other_formats_need_vllms_loader(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "not plain .safetensors" in choose_for_gpus(arguments(folder), GPUS).reason


def test_a_damaged_index_does_not_fail_the_start(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert choose_for_gpus(arguments(folder), GPUS).reason == "the weights cannot be examined: JSONDecodeError"


def test_the_facts_about_the_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path, name="a.safetensors")
    write_model(tmp_path, name="b.safetensors")
    size = (folder / "a.safetensors").stat().st_size
    weights = loaders._weights(folder)
    assert (weights.total, weights.largest, weights.has_other_files) == (2 * size, size, False)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"weight": "a.safetensors"}}')
    weights = loaders._weights(folder)
    assert (weights.total, weights.has_other_files) == (size, True)


class Starts:
    """Attempts to start an engine, each of which ends with the next of `results`."""

    def __init__(self, *results: object) -> None:
        self.args = Namespace(load_format=CHOSEN.name)
        self.loaders: list[str] = []
        self._results = list(results)

    def load(self) -> object:
        self.loaders.append(self.args.load_format)
        if isinstance(result := self._results.pop(0), Exception):
            raise result
        return result


def cause_file(folder: Path, cause: str | None) -> Path:
    """Return the file with the first exception of an engine process."""
    if cause is not None:
        (folder / "cause").write_text(cause)
    return folder / "cause"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        pytest.param(StartupError("failed"), "RuntimeError: no such disk", id="the library fails"),
        pytest.param(StartupError("failed"), None, id="the process is killed"),
        pytest.param(ConfigurationError("failed"), "ValueError: no such tensor", id="it may be the loader"),
        pytest.param(ConfigurationError("failed"), "OutOfMemoryError: CUDA out of memory", id="no room while loading"),
    ],
)
def test_the_engine_starts_again_with_vllms_loader(
    error: StartupError, cause: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(error, "engine")
    assert start_engine(CHOSEN, starts.args, starts.load, cause_file(tmp_path, cause)) == (
        "engine",
        LoadFormat("auto", "instanttensor failed"),
    )
    assert starts.loaders == ["instanttensor", "auto"]
    assert not (tmp_path / "cause").exists()
    kind = cause.partition(":")[0] if cause else "StartupError"
    assert [record.getMessage() for record in caplog.records] == [
        f"The engine did not start with instanttensor ({kind}). It starts again with vLLM's own loader"
    ]


@pytest.mark.parametrize(
    ("chosen", "error", "cause"),
    [
        pytest.param(LoadFormat("instanttensor", "set"), StartupError("failed"), "RuntimeError: x", id="user's choice"),
        pytest.param(CHOSEN, ConfigurationError("failed"), None, id="vLLM refuses the settings"),
        pytest.param(
            CHOSEN,
            ConfigurationError("failed"),
            "ValueError: No available memory for the cache blocks",
            id="no room for the KV cache",
        ),
    ],
)
def test_other_failures_end_the_start_at_once(
    chosen: LoadFormat, error: StartupError, cause: str | None, tmp_path: Path
) -> None:
    starts = Starts(error)
    with pytest.raises(type(error)):
        start_engine(chosen, starts.args, starts.load, cause_file(tmp_path, cause))
    assert starts.loaders == ["instanttensor"]


def test_a_second_failure_is_the_one_that_is_reported(tmp_path: Path) -> None:
    starts = Starts(StartupError("the first"), ConfigurationError("the second"))
    with pytest.raises(ConfigurationError, match="the second"):
        start_engine(CHOSEN, starts.args, starts.load, cause_file(tmp_path, None))
