"""Reads the settings from all sources, and says what is wrong with them or may be a mistake."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from worker import redaction
from worker.cluster import sizes
from worker.cluster.role import Role
from worker.cluster.sizes import Chosen, Shape
from worker.errors import ConfigurationError
from worker.settings import sources
from worker.settings.settings import MAX_CONCURRENCY, Settings
from worker.settings.sources import DEFAULT_MODEL, Variables

MINIMAL = (
    "MODEL_NAME", "WORKER_MODE", "RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID", "WORKER_IMAGE",
    "HOST", "PORT", "PORT_HEALTH", "METRICS_PORT", "WORKER_API_KEY", "STARTUP_FAILURE", "LOG_FORMAT",
)  # fmt: skip
"""The variables that are needed to report to callers that the other ones are wrong."""
NO_QUEUE = (
    "WORKER_MODE='queue': RunPod has set up no queue (RUNPOD_WEBHOOK_GET_JOB is not set). Unset WORKER_MODE, or use "
    "'http' or 'local'."
)


def read(environ: Mapping[str, str]) -> Settings:
    """Return the settings from the environment, the configuration file and the presets. Empty variables are unset.

    Raises:
        ConfigurationError: a value is wrong; the message has one line for each.
    """
    return from_variables(sources.collect(environ))


def read_or_report(environ: Mapping[str, str]) -> tuple[Settings, ConfigurationError | None]:
    """Return the settings and no error; or the error, and only the settings that are needed to report it to callers.

    Raises:
        ConfigurationError: even these few are wrong.
    """
    # Without the sources that may be wrong.
    variables = sources.collect({**environ, **sources.ONLY_ENVIRONMENT})
    try:
        variables = sources.collect(environ)
        return from_variables(variables), None
    except ConfigurationError as error:
        minimal = {name: variables.values[name] for name in MINIMAL if name in variables.values}
        for ignored in ((), ("WORKER_MODE",)):
            values = {name: value for name, value in minimal.items() if name not in ignored}
            with suppress(ConfigurationError):
                return from_variables(Variables(values, variables.origins)), error
        raise


def from_variables(variables: Variables) -> Settings:
    """Return the settings in these variables.

    Raises:
        ConfigurationError: a value is wrong; the message has one line for each.
    """
    values = {name.lower(): value for name, value in variables.values.items() if value.strip()}
    settings, mistakes = None, list(_mistakes_in_cluster(variables))
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        lines = [_line(variables, str(one["loc"][0]), one["input"], one["msg"]) for one in error.errors()]
        mistakes = [*lines, *mistakes]
    if settings is None or mistakes:
        raise ConfigurationError(redaction.remover(variables.secrets)("\n".join(mistakes)))
    settings._variables = variables
    if settings.worker_mode == "queue" and not settings.runpod_webhook_get_job and not settings.is_follower:
        raise ConfigurationError(NO_QUEUE)
    settings._variables = replace(variables, warnings=(*variables.warnings, *_warnings(settings)))
    return settings


def _mistakes_in_cluster(variables: Variables) -> Iterator[str]:
    """Yield what the variables of a cluster have wrong, and sizes that do not match its nodes."""
    try:
        role = Role.of(variables.values, variables.described)
    except ConfigurationError as error:
        yield from str(error).splitlines()
        return
    if role is not None:
        if variables.values.get("LORA_ALLOW", "").strip():
            yield (
                f"{variables.described('LORA_ALLOW')}: a cluster loads no adapters on request, because only the head "
                "would have their files. Name them in LORA_MODULES."
            )
        yield from sizes.mistakes(Shape(role.nodes, role.gpus), Chosen.of(variables.chosen))


def _warnings(settings: Settings) -> Iterator[str]:
    if settings.variables.origins.get("MODEL_NAME") == "default":
        yield f"MODEL_NAME is not set. The worker loads {DEFAULT_MODEL}."
    for name, value in settings.variables.values.items():
        if name.lower() in Settings.model_fields and len(text := value.strip()) > 1:
            if text[0] == text[-1] and text[0] in "\"'":
                yield f"{name} is in quotation marks, which are part of the value. Remove them."
            if "{{ RUNPOD_SECRET_" in text:
                yield f"{name} names a secret that RunPod has not replaced. Create it, or correct its name."
    if settings.is_pod and settings.mode == "http" and not settings.worker_api_key:
        yield "WORKER_API_KEY is not set: anybody who knows the pod's address can use the worker."
    if settings.role is not None and not (settings.cluster_key or settings.worker_api_key):
        yield "CLUSTER_KEY is not set: any machine that reaches CLUSTER_PORT can join the cluster."
    if settings.adapter_folder and not settings.lora_allow:
        yield "ADAPTER_FOLDER has no effect without LORA_ALLOW. It lists the adapters that requests may load."
    if (limit := settings.max_concurrency or 0) > MAX_CONCURRENCY:
        yield f"MAX_CONCURRENCY={limit} counts as {MAX_CONCURRENCY}, the most requests that a worker accepts."


def defaults(variables: Variables) -> Settings:
    """Return default settings with these variables, of which only vLLM's count."""
    settings = Settings()
    settings._variables = variables
    return settings


def _line(variables: Variables, name: str, value: Any, message: str) -> str:
    """Return the error message for one setting; without the value if it is secret."""
    shown = "" if redaction.is_secret(name) else f"={redaction.public(value)!r}"
    return f"{variables.described(name.upper())}{shown}: {message}"
