"""What the environment says, as vLLM's own parser and checks take it."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any, NoReturn

import torch
import vllm
from vllm.entrypoints.launchers.cli_args import (
    BaseFrontendArgs,
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMError
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from worker import config, flags, sources
from worker.errors import ConfigurationError, Json
from worker.model.fit import Plan
from worker.sources import Sources

SERVER_FLAGS = frozenset(set(FrontendArgs.__dataclass_fields__) - set(BaseFrontendArgs.__dataclass_fields__))
"""Flags of vLLM's own HTTP server, which does not run here: host, port, API keys, TLS, CORS, …"""

log = logging.getLogger(__name__)

AUTO = "auto"
NOT_COMPILED = ("served_model_name", "api_key", "logging_config", "load_format", "gpu_memory_utilization")
SECRETS = ("api_key", "hf_token")
REFUSALS = (VLLMError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What vLLM raises when it cannot do what it is told."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, but a mistake is an exception and not the end of the process."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def parse_arguments(said: Sources, settings: config.Settings, model: str) -> argparse.Namespace:
    """Return vLLM's arguments as they have been said, for the snapshot in the folder `model`.

    Raises:
        ConfigurationError: a value is refused by vLLM's parser or its checks.
    """
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    values = dict(said.values)
    chooses_gpus = values.get("TENSOR_PARALLEL_SIZE", AUTO).strip().lower() == AUTO
    if chooses_gpus:
        values.pop("TENSOR_PARALLEL_SIZE", None)
    arguments = flags.arguments(values, parser, SERVER_FLAGS, said.told)
    try:
        args: argparse.Namespace = parser.parse_args([f"--model={model}", *arguments])
        args.served_model_name = args.served_model_name or [settings.model_name]
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    except (argparse.ArgumentError, *REFUSALS) as error:
        raise ConfigurationError(sentence(error)) from error
    if (args.enable_log_requests or args.enable_log_outputs) and not settings.log_prompts:
        raise ConfigurationError(
            "ENABLE_LOG_REQUESTS and ENABLE_LOG_OUTPUTS write what users say to the log. "
            "Set LOG_PROMPTS=true if that is wanted; it implies both."
        )
    _limit_media(args, settings)
    if chooses_gpus:
        args.tensor_parallel_size = _gpus_for(args)
    if args.tensor_parallel_size > 1 and "MM_ENCODER_TP_MODE" not in values:
        args.mm_encoder_tp_mode = "data"
    args.enable_log_requests = args.enable_log_outputs = settings.log_prompts
    args.otlp_traces_endpoint = settings.otlp_traces_endpoint
    # Keys are checked before a request comes here. None would have vLLM look for one in the environment.
    args.api_key = [""]
    # vLLM itself looks at this one only after the model has been loaded.
    reasoning_parsers = ReasoningParserManager.list_registered()
    if args.reasoning_parser and args.reasoning_parser not in reasoning_parsers:
        choice = ", ".join(reasoning_parsers)
        raise ConfigurationError(
            f"REASONING_PARSER={args.reasoning_parser!r}: no such parser; expected one of {choice}"
        )
    return args


def near_misses(said: Sources) -> list[str]:
    """Return a sentence for every variable that is nearly the name of a setting, the worker's or vLLM's."""
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    flags_of_vllm = (action.dest.upper() for action in parser._actions)
    return sources.near_misses(said, {*map(str.upper, config.Settings.model_fields), *flags_of_vllm})


def _gpus_for(args: argparse.Namespace) -> int:
    """Return how many of the visible GPUs the model's attention heads can be divided among."""
    visible = 1 if current_platform.is_cpu() else current_platform.device_count()
    gpus = visible // (args.pipeline_parallel_size * args.data_parallel_size)
    heads = _attention_heads(Path(args.model) / "config.json")
    if gpus > 1 and heads is None:
        log.warning("TENSOR_PARALLEL_SIZE: how many heads the model has is unknown, so one of %d GPUs is used", gpus)
    return max((count for count in range(1, gpus + 1) if (heads or 1) % count == 0), default=1)


def _attention_heads(file: Path) -> int | None:
    try:
        config: Json = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    for part in (config, *(config.get(name) or {} for name in ("text_config", "llm_config", "language_config"))):
        if isinstance(heads := part.get("num_attention_heads"), int):
            return heads
    return None


def compiles_alike(args: argparse.Namespace) -> Json:
    """Return what makes the code that vLLM compiles another; within its cache, vLLM itself tells finer."""
    names = {name: value for name, value in changed(args).items() if name not in NOT_COMPILED}
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**versions, "model": args.model, "arguments": names}


def plan(args: argparse.Namespace) -> Plan:
    """Return what the arguments say of how much memory the model takes of its GPUs."""
    return Plan(
        gpus=args.tensor_parallel_size * args.pipeline_parallel_size,
        utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len if isinstance(args.max_model_len, int) and args.max_model_len > 0 else None,
        dtype=str(args.dtype),
        cache_dtype=str(args.kv_cache_dtype),
        quantized=args.quantization is not None,
    )


def _limit_media(args: argparse.Namespace, settings: config.Settings) -> None:
    """Put the short settings of media where vLLM, which ignores them for a model of text only, looks for them."""
    kinds = {"image": settings.image_limit, "video": settings.video_limit, "audio": settings.audio_limit}
    said = {kind: limit for kind, limit in kinds.items() if limit is not None}
    args.limit_mm_per_prompt = {**said, **args.limit_mm_per_prompt}
    if (frames := settings.video_max_frames) is not None:
        # Loaders for some models have a name of their own for it.
        video = {"num_frames": frames, "max_frames": frames, **args.media_io_kwargs.get("video", {})}
        args.media_io_kwargs = {**args.media_io_kwargs, "video": video}


def changed(args: argparse.Namespace) -> Json:
    """Return the arguments that differ from vLLM's defaults, secrets left out, as something that is JSON."""
    defaults = vars(make_arg_parser(_Parser()).parse_args([]))  # type: ignore[no-untyped-call]
    differing = {name: value for name, value in vars(args).items() if value != defaults.get(name)}
    told = {name: "***" if name in SECRETS else value for name, value in sorted(differing.items())}
    return {name: _plain(config.without_password(value)) for name, value in told.items()}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def sentence(error: Exception) -> str:
    """Return an exception's message on one line, pydantic's list of errors included."""
    if callable(errors := getattr(error, "errors", None)):
        return "; ".join(str(one["msg"]) for one in errors())
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
