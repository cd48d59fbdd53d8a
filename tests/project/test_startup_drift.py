"""Fails if a new version of vLLM changes a fact about the start on which the worker or docs/operations.md relies."""

import inspect
import re
from pathlib import Path

import pytest
import vllm
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import runai_streamer_loader, weight_utils
from vllm.model_executor.warmup import flashinfer_autotune_cache
from vllm.utils import deep_gemm
from vllm.v1.worker import gpu_worker, startup_plan

from tests.support.tiny import MODEL
from worker.engine.loaders import BLOCKING, SEVERAL_SOURCES, SINGLE
from worker.model.load_format import PACKAGES

MODELS = Path(vllm.__file__).parent / "model_executor/models"


def configuration(**arguments: object) -> VllmConfig:
    return AsyncEngineArgs(model=str(MODEL), **arguments).create_engine_config()  # type: ignore[arg-type]


def test_vllm_has_the_loaders_and_the_arguments_that_the_choice_looks_at() -> None:
    assert PACKAGES.keys() <= model_loader._LOAD_FORMAT_TO_MODEL_LOADER.keys()
    assert {*BLOCKING, *SINGLE} <= AsyncEngineArgs.__dataclass_fields__.keys()


def test_these_models_have_weights_in_further_files() -> None:
    pattern = re.compile(r"\b(secondary_weights|allow_patterns_overrides) = ")
    assert {path.stem for path in MODELS.glob("*.py") if pattern.search(path.read_text())} == set(SEVERAL_SOURCES)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        pytest.param(
            weight_utils.fastsafetensors_weights_iterator, 'f"cuda:', id="fastsafetensors loads into GPU memory"
        ),
        pytest.param(
            weight_utils.instanttensor_weights_iterator,
            "if not current_platform.is_cuda()",
            id="InstantTensor needs an NVIDIA GPU",
        ),
        pytest.param(
            runai_streamer_loader.RunaiModelStreamerLoader._prepare_weights,
            "list_safetensors(path=hf_folder)",
            id="the streamer loads all files of the folder",
        ),
        pytest.param(
            flashinfer_autotune_cache.resolve_flashinfer_autotune_file,
            "Path(envs.VLLM_CACHE_ROOT)",
            id="FlashInfer's tuning is in vLLM's cache",
        ),
        pytest.param(
            deep_gemm._lazy_init, 'envs.VLLM_CACHE_ROOT, "deep_gemm"', id="DeepGEMM's kernels are in vLLM's cache"
        ),
        pytest.param(startup_plan._plan_path, "envs.VLLM_CACHE_ROOT", id="startup plans are in vLLM's cache"),
        pytest.param(
            VllmConfig._set_cudagraph_sizes,
            "max_num_seqs * decode_query_len * 2, default_max_graph_size",
            id="MAX_NUM_SEQS limits the sizes of CUDA graphs",
        ),
        pytest.param(
            gpu_worker.Worker.determine_available_memory,
            "self.model_runner.profile_cudagraph_memory",
            id="the memory profile captures CUDA graphs",
        ),
    ],
)
def test_a_function_of_vllm_does_what_the_documents_say(function: object, text: str) -> None:
    assert text in inspect.getsource(function)  # type: ignore[arg-type]


def test_vllms_key_of_a_startup_plan_lacks_the_share_of_gpu_memory() -> None:
    """Once it has it, docs/operations.md and `worker.engine.compiled_code` need no exception."""
    first, second = configuration(gpu_memory_utilization=0.2), configuration(gpu_memory_utilization=0.3)
    assert first.compute_hash() == second.compute_hash()


def test_compilation_ahead_of_time_is_vllms_default() -> None:
    assert (envs.VLLM_USE_AOT_COMPILE, envs.VLLM_USE_MEGA_AOT_ARTIFACT) == (True, True)
    assert envs.VLLM_COMPILE_CACHE_SAVE_FORMAT == "binary"
