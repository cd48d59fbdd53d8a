"""Secrets that are planted in every setting appear in no output: errors, log lines, `/info`, `--check`, refusals."""

import argparse
import json
import logging
import logging.config
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from standin import WorkerProcess
from tests.support.ports import free_port
from tests.support.tiny import MODEL, ROOT
from worker import redaction
from worker.engine.arguments import SERVER_FLAGS, changed, make_parser, parse_arguments
from worker.errors import ConfigurationError
from worker.settings import Settings, flags, legacy, read_or_report, sources
from worker.telemetry import logs

SECRET = "S3CR3T-0123"
ANYWHERE = [
    pytest.param(f"http://user:{SECRET}/x@host/y", id="password with a slash"),
    pytest.param(f"http://user:a@{SECRET}#?@host/y", id="password with other separators"),
    pytest.param(f"https://host/x?a=1&api_key={SECRET}&b=2", id="query"),
    pytest.param(json.dumps({"token": SECRET}), id="JSON"),
    pytest.param(json.dumps({"a": [{"headers": {"x": SECRET}}]}), id="nested JSON"),
    pytest.param(json.dumps([{"name": "x", "path": "y", "password": SECRET}]), id="list"),
    pytest.param(f'{{"token": "{SECRET}{"x" * 200}"', id="long JSON that is cut off"),
    pytest.param(f"authorization=Bearer {SECRET},a=b", id="header"),
]
"""Values in which the secret shows wherever they are."""
IN_SECRET_SETTINGS = [
    pytest.param(SECRET, id="plain"),
    pytest.param(f"[{SECRET}", id="list that is cut off"),
    pytest.param(f'{{"a": {SECRET}', id="object that is cut off"),
    pytest.param(f'["x", {{"a": "{SECRET}"}}]', id="wrong items"),
    pytest.param(f"{SECRET}, {SECRET},", id="several"),
    pytest.param(f"Bearer {SECRET}\n", id="with the scheme"),
]
SECRET_SETTINGS = ["HF_TOKEN", "WORKER_API_KEY", "VLLM_API_KEY", "API_KEY", "RUNPOD_WEBHOOK_GET_JOB"]
OTHERS = [
    "RUNPOD_AI_API_KEY",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "AWS_SECRET_ACCESS_KEY",
]
"""Secret settings of other programs."""
EXTRA_ARGS = [
    pytest.param(f"--api-key {SECRET} --hf-token={SECRET}", id="secret flags"),
    pytest.param(f"--sseed {SECRET}", id="unknown flag"),
    pytest.param(f"--seed {SECRET}", id="number"),
    pytest.param(f"--dtype={SECRET}", id="choice"),
    pytest.param(f"--max-model-len {SECRET} {SECRET}", id="too many values"),
    pytest.param(f"--se={SECRET}", id="ambiguous flag"),
    pytest.param(f"--api-key '{SECRET}", id="open quotation"),
    pytest.param(f"--model-loader-extra-config.token {SECRET}", id="key as a flag"),
    pytest.param(f"""--model-loader-extra-config '{{"token": "{SECRET}"}}'""", id="JSON"),
    pytest.param(f"""--structured-outputs-config '{{"token": "{SECRET}"}}'""", id="JSON with a wrong key"),
    pytest.param(f"""--kv-transfer-config '{{"kv_role": {{"token": "{SECRET}"}}}}'""", id="JSON with a wrong value"),
    pytest.param(f"""--limit-mm-per-prompt '{{"token": "{SECRET}'""", id="JSON that is cut off"),
    pytest.param(f"--otlp-traces-endpoint http://u:{SECRET}/x@host", id="URL"),
    pytest.param(f"--reasoning-parser {SECRET}", id="parser"),
    pytest.param(f"--chat-template {SECRET}.jinja", id="file"),
    pytest.param(f"--config {SECRET}.yaml", id="configuration file"),
]


def printed(environ: dict[str, str]) -> str:
    """Return the error, the settings as `/info` and `repr` show them, and the warnings."""
    try:
        settings, error = read_or_report(environ)
    except ConfigurationError as fatal:
        return str(fatal)
    return f"{error} {settings.public()} {settings!r} {settings.variables!r} {settings.variables.warnings}"


@pytest.mark.parametrize("value", ANYWHERE)
def test_secrets_in_the_workers_settings(value: str, tmp_path: Path) -> None:
    names = [*(field.upper() for field in Settings.model_fields), *SECRET_SETTINGS, *OTHERS, "PRESET", "TASK", "X"]
    for name in names:
        assert SECRET not in printed({name: value}), name
    file = tmp_path / "config.yaml"
    file.write_text("".join(f"{name.lower()}: {json.dumps(value)}\n" for name in names))
    assert SECRET not in printed({"VLLM_CONFIG_FILE": str(file)})
    assert SECRET not in printed({"VLLM_CONFIG_FILE": value})


@pytest.mark.parametrize("name", [*SECRET_SETTINGS, *OTHERS])
@pytest.mark.parametrize("value", IN_SECRET_SETTINGS)
def test_secret_settings(name: str, value: str) -> None:
    assert SECRET not in printed({name: value, "MAX_QUEUE": "x"})
    assert SECRET not in printed({name: value})


def test_a_yaml_list_of_keys_is_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for keys in (f"[{SECRET}]", f"[{SECRET}", f"[{{a: {SECRET}}}]", f"{{a: {SECRET}}}"):
        file.write_text(f"worker-api-key: {keys}\n")
        assert SECRET not in printed({"VLLM_CONFIG_FILE": str(file)})


@pytest.mark.parametrize("name", [*legacy.TRANSLATED, *legacy.aliases(), *legacy.without_effect()])
def test_secrets_in_old_settings(name: str) -> None:
    assert SECRET not in printed({name: f"http://user:{SECRET}/x@host"})


@pytest.mark.parametrize("value", [*ANYWHERE, pytest.param(json.dumps({"backend": {"key": SECRET}}), id="wrong type")])
def test_secrets_in_vllms_flags(value: str) -> None:
    """The value is planted in every flag: in those that refuse it, and in those that accept it."""
    parser = make_parser()
    # `authorization=…` would be an adapter with this name, and its path.
    names = flags.settable(parser, SERVER_FLAGS | {"lora_modules"})
    mistakes = mistakes_in(dict.fromkeys(names, value), parser)
    assert SECRET not in mistakes
    refused = {line.partition("=")[0] for line in mistakes.splitlines()}
    accepted = dict.fromkeys(names.keys() - refused, value)
    assert refused
    assert len(accepted) > 20
    arguments = changed(parser.parse_args(flags.arguments(accepted, parser, SERVER_FLAGS)))
    assert len(arguments) > 20
    assert SECRET not in json.dumps(arguments)


def mistakes_in(variables: dict[str, str], parser: argparse.ArgumentParser) -> str:
    try:
        flags.arguments(variables, parser, SERVER_FLAGS)
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("extra", EXTRA_ARGS)
def test_secrets_in_extra_arguments(extra: str) -> None:
    settings, _ = read_or_report({"MODEL_NAME": str(MODEL), "VLLM_EXTRA_ARGS": extra})
    try:
        text = json.dumps(changed(parse_arguments(settings)))
    except ConfigurationError as error:
        text = str(error)
    assert SECRET not in text + printed({"VLLM_EXTRA_ARGS": extra})


@pytest.fixture
def log_file(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """The captured stderr. The configuration of `logging` is restored afterwards."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield capfd
    root.handlers[:], root.level = before


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("value", [*ANYWHERE[:6], ANYWHERE[7], *EXTRA_ARGS[:1]])
def test_secrets_in_log_lines(
    value: str, form: logs.Format, tmp_path: Path, log_file: pytest.CaptureFixture[str]
) -> None:
    """Other programs log settings in their own words: as text, `repr`, URL part, exception or extra field."""
    name = "VLLM_EXTRA_ARGS" if value.startswith("--") else "ADDITIONAL_CONFIG"
    secrets = sources.collect({name: value, "WORKER_API_KEY": "another-key"}).secrets
    logging.config.dictConfig(logs.configuration(form, "INFO", "INFO", False, tmp_path / "cause", secrets))
    log = logging.getLogger("vllm.test")
    log.info("args: %s %r", value, {"token": SECRET})
    log.info("non-default args: %s", {"x": value}, extra={"detail": value, "key": "another-key"})
    try:
        raise ValueError(f"Cannot use {SECRET}: {value!r}")
    except ValueError:
        log.exception("It broke")
    lines = log_file.readouterr().err
    assert len(lines.splitlines()) >= 3
    for text in (lines, (tmp_path / "cause").read_text()):
        assert SECRET not in text
        assert "another-key" not in text
        assert redaction.HIDDEN in text


def test_vllms_processes_remove_secrets_from_their_log(tmp_path: Path) -> None:
    """They configure `logging` with the worker's file."""
    file = tmp_path / "logging.json"
    file.write_text(json.dumps(logs.configuration("json", "INFO", "INFO", False, tmp_path / "cause", [SECRET])))
    program = (
        "import argparse; from worker.engine.versions import configure_logging_from_args; from vllm.logger import "
        "init_logger; configure_logging_from_args(argparse.Namespace()); "
        f"init_logger('vllm.engine').info('config: %s', {{'x': '{SECRET}'}})"
    )
    environ = {"PATH": "/usr/bin:/bin", "VLLM_LOGGING_CONFIG_PATH": str(file)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "config: {'x': '***'}" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def check(*options: str, **environ: str) -> str:
    """Return everything that `--check` prints."""
    command = [sys.executable, "handler.py", "--check", *options]
    base = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "MODEL_NAME": str(MODEL)}
    return subprocess.run(command, env=base | environ, cwd=ROOT, capture_output=True, text=True, check=False).stdout


PLANTED = {
    "HF_TOKEN": SECRET,
    "VLLM_API_KEY": SECRET,
    "RUNPOD_AI_API_KEY": SECRET,
    "RUNPOD_WEBHOOK_GET_JOB": f"http://host/{SECRET}?",
    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{SECRET}/#@host:4317",
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{SECRET}",
    "MODEL_LOADER_EXTRA_CONFIG": json.dumps({"token": SECRET}),
    "ADDITIONAL_CONFIG": json.dumps({"headers": {"x": SECRET}}),
    "MEDIA_ALLOWED_DOMAINS": f"http://user:{SECRET}@host",
    "SPECULATIVE_MODEL": f"http://user:{SECRET}@host/model",
    "VLLM_EXTRA_ARGS": f"--api-key {SECRET} --allowed-media-domains http://user:{SECRET}@host",
}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_check_prints_no_secrets(options: list[str]) -> None:
    text = check(*options, **PLANTED)
    assert SECRET not in text
    assert re.search("http://\\*\\*\\*@host:4317", text)
    mistakes = check(
        *options, **PLANTED, PORT="x", DTYPE="bf17", STRUCTURED_OUTPUTS_CONFIG=json.dumps({"token": SECRET})
    )
    assert SECRET not in mistakes
    assert "DTYPE='bf17'" in mistakes


def test_a_worker_that_refuses_its_callers_reveals_no_secrets(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    environ = {**PLANTED, "WORKER_MODE": "http", "PORT": str(port), "DTYPE": "bf17", "MODEL_NAME": str(MODEL)}
    wrong = {"STRUCTURED_OUTPUTS_CONFIG": json.dumps({"token": SECRET}), "LOG_LEVEL": "DEBUG"}
    with log.open("wb") as output, WorkerProcess([sys.executable, "handler.py"], environ | wrong, output) as worker:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {SECRET}"},
            transport=httpx.HTTPTransport(retries=8),
            timeout=60,
        ) as client:
            answers = [client.get("/health").text, wait_for_refusal(client), client.get("/info").text]
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=30)
    assert "DTYPE='bf17'" in answers[1]
    for text in (*answers, log.read_text()):
        assert text
        assert SECRET not in text


def wait_for_refusal(client: httpx.Client) -> str:
    """Return the answer to a request once the worker has imported vLLM and found the mistakes."""
    text = ""
    for _ in range(600):
        text = client.post("/v1/chat/completions", json={}).text
        if "loading" not in text:
            break
        time.sleep(0.1)
    return text
