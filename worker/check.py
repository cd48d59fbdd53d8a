"""`python handler.py --check`: what the worker would run with, and where each value comes from. Nothing is loaded."""

import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from worker.errors import ConfigurationError, Json
from worker.model.weights import found
from worker.settings import settings as config
from worker.settings import sources
from worker.settings.settings import Settings
from worker.settings.sources import Sources

WORKERS_OWN = ("model", "served_model_name", "api_key", "enable_log_requests", "enable_log_outputs", "logging_config")
"""Arguments that the worker sets itself."""


def run(environ: Mapping[str, str], as_json: bool) -> int:
    """Print the effective settings, or all that is wrong with them; return the exit code.

    What is wrong with the worker's own settings is printed at once; only then is vLLM, which takes seconds, imported.
    """
    mistakes: list[str] = []

    def tell(error: ConfigurationError) -> None:
        lines = str(error).splitlines()
        mistakes.extend(lines)
        if not as_json:
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()

    try:
        said = sources.gather(environ)
        try:
            settings = config.load(said.values, said.told)
            folders = found(settings, said.values)
        except ConfigurationError as error:
            tell(error)
        from worker.engine import arguments

        if mistakes:
            raise ConfigurationError("\n".join(arguments.mistakes(said)))
        args = arguments.parse_arguments(said, settings)
        arguments.place(args, said, {wanted.written: folder for wanted, folder in folders.items() if folder})
        engine = arguments.changed(args)
        warnings = [*said.warnings, *arguments.remarks(said)]
    except ConfigurationError as error:
        tell(error)
        if as_json:
            sys.stdout.write(json.dumps({"ok": False, "mistakes": mistakes}, indent=1) + "\n")
        return error.exit_code
    rows = [*_own(settings, said), *_engines(engine, said)]
    command = _command(settings, engine)
    if as_json:
        listed = [dict(zip(("setting", "value", "source"), row, strict=True)) for row in rows]
        result = {"ok": True, "settings": listed, "command": command, "warnings": warnings}
        sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    else:
        sys.stdout.write(_table([(name, _plain(value), source) for name, value, source in rows]))
        sys.stdout.write(f"\nThe same as:\n{command}\n" + "".join(f"\nWarning: {one}" for one in warnings) + "\n")
    return 0


def _own(settings: Settings, said: Sources) -> list[tuple[str, Any, str]]:
    public = settings.public()
    return [(name.upper(), value, said.origins.get(name.upper(), "default")) for name, value in public.items()]


def _engines(engine: Json, said: Sources) -> list[tuple[str, Any, str]]:
    """Return vLLM's arguments that differ from its defaults; what nobody said follows from something else."""
    mine = {name.upper() for name in Settings.model_fields}
    named = ((name.upper(), value) for name, value in engine.items() if name not in WORKERS_OWN)
    return [(name, value, said.origins.get(name, "derived")) for name, value in named if name not in mine]


def _command(settings: Settings, engine: Json) -> str:
    words = ["vllm", "serve", settings.model_name]
    if engine.get("served_model_name") not in (None, [settings.model_name]):
        words += ["--served-model-name", *engine["served_model_name"]]
    for name, value in engine.items():
        if name in WORKERS_OWN:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(_plain, value)]
        else:
            words += [flag, _plain(value)]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def _table(rows: list[tuple[str, str, str]]) -> str:
    rows = [("SETTING", "VALUE", "SOURCE"), *rows]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    second = min(second, 60)
    return "".join(f"{name:<{first}}  {value:<{second}}  {source}\n" for name, value, source in rows)
