"""Turns the settings into vLLM's arguments, with vLLM's own parser and checks."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import vllm
import vllm.config
from annotated_types import BaseMetadata
from jinja2 import TemplateError
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.entrypoints.launchers import cli_args
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from worker import redaction
from worker.cluster.sizes import TENSOR, Sizes
from worker.engine import parallelism
from worker.engine.adapters import keep_slot_free
from worker.engine.startup_errors import VLLM_ERRORS, one_line
from worker.engine.versions import configure_logging_from_args, load_chat_template
from worker.errors import ConfigurationError, Json, StartupError
from worker.model import fit
from worker.model.fit import Plan
from worker.settings import Settings, flags, legacy, sources

CORS_FLAGS = {"allowed_origins", "allowed_methods", "allowed_headers", "allow_credentials"}
LOG_FLAGS = ("enable_log_requests", "enable_log_outputs")
"""Flags that write prompts and completions to the log. The worker sets them to `LOG_PROMPTS`."""
SERVER_FLAGS = frozenset(
    cli_args.FrontendArgs.__dataclass_fields__.keys()
    - cli_args.BaseFrontendArgs.__dataclass_fields__.keys()
    - CORS_FLAGS
    - {"enable_flash_late_interaction"}
)
"""Flags of vLLM's own HTTP server, which the worker replaces: host, port, API keys, TLS, … The CORS flags configure
vLLM's app, and `enable_flash_late_interaction` configures how it computes scores."""
SWITCHES = {"tool_call_parser": "enable_auto_tool_choice", "lora_modules": "enable_lora", "lora_allow": "enable_lora"}
"""Flags, and settings of the worker, that have no effect without a flag, their switch."""
IMAGE_LIMIT = 100
"""Images per request where neither the user nor a preset sets a limit, and the model allows more. vLLM's own is 999."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, except that a mistake raises an exception instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def make_parser() -> argparse.ArgumentParser:
    """Return vLLM's parser.

    Raises:
        StartupError: vLLM has no device, without which it has no defaults either.
    """
    if current_platform.is_unspecified():
        raise StartupError("vLLM sees no GPU. Start the container with one (--gpus all), or use the image for CPUs.")
    parser: argparse.ArgumentParser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    return parser


def parse_arguments(settings: Settings) -> argparse.Namespace:
    """Return vLLM's arguments. Repositories are still names of the Hub: `place` replaces them by folders.

    Raises:
        ConfigurationError: vLLM's parser or one of its checks rejects a value.
        StartupError: vLLM sees no GPU.
    """
    parser = make_parser()
    words = _command_line(settings, parser)
    try:
        args: argparse.Namespace = parser.parse_args([f"--model={settings.model_name}", *words])
        _check_bounds(args, parser, settings.variables.described)
        for name in SERVER_FLAGS:
            # A flag in VLLM_EXTRA_ARGS has as little effect as a variable.
            setattr(args, name, parser.get_default(name))
        for name in LOG_FLAGS:
            setattr(args, name, settings.log_prompts)
        args.served_model_name = args.served_model_name or [settings.model_name]
        _enable_what_is_configured(args, settings)
        keep_slot_free(args)
        configure_logging_from_args(args)
        cli_args.validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        _check_parsers(args)
        validate_api_server_args(args)
        if (template := load_chat_template(args.chat_template)) is not None:
            _compile_jinja_template(template)
    except TemplateError as error:
        message = redaction.remover(settings.variables.secrets)(one_line(error))
        raise ConfigurationError(f"CHAT_TEMPLATE: not a valid template: {message}") from error
    except argparse.ArgumentError as error:
        # The variables are valid one by one.
        raise ConfigurationError(f"VLLM_EXTRA_ARGS: {_without_values(one_line(error), settings)}") from error
    except VLLM_ERRORS as error:
        raise ConfigurationError(_without_values(one_line(error), settings)) from error
    parallelism.check(args, settings, parallelism.visible_gpus())
    _set_media_limits(args, settings)
    args.otlp_traces_endpoint = settings.otlp_traces_endpoint
    # The worker checks keys itself. With None, vLLM would use a key from the environment.
    args.api_key = [""]
    return args


def _check_bounds(args: argparse.Namespace, parser: argparse.ArgumentParser, described: Callable[[str], str]) -> None:
    """Check the limits that vLLM's classes declare. vLLM checks them too, but does not name the variable.

    Raises:
        ConfigurationError: one line for each value that is too small or too large.
    """
    lines = []
    for group in parser._action_groups:
        fields = getattr(getattr(vllm.config, str(group.title), None), "__pydantic_fields__", {})
        for name in {action.dest for action in group._group_actions} & fields.keys():
            limits = [each for each in fields[name].metadata if isinstance(each, BaseMetadata)]
            value = getattr(args, name, None)
            if not limits or not isinstance(value, int | float):
                continue
            try:
                TypeAdapter(Annotated[Any, *limits]).validate_python(value)
            except ValidationError as error:
                lines.append(f"{described(name.upper())}={value}: {error.errors()[0]['msg']}")
    if lines:
        raise ConfigurationError("\n".join(lines))


def _check_parsers(args: argparse.Namespace) -> None:
    """Check the names of parsers. vLLM checks one of them only after it has loaded the model."""
    for name, value, parsers in (
        ("TOOL_CALL_PARSER", args.tool_call_parser, ToolParserManager.list_registered()),
        ("REASONING_PARSER", args.reasoning_parser, ReasoningParserManager.list_registered()),
    ):
        if value and value not in parsers:
            raise ValueError(f"{name}={value!r}: no such parser; expected one of {', '.join(parsers)}")


def mistakes(settings: Settings) -> list[str]:
    """Return a sentence for every variable whose value vLLM's parser rejects."""
    try:
        _command_line(settings, make_parser())
    except ConfigurationError as error:
        return str(error).splitlines()
    return []


def _command_line(settings: Settings, parser: argparse.ArgumentParser) -> list[str]:
    variables = settings.variables
    skipped = TENSOR if parallelism.is_auto(settings) else None
    values = {name: value for name, value in variables.values.items() if name != skipped}
    return flags.arguments(values, parser, SERVER_FLAGS, variables.described)


def _enable_what_is_configured(args: argparse.Namespace, settings: Settings) -> None:
    """Turn on what other settings configure, unless it is turned off. Without, they would cause errors later."""
    extra, values = parallelism.extra_flags(settings), {**vars(args), "lora_allow": settings.lora_allow}
    for name, switch in SWITCHES.items():
        if values[name] and switch.upper() not in settings.variables.values and f"no_{switch}" not in extra:
            setattr(args, switch, True)


def _set_media_limits(args: argparse.Namespace, settings: Settings) -> None:
    """Apply the worker's short settings for media. vLLM's own flags take precedence."""
    images = IMAGE_LIMIT if settings.image_limit is None else settings.image_limit
    limits = {"image": images, "video": settings.video_limit, "audio": settings.audio_limit}
    limits = {kind: limit for kind, limit in limits.items() if limit is not None}
    args.limit_mm_per_prompt = {**limits, **args.limit_mm_per_prompt}
    if (frames := settings.video_max_frames) is not None:
        # The video loaders of some models call it `max_frames`.
        video = {"num_frames": frames, "max_frames": frames, **args.media_io_kwargs.get("video", {})}
        args.media_io_kwargs = {**args.media_io_kwargs, "video": video}


def place(
    args: argparse.Namespace,
    settings: Settings,
    folders: Mapping[str, Path],
    gpus: Sequence[Json] = (),
    addresses: Mapping[int, str] = parallelism.NO_ADDRESSES,
) -> Sizes | None:
    """Replace the names of repositories in `args` by their folders, and choose how the model is divided among GPUs.

    Return how it is divided among the nodes of a cluster; None on a single machine.

    `gpus` are this machine's, with their `memory` and `free` memory. `addresses` are those of the cluster's nodes.

    Raises:
        ConfigurationError: the sizes do not match the machines.
    """

    def placed(name: Any) -> Any:
        return str(folders[name]) if name in folders else name

    for field in ("model", "tokenizer", "hf_config_path", "spec_model"):
        setattr(args, field, placed(getattr(args, field)))
    for field in ("speculative_config", "default_mm_loras"):
        if (values := getattr(args, field)) is not None:
            setattr(args, field, {name: placed(value) for name, value in values.items()})
    for adapter in args.lora_modules or ():
        adapter.path = placed(adapter.path)

    def fits(tensor: int, pipeline: int) -> bool | None:
        if (planned := plan(args)) is None or not gpus:
            return None
        sizes = replace(planned, tensor=tensor, pipeline=pipeline, nodes=-(-tensor * pipeline // len(gpus)))
        # All nodes must come to the same result, whatever else has memory on them.
        estimate = fit.estimated(Path(args.model), sizes, [{**gpu, "free": gpu["memory"]} for gpu in gpus])
        return None if estimate is None else estimate.fits

    return parallelism.divide(args, settings, parallelism.visible_gpus(), fits, addresses)


def remarks(settings: Settings) -> list[str]:
    """Return a warning for each variable that looks misspelt, for each flag without effect, and for unpinned code."""
    parser = make_parser()
    own = {name.upper() for name in Settings.model_fields}
    known = {*own, *(action.dest.upper() for action in parser._actions)}
    return [
        *sources.near_misses(settings.variables, known),
        *_without_effect(settings, own | legacy.aliases().keys()),
        *_unpinned_code(settings),
    ]


def _unpinned_code(settings: Settings) -> Iterator[str]:
    is_trusted = flags.boolean(settings.variables.values, "TRUST_REMOTE_CODE")
    is_pinned = Path(settings.model_name).is_dir() or re.fullmatch("[0-9a-f]{40}", settings.model_revision or "")
    if (is_trusted or "trust_remote_code" in parallelism.extra_flags(settings)) and not is_pinned:
        yield (
            "TRUST_REMOTE_CODE runs code from the Hugging Face Hub that its authors can change at any time. Set "
            "MODEL_REVISION to a commit that you have read."
        )


def _without_effect(settings: Settings, of_worker: set[str]) -> Iterator[str]:
    """Yield a warning for each flag without effect that is set. The variables `of_worker` have another meaning."""
    variables, extra = settings.variables, parallelism.extra_flags(settings)
    values = variables.values
    reasons = dict.fromkeys(SERVER_FLAGS, "it configures vLLM's HTTP server, which the worker replaces")
    if not flags.boolean(values, "LOG_PROMPTS"):
        reasons |= dict.fromkeys(LOG_FLAGS, "only LOG_PROMPTS=true writes prompts and completions to the log")
    for name, reason in sorted(reasons.items()):
        variable = name.upper()
        is_set = variable in values and flags.boolean(values, variable) is not False and variable not in of_worker
        if is_set or name in extra:
            yield f"{variables.described(variable) if is_set else name} has no effect: {reason}."


def plan(args: argparse.Namespace) -> Plan | None:
    """Return the arguments from which the memory on each GPU can be estimated.

    None if it cannot be: the weights are quantized while they are loaded, offloaded to the CPU or not read from files,
    or experts are divided among more GPUs than the other layers.
    """
    if args.quantization is not None or args.cpu_offload_gb or args.load_format == "dummy":
        return None
    if args.enable_expert_parallel and args.data_parallel_size > 1:
        return None
    return Plan(
        tensor=args.tensor_parallel_size,
        pipeline=args.pipeline_parallel_size,
        utilization=args.gpu_memory_utilization,
        # -1: as long as memory allows.
        max_model_len=0 if args.max_model_len == -1 else args.max_model_len,
        dtype=str(args.dtype),
        cache_dtype=str(args.kv_cache_dtype),
        nodes=max(args.nnodes // args.data_parallel_size, 1),
    )


def changed(args: argparse.Namespace) -> Json:
    """Return the arguments that differ from vLLM's defaults, without secrets, as JSON values."""
    defaults = vars(make_parser().parse_args([]))
    # vLLM's own key is not used.
    names = sorted(vars(args).keys() - {"api_key"})
    values = {name: value for name in names if (value := getattr(args, name)) != defaults.get(name)}
    return {name: redaction.public(to_jsonable_python(value, fallback=str), name) for name, value in values.items()}


def _without_values(message: str, settings: Settings) -> str:
    """Return a message without secrets, and without the values in VLLM_EXTRA_ARGS: a wrong flag may hold a secret."""
    values = (value for _, value in redaction.flag_values(settings.vllm_extra_args))
    message = redaction.remover([*settings.variables.secrets, *values])(message)
    before, unknown, words = message.partition("unrecognized arguments: ")
    names = " ".join(word.partition("=")[0] for word in words.split() if word.startswith("-"))
    return before + unknown + (names or "…" if unknown else "")
