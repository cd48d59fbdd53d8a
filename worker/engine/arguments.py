"""What the environment says, as vLLM's own parser and checks take it."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import vllm
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.entrypoints.launchers.cli_args import (
    BaseFrontendArgs,
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMError
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from worker.engine.versions import configure_logging_from_args, load_chat_template
from worker.errors import ConfigurationError, Json
from worker.model.fit import Plan, language_parts
from worker.settings import flags, sources
from worker.settings import settings as config
from worker.settings.sources import Sources

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


def parse_arguments(said: Sources, settings: config.Settings) -> argparse.Namespace:
    """Return vLLM's arguments as they have been said; `place` says where the model is.

    Raises:
        ConfigurationError: a value is refused by vLLM's parser or its checks.
    """
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    arguments = _flags(said, parser)
    try:
        args: argparse.Namespace = parser.parse_args([f"--model={settings.model_name}", *arguments])
        args.served_model_name = args.served_model_name or [settings.model_name]
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
        if (template := load_chat_template(args.chat_template)) is not None:
            _compile_jinja_template(template)
    except TemplateError as error:
        raise ConfigurationError(f"CHAT_TEMPLATE: no valid template: {sentence(error)}") from error
    except (argparse.ArgumentError, *REFUSALS) as error:
        raise ConfigurationError(_without_values(sentence(error))) from error
    if (args.enable_log_requests or args.enable_log_outputs) and not settings.log_prompts:
        raise ConfigurationError(
            "ENABLE_LOG_REQUESTS and ENABLE_LOG_OUTPUTS write what users say to the log. "
            "Set LOG_PROMPTS=true if that is wanted; it implies both."
        )
    _limit_media(args, settings)
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


def mistakes(said: Sources) -> list[str]:
    """Return a sentence for every variable whose value vLLM's parser refuses."""
    try:
        _flags(said, make_arg_parser(_Parser()))  # type: ignore[no-untyped-call]
    except ConfigurationError as error:
        return str(error).splitlines()
    return []


def _flags(said: Sources, parser: argparse.ArgumentParser) -> list[str]:
    """Return the argument list that is said, without a number of GPUs that the worker is to choose."""
    left_out = {"TENSOR_PARALLEL_SIZE"} if _chooses_gpus(said) else set()
    values = {name: value for name, value in said.values.items() if name not in left_out}
    return flags.arguments(values, parser, SERVER_FLAGS, said.told)


def place(args: argparse.Namespace, said: Sources, folders: Mapping[str, Path]) -> None:
    """Put into the arguments the folder of every name of the Hub, the model's first, and so many GPUs as fit it."""

    def placed(name: Any) -> Any:
        return str(folders[name]) if name in folders else name

    args.model = placed(args.model)
    args.tokenizer, args.hf_config_path, args.spec_model = map(
        placed, (args.tokenizer, args.hf_config_path, args.spec_model)
    )
    if args.speculative_config is not None:
        args.speculative_config = {name: placed(value) for name, value in args.speculative_config.items()}
    if args.default_mm_loras is not None:
        args.default_mm_loras = {kind: placed(path) for kind, path in args.default_mm_loras.items()}
    for adapter in args.lora_modules or ():
        adapter.path = placed(adapter.path)
    if _chooses_gpus(said):
        args.tensor_parallel_size = _gpus_for(args)
    if args.tensor_parallel_size > 1 and not _is_said(said, "MM_ENCODER_TP_MODE"):
        args.mm_encoder_tp_mode = "data"


def remarks(said: Sources) -> list[str]:
    """Return a sentence for what is said in vain: nearly the name of a setting, or a flag of vLLM's own server."""
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    flags_of_vllm = (action.dest.upper() for action in parser._actions)
    mine = {*map(str.upper, config.Settings.model_fields)}
    # In an environment, HOST and the like may be somebody else's.
    in_file = {name for name, origin in said.origins.items() if origin != sources.ENVIRONMENT}
    in_file -= mine | sources.ALIASES.keys()
    vain = sorted(name for name in SERVER_FLAGS if name.upper() in in_file or name in _extra_flags(said))
    return [
        *sources.near_misses(said, {*mine, *flags_of_vllm}),
        *(f"{name} has no effect: it is of vLLM's own server, in whose place the worker's is." for name in vain),
    ]


def _chooses_gpus(said: Sources) -> bool:
    """Tell whether the worker is to choose; what a preset says is a wish, for as many GPUs as there are."""
    if not _is_said(said, "TENSOR_PARALLEL_SIZE", "tp"):
        return True
    number = said.values.get("TENSOR_PARALLEL_SIZE", "").strip().lower()
    wished = said.origins.get("TENSOR_PARALLEL_SIZE", "").startswith("preset") and number.isdigit()
    return number == AUTO or (wished and int(number) > _visible_gpus())


def _is_said(said: Sources, variable: str, *short: str) -> bool:
    """Tell whether somebody says a flag, as a variable or in VLLM_EXTRA_ARGS."""
    return variable in said.values or not {variable.lower(), *short}.isdisjoint(_extra_flags(said))


def _extra_flags(said: Sources) -> set[str]:
    """Return the flags of VLLM_EXTRA_ARGS, as the parser names them."""
    words = said.values.get("VLLM_EXTRA_ARGS", "").split()
    return {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("-")}


def _visible_gpus() -> int:
    return 1 if current_platform.is_cpu() else current_platform.device_count()


def _gpus_for(args: argparse.Namespace) -> int:
    """Return how many of the visible GPUs the model's heads and layers can be divided among."""
    gpus = _visible_gpus() // (args.pipeline_parallel_size * args.data_parallel_size)
    sizes = _sizes(Path(args.model))
    if gpus > 1 and sizes is None:
        log.warning("TENSOR_PARALLEL_SIZE: how many heads the model has is unknown, so one of %d GPUs is used", gpus)
    heads, key_heads, blocks = sizes or (1, 1, [1])
    fitting = (
        count
        for count in range(1, gpus + 1)
        if heads % count == 0
        and (key_heads % count == 0 or count % key_heads == 0)
        and not any(number % count for number in blocks)
    )
    return max(fitting, default=1)


def _sizes(folder: Path) -> tuple[int, int, list[int]] | None:
    """Return a model's attention heads, its heads of keys and values, and the widths of its layers in whole blocks.

    A block is what a quantized layer has a scale for, and cannot be divided.
    """
    for name in ("config.json", "params.json"):
        try:
            config: Json = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        for part in (config, *language_parts(config)):
            if isinstance(heads := part.get("num_attention_heads", part.get("n_heads")), int):
                key_heads = part.get("num_key_value_heads") or part.get("n_kv_heads") or heads
                named = ("intermediate_size", "moe_intermediate_size", "hidden_dim")
                widths = [part[name] for name in named if isinstance(part.get(name), int)]
                return heads, key_heads, [width // _block(config) or width for width in widths]
    return None


def _block(config: Json) -> int:
    """Return the width of the blocks of which each has a scale; 1 without quantization by blocks."""
    scheme = config.get("quantization_config") or {}
    size = (scheme.get("weight_block_size") or [scheme.get("group_size")])[0]
    return size if isinstance(size, int) and size > 0 else 1


def compiles_alike(args: argparse.Namespace) -> Json:
    """Return what makes the code that vLLM compiles another; within its cache, vLLM itself tells finer."""
    names = {name: value for name, value in changed(args).items() if name not in NOT_COMPILED}
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**versions, "model": args.model, "arguments": names}


def plan(args: argparse.Namespace) -> Plan | None:
    """Return what the arguments say of how much memory the model takes of its GPUs.

    None where the files do not tell: they are quantized while they are loaded, kept elsewhere, or not read at all, or
    experts are divided among more GPUs than the rest.
    """
    if args.quantization is not None or args.cpu_offload_gb or args.load_format == "dummy":
        return None
    if args.enable_expert_parallel and args.data_parallel_size > 1:
        return None
    return Plan(
        tensor=args.tensor_parallel_size,
        pipeline=args.pipeline_parallel_size,
        utilization=args.gpu_memory_utilization,
        # As long as there is room for, where vLLM is to find that out.
        max_model_len=0 if args.max_model_len == -1 else args.max_model_len,
        dtype=str(args.dtype),
        cache_dtype=str(args.kv_cache_dtype),
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
    return json.loads(json.dumps(value, default=_fields))


def _fields(value: Any) -> Any:
    """Return what JSON makes of one of vLLM's objects."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _without_values(message: str) -> str:
    """Return a message about unknown flags without what was given to them, which may be a key."""
    before, unknown, words = message.partition("unrecognized arguments: ")
    flags_only = " ".join(word.partition("=")[0] for word in words.split() if word.startswith("-"))
    return before + unknown + (flags_only or "…" if unknown else "")


def sentence(error: Exception) -> str:
    """Return an exception's message on one line, pydantic's list of errors included."""
    if callable(errors := getattr(error, "errors", None)):
        return "; ".join(str(one["msg"]) for one in errors())
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
