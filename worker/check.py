"""`python handler.py --check`: prints the effective settings with their sources, or every mistake. Loads nothing."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from worker import redaction
from worker.errors import ConfigurationError, Json
from worker.model import weights
from worker.settings import Settings, environment, settings, sources
from worker.settings.sources import Variables

SET_BY_WORKER = ("model", "served_model_name", "api_key", "enable_log_requests", "enable_log_outputs", "logging_config")
"""vLLM's arguments that the worker sets itself."""

Hide = Callable[[str], str]
"""Returns a text without the secrets in the settings."""


def run(environ: Mapping[str, str], as_json: bool) -> int:
    """Print the effective settings, or all mistakes in them; return the exit code.

    Mistakes in the worker's own settings are printed at once. Importing vLLM, which checks its own, takes seconds.
    """
    try:
        variables = sources.collect(environ)
    except ConfigurationError as error:
        # It contains no secrets of the file: the file cannot be read, or the preset does not exist.
        return _print_mistakes(str(error).splitlines(), as_json, redaction.remover(redaction.secrets_in(environ)))
    hide = redaction.remover(variables.secrets)
    try:
        chosen = settings.from_variables(variables)
        environment.prepare(chosen)
        folders = weights.locate(chosen)
    except ConfigurationError as error:
        return _print_mistakes(chain(str(error).splitlines(), _mistakes_in_flags(variables)), as_json, hide)
    from worker.engine import arguments

    try:
        args = arguments.parse_arguments(chosen)
        arguments.place(args, chosen, {name: folder for name, folder in folders.items() if folder})
    except ConfigurationError as error:
        return _print_mistakes(str(error).splitlines(), as_json, hide)
    engine = arguments.changed(args)
    rows, command = _rows(chosen, engine), _command(chosen, engine)
    warnings = [hide(warning) for warning in (*variables.warnings, *arguments.remarks(chosen))]
    if as_json:
        listed = [dict(zip(("setting", "value", "source"), row, strict=True)) for row in rows]
        result = {"ok": True, "settings": listed, "command": command, "warnings": warnings}
        sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    else:
        sys.stdout.write(_table([(name, _text(value), source) for name, value, source in rows]))
        sys.stdout.write(f"\nEquivalent command:\n{command}\n")
        sys.stdout.write("".join(f"\nWarning: {warning}" for warning in warnings) + "\n")
    return 0


def _print_mistakes(mistakes: Iterable[str], as_json: bool, hide: Hide) -> int:
    """Print mistakes, as text one by one while they are found; return the exit code."""
    if as_json:
        sys.stdout.write(json.dumps({"ok": False, "mistakes": list(map(hide, mistakes))}, indent=1) + "\n")
    else:
        for mistake in map(hide, mistakes):
            sys.stdout.write(f"{mistake}\n")
            sys.stdout.flush()
    return ConfigurationError.exit_code


def _mistakes_in_flags(variables: Variables) -> Iterator[str]:
    """Yield the mistakes in vLLM's settings when the worker's own are wrong too."""
    chosen = settings.defaults(variables)
    environment.prepare(chosen)
    from worker.engine import arguments

    yield from arguments.mistakes(chosen)


def _rows(chosen: Settings, engine: Json) -> list[tuple[str, Any, str]]:
    """Return the name, value and source of each setting of the worker, and of vLLM's that differ from its defaults.

    vLLM's settings that nobody set are derived from others.
    """
    origins = chosen.variables.origins
    own = [(name.upper(), value, origins.get(name.upper(), "default")) for name, value in chosen.public().items()]
    listed = {*SET_BY_WORKER, *Settings.model_fields}
    others = [(name.upper(), value) for name, value in engine.items() if name not in listed]
    return own + [(name, value, origins.get(name, "derived")) for name, value in others]


def _command(chosen: Settings, engine: Json) -> str:
    words = ["vllm", "serve", redaction.public(chosen.model_name)]
    if engine.get("served_model_name") not in (None, [chosen.model_name]):
        words += ["--served-model-name", *engine["served_model_name"]]
    for name, value in engine.items():
        if name in SET_BY_WORKER:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(_text, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def _table(rows: list[tuple[str, str, str]]) -> str:
    rows = [("SETTING", "VALUE", "SOURCE"), *rows]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    second = min(second, 60)
    return "".join(f"{name:<{first}}  {value:<{second}}  {source}\n" for name, value, source in rows)
