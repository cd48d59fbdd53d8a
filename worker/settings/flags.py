"""Variables become vLLM's argument list: `MAX_MODEL_LEN=8k` is `--max-model-len 8k`, and so for every flag it has."""

import argparse
import json
import re
import shlex
from collections.abc import Callable, Mapping

from worker.errors import ConfigurationError
from worker.settings.settings import BOOLEANS

NOT_SETTABLE = frozenset(
    {
        "help",
        "model",
        "model_tag",
        "config",
        "headless",
        "grpc",
        "api_server_count",
        "otlp_traces_endpoint",
        "hf_token",
        "revision",
        "download_dir",
    }
)
"""Flags that are the worker's own business, or, like the token, read by their library without passing through here."""


def arguments(
    values: Mapping[str, str],
    parser: argparse.ArgumentParser,
    not_settable: frozenset[str] = frozenset(),
    told: Callable[[str], str] = str,
) -> list[str]:
    """Return the argument list that variables mean to vLLM's `parser`, each value tried by that parser.

    `told` names a variable and its source.

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
            mistakes.append(f"{told(variable)}={value!r}: {_detail(error)}; expected {_expected(action)}")
        else:
            words += flags
    try:
        extra = shlex.split(values.get("VLLM_EXTRA_ARGS", ""))
    except ValueError as error:
        # Without the value, which may hold a key.
        mistakes.append(f"VLLM_EXTRA_ARGS: {error}; expected flags as in a shell")
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    return words + extra


def settable(parser: argparse.ArgumentParser, not_settable: frozenset[str] = frozenset()) -> dict[str, argparse.Action]:
    """Return every variable that stands for a flag of `parser`, with the flag."""
    excluded = not_settable | NOT_SETTABLE
    return {
        action.dest.upper(): action
        for action in parser._actions
        if action.option_strings and action.dest not in excluded
    }


def _flags(action: argparse.Action, value: str) -> list[str]:
    """Return the words of a command line that give `action` the `value`.

    Raises:
        ValueError: the flag is a boolean and the value is none.
    """
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
    """Split a list written as a JSON array or with commas; items that are JSON objects stay JSON text."""
    if not value.startswith("["):
        return [json.dumps(json.loads(value))] if value.startswith("{") else [item.strip() for item in value.split(",")]
    return [item if isinstance(item, str) else json.dumps(item) for item in json.loads(value)]


def _detail(error: Exception) -> str:
    return re.sub(r"^argument [^:]*: ", "", str(error))


def _expected(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "true or false"
    if action.choices:
        return f"one of {', '.join(map(str, action.choices))}"
    name = getattr(action.type, "__name__", "text")
    described = {"int": "a whole number", "float": "a number", "str": "text", "loads": "JSON"}
    return described.get(name, name.strip("_").replace("_", " ").removesuffix(" or auto"))
