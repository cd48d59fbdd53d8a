"""Facts about the model and how it runs, for `/info`."""

from argparse import Namespace

import torch
import vllm
from vllm.config import VllmConfig

from worker.engine.arguments import changed
from worker.errors import Json


def of_engine(config: VllmConfig, args: Namespace) -> Json:
    """Return versions, limits, sizes and arguments."""
    model, parallel = config.model_config, config.parallel_config
    return {
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
        "served_names": args.served_model_name,
        "max_model_len": model.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
        "arguments": changed(args),
    }
