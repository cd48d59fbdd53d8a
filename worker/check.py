"""`python handler.py --check`: prints the effective settings with their sources, or every mistake. Loads nothing."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from worker import redaction
from worker.cluster import interface
from worker.cluster.role import Role
from worker.errors import ConfigurationError, Json
from worker.model import weights
from worker.settings import Settings, environment, reading, sources
from worker.settings.sources import Variables
from worker.telemetry import gpu

SET_BY_WORKER = ("model", "served_model_name", "enable_log_requests", "enable_log_outputs", "logging_config")
"""vLLM's arguments that the worker sets itself."""

Hide = Callable[[str], str]
"""Returns a text without the secrets in the settings."""

Row = tuple[str, Any, str]
"""A setting, its value and its source."""


def run(environ: Mapping[str, str], as_json: bool) -> int:
    """Print the effective settings, or all mistakes in them, and the warnings; return the exit code.

    Mistakes in the worker's own settings are printed at once. Importing vLLM, which checks its own, takes seconds.
    """
    mistakes = []
    try:
        variables = sources.collect(environ)
    except ConfigurationError as error:
        # The file cannot be read, or the preset does not exist. The other settings are checked without them.
        mistakes += str(error).splitlines()
        variables = sources.collect({**environ, **sources.ONLY_ENVIRONMENT})
    hide = redaction.remover({*variables.secrets, *redaction.secrets_in(environ)})
    try:
        chosen = reading.from_variables(variables)
        environment.prepare(chosen)
        folders = weights.locate(chosen)
        cluster, remarks = _cluster(chosen.role) if chosen.role else ([], [])
    except ConfigurationError as error:
        mistakes += str(error).splitlines()
    if mistakes:
        reported = {mistake.partition("=")[0] for mistake in mistakes}
        others = (mistake for mistake in _mistakes_in_flags(variables) if mistake.partition("=")[0] not in reported)
        every = chain(mistakes, others)
        return _print_mistakes(every, _warnings(reading.defaults(variables)), as_json, hide)
    from worker.engine import arguments

    try:
        args = arguments.parse_arguments(chosen)
        found = {name: folder for name, folder in folders.items() if folder}
        sizes = arguments.place(args, chosen, found, gpu.visible(chosen.libraries.visible_gpus))
    except ConfigurationError as error:
        return _print_mistakes(str(error).splitlines(), _warnings(chosen), as_json, hide)
    engine = arguments.changed(args)
    rows = [*_rows(chosen, engine), *cluster]
    if sizes is not None:
        assert chosen.role is not None
        rows.append(("CLUSTER_RANKS", sizes.ranks(chosen.role.rank), "derived"))
        rows.append(("CLUSTER_PLAN", sizes.why, "derived"))
        remarks += sizes.warnings
    _print_settings(rows, _command(chosen, engine), map(hide, chain(_warnings(chosen), remarks)), as_json)
    return 0


def _cluster(role: Role) -> tuple[list[Row], list[str]]:
    """Return rows about this machine's role in a cluster, and warnings.

    Raises:
        ConfigurationError: no interface has the node's address.
    """
    values = {
        "CLUSTER_ROLE": role.name,
        "CLUSTER_NODE": str(role),
        "CLUSTER_HEAD": role.head,
    }
    remarks: list[str] = []
    try:
        own = interface.find(role)
        values["CLUSTER_INTERFACE"] = f"{own.name} ({own.address})"
        remarks += interface.remarks(role, own)
    except interface.NetworkNotReadyError as error:
        remarks.append(str(error))
    return [(name, value, "derived") for name, value in values.items()], remarks


def _print_settings(rows: list[Row], command: str, warnings: Iterable[str], as_json: bool) -> None:
    if as_json:
        listed = [dict(zip(("setting", "value", "source"), row, strict=True)) for row in rows]
        result = {"ok": True, "settings": listed, "command": command, "warnings": list(warnings)}
        sys.stdout.write(json.dumps(result, indent=1, default=str) + "\n")
    else:
        sys.stdout.write(_table([(name, _text(value), source) for name, value, source in rows]))
        sys.stdout.write(f"\nEquivalent command:\n{command}\n")
        sys.stdout.write("".join(f"\nWarning: {warning}\n" for warning in warnings))


def _print_mistakes(mistakes: Iterable[str], warnings: Iterable[str], as_json: bool, hide: Hide) -> int:
    """Print mistakes, as text one by one while they are found, and then the warnings; return the exit code."""
    if as_json:
        result = {"ok": False, "mistakes": list(map(hide, mistakes)), "warnings": list(map(hide, warnings))}
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return ConfigurationError.exit_code
    for line in chain(map(hide, mistakes), (f"\nWarning: {hide(warning)}" for warning in warnings)):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return ConfigurationError.exit_code


def _warnings(chosen: Settings) -> Iterator[str]:
    """Yield the warnings about old, misspelt and ineffective variables."""
    yield from chosen.variables.warnings
    from worker.engine import arguments

    yield from arguments.remarks(chosen)


def _mistakes_in_flags(variables: Variables) -> Iterator[str]:
    """Yield the mistakes in vLLM's settings when the worker's own are wrong too."""
    chosen = reading.defaults(variables)
    environment.prepare(chosen)
    from worker.engine import arguments

    yield from arguments.mistakes(chosen)


def _rows(chosen: Settings, engine: Json) -> list[Row]:
    """Return the name, value and source of each setting of the worker, and of vLLM's that differ from its defaults.

    vLLM's settings that nobody set are derived from others.
    """
    origins = chosen.variables.origins
    given = chosen.public()
    effective = given | {"worker_mode": chosen.mode, "base_path": str(chosen.volume)}
    if chosen.mode == "http":
        effective["port"] = chosen.ports[0]
    own = [
        (name.upper(), value, origins.get(name.upper(), "default") if value == given.get(name) else "derived")
        for name, value in effective.items()
    ]
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
    if chosen.is_follower:
        words.append("--headless")
    return shlex.join(words)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def _table(rows: list[tuple[str, str, str]]) -> str:
    rows = [("SETTING", "VALUE", "SOURCE"), *rows]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    second = min(second, 60)
    return "".join(f"{name:<{first}}  {value:<{second}}  {source}\n" for name, value, source in rows)
