"""The number of GPUs that a model is divided among. No GPU is needed: the number of visible ones is an argument."""

import json
from pathlib import Path
from typing import Any

import pytest

from worker import settings
from worker.engine import parse_arguments
from worker.engine.parallelism import set_tensor_parallelism


def parallel_arguments(folder: Path, config: dict[str, Any], gpus: int, environ: dict[str, str]) -> Any:
    """Return the arguments for a model with this configuration."""
    (folder / "config.json").write_text(json.dumps(config))
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **environ})
    args = parse_arguments(worker_settings)
    args.model = str(folder)
    set_tensor_parallelism(args, worker_settings, gpus)
    return args


@pytest.mark.parametrize(
    ("gpus", "heads", "environ", "size"),
    [
        pytest.param(8, 28, {}, 4, id="as many as divide heads, key heads and widths"),
        pytest.param(8, 64, {"VLLM_EXTRA_ARGS": "-tp 2"}, 2, id="set in extra arguments"),
        pytest.param(2, 64, {"PRESET": "qwen2.5-vl-72b"}, 2, id="a preset for more than there are"),
        pytest.param(8, 64, {"PRESET": "qwen2.5-vl-72b"}, 8, id="a preset"),
        pytest.param(8, 64, {}, 8, id="all"),
        pytest.param(4, 64, {"PIPELINE_PARALLEL_SIZE": "2"}, 2, id="divided between two pipelines"),
        pytest.param(1, 64, {}, 1, id="one"),
        pytest.param(8, None, {}, 1, id="unknown heads"),
        pytest.param(8, 64, {"TENSOR_PARALLEL_SIZE": "2"}, 2, id="set"),
        pytest.param(8, 64, {"TENSOR_PARALLEL_SIZE": "Auto"}, 8, id="set to auto"),
    ],
)
def test_the_number_of_gpus(tmp_path: Path, gpus: int, heads: int | None, environ: dict[str, str], size: int) -> None:
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "intermediate_size": 18944 if heads == 28 else 1024,
    }
    args = parallel_arguments(tmp_path, {"text_config": sizes}, gpus, environ)
    assert args.tensor_parallel_size == size
    assert (args.mm_encoder_tp_mode == "data") is (size > 1)


@pytest.mark.parametrize(
    ("scheme", "widths", "size"),
    [
        pytest.param({"weight_block_size": [128, 128]}, {"moe_intermediate_size": 1536}, 4, id="blocks of experts"),
        pytest.param({"weight_block_size": [128, 128]}, {"intermediate_size": 12288}, 8, id="blocks"),
        pytest.param({"group_size": 128}, {"intermediate_size": 29568}, 1, id="groups that cannot be divided"),
        pytest.param({"group_size": 128}, {"intermediate_size": 29696}, 8, id="groups that can"),
        pytest.param({"group_size": -1}, {"intermediate_size": 29568}, 8, id="no groups"),
    ],
)
def test_blocks_of_quantized_layers_are_not_divided(
    tmp_path: Path, scheme: dict[str, Any], widths: dict[str, int], size: int
) -> None:
    config = {"num_attention_heads": 64, "num_key_value_heads": 8, **widths, "quantization_config": scheme}
    assert parallel_arguments(tmp_path, config, 8, {}).tensor_parallel_size == size
