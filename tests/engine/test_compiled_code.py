"""The key of the compile cache."""

import pytest

from tests.support.tiny import MODEL
from worker.engine import compile_inputs, parse_arguments
from worker.errors import Json
from worker.model.compile_cache import key_of
from worker.settings import read


def inputs(**variables: str) -> Json:
    settings = read({"MODEL_NAME": str(MODEL), **variables})
    return compile_inputs(parse_arguments(settings), settings)


@pytest.mark.parametrize(
    ("variables", "is_same"),
    [
        pytest.param({"LOAD_FORMAT": "safetensors"}, True, id="another loader"),
        pytest.param({"GPU_MEMORY_UTILIZATION": "0.5"}, True, id="another share of GPU memory"),
        pytest.param({"MAX_NUM_SEQS": "7"}, False, id="another batch size"),
    ],
)
def test_the_key_follows_from_what_changes_the_compiled_code(variables: dict[str, str], is_same: bool) -> None:
    assert (key_of(inputs(**variables)) == key_of(inputs())) is is_same


def test_with_startup_plans_the_share_of_gpu_memory_is_part_of_the_key() -> None:
    """vLLM would use the plan of one share for another (tests/project/test_startup_drift.py)."""
    plan = {"VLLM_ENABLE_STARTUP_PLAN": "1"}
    assert key_of(inputs(**plan, GPU_MEMORY_UTILIZATION="0.5")) != key_of(inputs(**plan))
