"""The number of GPUs that a model is divided among. No GPU is needed: the number of visible ones is an argument."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from tests.support import tiny
from worker import settings
from worker.engine import parse_arguments
from worker.engine.parallelism import divide
from worker.errors import ConfigurationError
from worker.model.divisibility import has_experts


def parallel_arguments(folder: Path, config: dict[str, Any], gpus: int, environ: dict[str, str]) -> Any:
    """Return the arguments for a model with this configuration."""
    (folder / "config.json").write_text(json.dumps(config))
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **environ})
    args = parse_arguments(worker_settings)
    args.model = str(folder)
    divide(args, worker_settings, gpus)
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


def node(rank: int, nodes: int, **environ: str) -> dict[str, str]:
    """Return the variables of a node of a cluster on RunPod."""
    address = f"10.0.0.{rank + 1}"
    cluster = {"NUM_NODES": str(nodes), "NODE_RANK": str(rank), "NODE_ADDR": address, "PRIMARY_ADDR": "10.0.0.1"}
    return {**cluster, **environ}


def addresses(nodes: int) -> dict[int, str]:
    return {rank: f"10.0.0.{rank + 1}" for rank in range(nodes)}


DENSE = {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568}
EXPERTS = {"num_attention_heads": 64, "num_key_value_heads": 8, "n_routed_experts": 256}


@pytest.mark.parametrize(
    ("config", "environ", "rank", "nodes", "fits", "sizes", "master"),
    [
        pytest.param(DENSE, {}, 1, 2, True, (8, 1, 2), 0, id="a copy on each node"),
        pytest.param(DENSE, {}, 1, 2, False, (8, 2, 1), 0, id="a copy on both nodes"),
        pytest.param(
            DENSE,
            {"TENSOR_PARALLEL_SIZE": "8", "PIPELINE_PARALLEL_SIZE": "2"},
            3,
            4,
            None,
            (8, 2, 2),
            2,
            id="two copies on four nodes: the second one begins on node 2",
        ),
        pytest.param(EXPERTS, {}, 1, 2, None, (8, 1, 2), 0, id="experts are divided among all: one group"),
        pytest.param(DENSE, {"VLLM_EXTRA_ARGS": "-tp 4 -dp 2"}, 1, 2, None, (4, 1, 2), 0, id="flags in words"),
        pytest.param(
            DENSE, {"PRESET": "qwen2.5-vl-72b"}, 0, 2, True, (8, 1, 2), 0, id="a preset's size is for one node"
        ),
    ],
)
def test_a_node_of_a_cluster_gets_its_place(
    tmp_path: Path,
    config: dict[str, Any],
    environ: dict[str, str],
    rank: int,
    nodes: int,
    fits: bool | None,
    sizes: tuple[int, int, int],
    master: int,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **node(rank, nodes, **environ)})
    args = parse_arguments(worker_settings)
    args.model = str(tmp_path)
    divide(args, worker_settings, 8, lambda _tensor, pipeline: pipeline > 1 or fits, addresses(nodes))
    assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size) == sizes
    assert args.enable_expert_parallel is (config is EXPERTS)
    assert (args.nnodes, args.node_rank, args.master_port) == (nodes, rank, 29501)
    assert args.master_addr == addresses(nodes)[master]
    assert args.data_parallel_address == "10.0.0.1"
    assert args.device_ids == ([0, 1, 2, 3] if sizes[0] == 4 else None)
    assert args.mm_encoder_tp_mode == "data"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        pytest.param(
            {"PIPELINE_PARALLEL_SIZE": "2", "ENFORCE_EAGER": "true"},
            "fails at the first request on CPUs. Set ENFORCE_EAGER=false",
            id="a pipeline on CPUs without the warm-up",
        ),
        pytest.param(node(0, 2, VLLM_EXTRA_ARGS="-tp 3 -pp 1 -dp 1"), "= 3 does not divide over 2 nodes", id="flags"),
    ],
)
def test_sizes_are_checked_before_the_model_is_there(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        parse_arguments(settings.read({"MODEL_NAME": "org/tiny", **environ}))


def test_pipelines_on_cpus_work_with_the_warm_up() -> None:
    pipeline = {"MODEL_NAME": "org/tiny", "PIPELINE_PARALLEL_SIZE": "2", "ENFORCE_EAGER": "false"}
    assert parse_arguments(settings.read(pipeline)).pipeline_parallel_size == 2


@pytest.mark.parametrize(
    ("environ", "place", "local"),
    [
        pytest.param({}, (0, 1, 1), 1, id="a copy on each node"),
        pytest.param({"TENSOR_PARALLEL_SIZE": "2"}, (1, 2, 0), 1, id="a copy on two nodes"),
        pytest.param({"DATA_PARALLEL_SIZE": "4"}, (0, 1, 2), 2, id="two copies on each node"),
    ],
)
def test_vllm_reads_the_same_place(environ: dict[str, str], place: tuple[int, int, int], local: int) -> None:
    """The configuration of a follower, as vLLM makes it from the arguments."""
    variables = {**tiny.environment(), "MODEL_NAME": str(tiny.MODEL), **node(1, 2, **environ)}
    worker_settings = settings.read(variables)
    args = parse_arguments(worker_settings)
    divide(args, worker_settings, None, addresses=addresses(2))
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=True).parallel_config
    assert (config.node_rank_within_dp, config.nnodes_within_dp, config.data_parallel_rank) == place
    assert config.data_parallel_size_local == local
    assert config.data_parallel_master_ip == ("10.0.0.1" if config.data_parallel_size > 1 else "127.0.0.1")


def test_nodes_that_use_some_of_their_gpus_name_them(tmp_path: Path) -> None:
    """vLLM takes the number of visible GPUs for the number of its processes on a node."""
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **node(1, 2, NUM_TRAINERS="4")})
    args = parse_arguments(worker_settings)
    args.model = str(tmp_path)
    divide(args, worker_settings, 8, lambda _tensor, pipeline: pipeline == 2, addresses(2))
    assert (args.tensor_parallel_size, args.pipeline_parallel_size, args.device_ids) == (4, 2, [0, 1, 2, 3])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"num_local_experts": 8}, id="Mixtral"),
        pytest.param({"num_experts": 128}, id="Qwen3"),
        pytest.param({"n_routed_experts": 256}, id="DeepSeek"),
        pytest.param({"moe_num_experts": [64, 64]}, id="Ernie"),
        pytest.param({"block_configs": [{"block_type": "moe", "n_routed_experts": 128}]}, id="Nemotron"),
        pytest.param({"block_configs": [{"block_type": "attention"}]}, id="blocks without experts"),
        pytest.param({"num_experts": 0}, id="none"),
        pytest.param({}, id="not stated"),
    ],
)
def test_vllm_finds_experts_in_the_same_models(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    of_vllm = ModelArchConfigConvertorBase.get_num_experts
    text: Any = SimpleNamespace(hf_text_config=SimpleNamespace(**config))
    text.get_num_experts_from_block_configs = partial(
        ModelArchConfigConvertorBase.get_num_experts_from_block_configs, text
    )
    assert has_experts(tmp_path) is (of_vllm(text) > 0)


def test_copies_of_a_model_with_experts_are_refused_on_cpus(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(EXPERTS))
    for environ in (node(0, 2), {"DATA_PARALLEL_SIZE": "2"}):
        worker_settings = settings.read({"MODEL_NAME": "org/tiny", **environ})
        args = parse_arguments(worker_settings)
        args.model = str(tmp_path)
        with pytest.raises(ConfigurationError, match="cannot run several copies of a model with experts on CPUs"):
            divide(args, worker_settings, gpus=None)


def test_the_processes_of_a_copy_on_several_nodes_find_each_other(tmp_path: Path) -> None:
    """Two copies on two nodes each: the numbers and the meeting point that vLLM computes for each process."""
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    groups = []
    for rank in range(4):
        worker_settings = settings.read({"MODEL_NAME": "org/tiny", **node(rank, 4, TENSOR_PARALLEL_SIZE="2")})
        args = parse_arguments(worker_settings)
        args.model = str(tmp_path)
        divide(args, worker_settings, 1, addresses=addresses(4))
        parallel = ParallelConfig(
            **{name: getattr(args, name) for name in PLACES}, data_parallel_rank=rank // 2, data_parallel_size_local=1
        )
        first = parallel.local_world_size * parallel.node_rank_within_dp
        # What vLLM's engine does on the first node of a copy, and the worker on the others.
        parallel.reconfigure_for_independent_dp_rank()
        groups.append((parallel.master_addr, first, parallel.world_size_across_dp))
    assert groups == [("10.0.0.1", 0, 2), ("10.0.0.1", 1, 2), ("10.0.0.3", 0, 2), ("10.0.0.3", 1, 2)]


PLACES = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes", "node_rank", "master_addr",
    "master_port", "distributed_executor_backend",
)  # fmt: skip
