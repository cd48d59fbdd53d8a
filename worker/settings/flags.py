"""Turns variables into vLLM's command line: `MAX_MODEL_LEN=8k` becomes `--max-model-len 8k`, and so for every flag."""

import argparse
import json
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from worker import redaction
from worker.errors import ConfigurationError

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
NOT_SETTABLE = frozenset({
    "help", "model", "model_tag", "config", "headless", "grpc", "api_server_count", "otlp_traces_endpoint", "hf_token",
    "revision", "download_dir", "log_level",
})  # fmt: skip
"""Flags that the worker sets itself, or that a library reads from the environment, such as the token. `LOG_LEVEL` is
the worker's own; vLLM's is `VLLM_LOGGING_LEVEL`."""
NO_DETAIL = re.compile(
    r"invalid .*? value: .*|Value .* cannot be converted to .*|invalid choice: .*|\d+ validation errors? for .*"
)
"""Messages of the parser and of its converters that say no more than what is expected."""
EXPECTED = {
    "int": "a whole number",
    "human_readable_int": "a whole number, such as 8192 or 8k",
    "float": "a number",
    "str": "text",
    "loads": "JSON",
    "parse_dataclass": "JSON",
}
"""What each of the parser's converters accepts."""


def arguments(
    values: Mapping[str, str],
    parser: argparse.ArgumentParser,
    not_settable: frozenset[str] = frozenset(),
    described: Callable[[str], str] = str,
) -> list[str]:
    """Return the command line that the variables stand for. vLLM's `parser` checks each value.

    `described` returns a variable's name with its source.

    Raises:
        ConfigurationError: one line for each variable whose value the parser refuses, with what it expects.
    """
    words, mistakes = [], []
    for variable, action in settable(parser, not_settable).items():
        value = values.get(variable, "").strip()
        if not value:
            continue
        try:
            flags = _flags(action, value)
            parser.parse_args(flags)
        except (ValueError, argparse.ArgumentError) as error:
            message = re.sub(r"^argument [^:]*: ", "", " ".join(str(error).split()))
            detail = "" if NO_DETAIL.fullmatch(message) else f"{message}; "
            shown = redaction.public(value, variable)
            mistakes.append(f"{described(variable)}={shown!r}: {detail}expected {_expected(action)}")
        else:
            words += flags
    try:
        extra = shlex.split(values.get("VLLM_EXTRA_ARGS", ""))
    except ValueError as error:
        # The value is left out: it may hold a key.
        mistakes.append(f"VLLM_EXTRA_ARGS: {error}; expected flags as in a shell")
    if mistakes:
        # The parser's messages quote values too.
        raise ConfigurationError(redaction.remover(redaction.secrets_in(values))("\n".join(mistakes)))
    return words + extra


def boolean(values: Mapping[str, str], name: str) -> bool | None:
    """Return a boolean variable; None if it is not set, or is no boolean."""
    return BOOLEANS.get(values.get(name, "").strip().lower())


def settable(parser: argparse.ArgumentParser, not_settable: frozenset[str] = frozenset()) -> dict[str, argparse.Action]:
    """Return the flags of `parser` that can be set, each under the name of its variable."""
    excluded = not_settable | NOT_SETTABLE
    return {
        action.dest.upper(): action
        for action in parser._actions
        if action.option_strings and action.dest not in excluded
    }


def _flags(action: argparse.Action, value: str) -> list[str]:
    """Return the command line words that set `action` to `value`."""
    flag = max(action.option_strings, key=lambda name: (not name.startswith("--no-"), len(name)))
    if action.nargs == 0:
        if (chosen := BOOLEANS.get(value.lower())) is None:
            raise ValueError("not a boolean")
        off = [flag.replace("--", "--no-", 1)] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [flag] if chosen else off
    if action.nargs in ("+", "*"):
        return [flag, *items(value)]
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={item}" for item in items(value)]
    return [f"{flag}={value}"]


def items(value: str) -> list[str]:
    """Split a list, written as a JSON array or separated by commas. Items that are JSON objects stay JSON text."""
    if not value.startswith("["):
        return [json.dumps(json.loads(value))] if value.startswith("{") else [item.strip() for item in value.split(",")]
    return [item if isinstance(item, str) else json.dumps(item) for item in json.loads(value)]


def _expected(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true or false"
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    name = _converter(action.type).strip("_").removesuffix("_or_auto")
    return EXPECTED.get(name, name.replace("_", " "))


def _converter(function: Any) -> str:
    """Return the name of a converter. vLLM wraps some in functions that call them."""
    inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    name = next((_converter(each) for each in inner if callable(each)), getattr(function, "__name__", "text"))
    return str(name)
