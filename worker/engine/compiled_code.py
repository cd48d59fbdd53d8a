"""What vLLM's compiled code depends on: the key of the compile cache."""

from argparse import Namespace

import torch
import vllm

from worker.engine.arguments import changed
from worker.errors import Json
from worker.settings import Settings

NOT_COMPILED = (
    "served_model_name", "logging_config", "load_format", "gpu_memory_utilization", "node_rank", "master_addr",
    "master_port", "data_parallel_address",
)  # fmt: skip
"""Arguments that do not change the compiled code."""
STARTUP_PLAN = "VLLM_ENABLE_STARTUP_PLAN"
"""vLLM's variable for keeping the results of its memory profile in its cache folder."""


def compile_inputs(args: Namespace, settings: Settings) -> Json:
    """Return what vLLM's compiled code depends on, apart from what vLLM's own cache keys add."""
    left_out = set(NOT_COMPILED)
    if STARTUP_PLAN in settings.variables.values:
        # A plan holds the size of the KV cache, but vLLM's key for it lacks this argument.
        left_out.remove("gpu_memory_utilization")
    arguments = {name: value for name, value in changed(args).items() if name not in left_out}
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**versions, "model": args.model, "arguments": arguments}
