"""`python handler.py --check`: prints the effective settings with their sources, or every mistake. Loads nothing."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from worker.errors import ConfigurationError, Json
from worker.model import weights
from worker.settings import Settings, environment, settings, sources
from worker.settings.sources import Variables

SET_BY_WORKER = ("model", "served_model_name", "api_key", "enable_log_requests", "enable_log_outputs", "logging_config")
"""vLLM's arguments that the worker sets itself."""

Row = tuple[str, Any, str]
"""A setting's name, value and source."""


def run(environ: Mapping[str, str], as_json: bool) -> int:
    """Print the effective settings, or all mistakes in them; return the exit code.

    Mistakes in the worker's own settings are printed at once. Importing vLLM, which checks its own, takes seconds.
    """
    report = _Report(as_json)
    try:
        variables = sources.collect(environ)
    except ConfigurationError as error:
        report.add(str(error).splitlines())
        return report.fail()
    try:
        chosen = settings.from_variables(variables)
        environment.prepare(chosen)
        folders = weights.locate(chosen)
    except ConfigurationError as error:
        report.add(str(error).splitlines())
        report.add(_mistakes_for_vllm(variables))
        return report.fail()
    from worker.engine import arguments

    try:
        args = arguments.parse_arguments(chosen)
        arguments.place(args, chosen, {name: folder for name, folder in folders.items() if folder})
    except ConfigurationError as error:
        report.add(str(error).splitlines())
        return report.fail()
    engine = arguments.changed(args)
    rows = [*_own_rows(chosen), *_engine_rows(engine, variables)]
    report.succeed(rows, _command(chosen, engine), [*variables.warnings, *arguments.remarks(chosen)])
    return 0


def _mistakes_for_vllm(variables: Variables) -> list[str]:
    """Return the mistakes in vLLM's settings when the worker's own are wrong too."""
    chosen = settings.defaults(variables)
    environment.prepare(chosen)
    from worker.engine import arguments

    return arguments.mistakes(chosen)


class _Report:
    """The output, as text or as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._mistakes: list[str] = []

    def add(self, mistakes: Iterable[str]) -> None:
        """Add mistakes; print them at once unless the output is JSON."""
        for mistake in mistakes:
            self._mistakes.append(mistake)
            if not self._as_json:
                sys.stdout.write(f"{mistake}\n")
        sys.stdout.flush()

    def fail(self) -> int:
        """Finish a report of mistakes; return the exit code."""
        if self._as_json:
            sys.stdout.write(json.dumps({"ok": False, "mistakes": self._mistakes}, indent=1) + "\n")
        return ConfigurationError.exit_code

    def succeed(self, rows: list[Row], command: str, warnings: list[str]) -> None:
        """Print the settings, the equivalent command and warnings."""
        if self._as_json:
            listed = [dict(zip(("setting", "value", "source"), row, strict=True)) for row in rows]
            result = {"ok": True, "settings": listed, "command": command, "warnings": warnings}
            sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
        else:
            sys.stdout.write(_table([(name, _text(value), source) for name, value, source in rows]))
            sys.stdout.write(f"\nEquivalent command:\n{command}\n")
            sys.stdout.write("".join(f"\nWarning: {warning}" for warning in warnings) + "\n")


def _own_rows(chosen: Settings) -> list[Row]:
    origins = chosen.variables.origins
    return [(name.upper(), value, origins.get(name.upper(), "default")) for name, value in chosen.public().items()]


def _engine_rows(engine: Json, variables: Variables) -> list[Row]:
    """Return vLLM's arguments that differ from its defaults. Those that nobody set are derived from others."""
    own = {name.upper() for name in Settings.model_fields}
    rows = ((name.upper(), value) for name, value in engine.items() if name not in SET_BY_WORKER)
    return [(name, value, variables.origins.get(name, "derived")) for name, value in rows if name not in own]


def _command(chosen: Settings, engine: Json) -> str:
    words = ["vllm", "serve", chosen.model_name]
    if engine.get("served_model_name") not in (None, [chosen.model_name]):
        words += ["--served-model-name", *engine["served_model_name"]]
    for name, value in engine.items():
        if name in SET_BY_WORKER:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(_text, value)]
        else:
            words += [flag, _text(value)]
    return shlex.join(words)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def _table(rows: list[tuple[str, str, str]]) -> str:
    rows = [("SETTING", "VALUE", "SOURCE"), *rows]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    second = min(second, 60)
    return "".join(f"{name:<{first}}  {value:<{second}}  {source}\n" for name, value, source in rows)
