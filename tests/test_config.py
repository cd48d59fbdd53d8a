"""The environment, given as a dict, becomes settings and a parser's arguments."""

import argparse
import json
from typing import Any, NoReturn

import pytest

from worker import config
from worker.errors import ConfigurationError


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def parser() -> Parser:
    """Return a parser with one flag of each kind that vLLM's has."""
    flags = Parser()
    flags.add_argument("model_tag", nargs="?")
    flags.add_argument("--model")
    flags.add_argument("--max-model-len", type=int)
    flags.add_argument("--dtype", choices=["auto", "half"])
    flags.add_argument("--hf-token", nargs="?")
    flags.add_argument("--port", type=int)
    flags.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    flags.add_argument("--disable-log-stats", action="store_true")
    flags.add_argument("--served-model-name", nargs="+")
    flags.add_argument("--lora-modules", nargs="+")
    flags.add_argument("--middleware", action="append")
    flags.add_argument("--limit-mm-per-prompt", type=json.loads)
    flags.add_argument("--tensor-parallel-size", "-tp", type=int)
    flags.add_argument("--chat-template")
    flags.add_argument("--gpu-memory-utilization", type=float)
    return flags


def parsed(environ: dict[str, str]) -> dict[str, Any]:
    arguments = config.engine_arguments(environ, config.load(environ), parser(), frozenset({"port"}))
    return {name: value for name, value in vars(parser().parse_args(arguments)).items() if value not in (None, False)}


@pytest.mark.parametrize(
    ("variable", "value", "result"),
    [
        pytest.param("MAX_MODEL_LEN", "2048", {"max_model_len": 2048}, id="number"),
        pytest.param("MAX_MODEL_LEN", " ", {}, id="empty counts as unset"),
        pytest.param("DTYPE", "half", {"dtype": "half"}, id="choice"),
        pytest.param("CHAT_TEMPLATE", "--x {{ a }}", {"chat_template": "--x {{ a }}"}, id="leading dashes"),
        pytest.param("ENFORCE_EAGER", "Yes", {"enforce_eager": True}, id="boolean on"),
        pytest.param("ENFORCE_EAGER", "0", {}, id="boolean off"),
        pytest.param("DISABLE_LOG_STATS", "true", {"disable_log_stats": True}, id="switch on"),
        pytest.param("DISABLE_LOG_STATS", "false", {}, id="switch off"),
        pytest.param("SERVED_MODEL_NAME", "a, b", {"served_model_name": ["a", "b"]}, id="list with commas"),
        pytest.param("SERVED_MODEL_NAME", '["a", "b"]', {"served_model_name": ["a", "b"]}, id="JSON list"),
        pytest.param(
            "LORA_MODULES",
            '[{"name": "l", "path": "p"}]',
            {"lora_modules": ['{"name": "l", "path": "p"}']},
            id="objects",
        ),
        pytest.param("LORA_MODULES", '{"name": "l"}', {"lora_modules": ['{"name": "l"}']}, id="one object"),
        pytest.param("MIDDLEWARE", "a,b", {"middleware": ["a", "b"]}, id="repeated flag"),
        pytest.param("LIMIT_MM_PER_PROMPT", '{"image": 2}', {"limit_mm_per_prompt": {"image": 2}}, id="JSON"),
        pytest.param("TENSOR_PARALLEL_SIZE", "2", {"tensor_parallel_size": 2}, id="flag with a short form"),
        pytest.param("GPU_MEMORY_UTIL", "0.5", {"gpu_memory_utilization": 0.5}, id="name of older workers"),
        pytest.param("VLLM_EXTRA_ARGS", "--dtype half -tp 4", {"dtype": "half", "tensor_parallel_size": 4}, id="extra"),
        pytest.param("PORT", "80", {}, id="not the engine's business"),
        pytest.param("HF_TOKEN", "secret", {}, id="never an argument"),
        pytest.param("MODEL", "other", {}, id="MODEL_NAME alone names the model"),
    ],
)
def test_a_flag_from_its_variable(variable: str, value: str, result: dict[str, Any]) -> None:
    assert parsed({variable: value}) == result


def test_off_is_passed_on_where_the_flag_can_say_it() -> None:
    environ = {"ENFORCE_EAGER": "false"}
    assert config.engine_arguments(environ, config.load(environ), parser(), frozenset()) == ["--no-enforce-eager"]


def test_vllms_name_and_extra_arguments_win() -> None:
    environ = {
        "GPU_MEMORY_UTIL": "0.5",
        "GPU_MEMORY_UTILIZATION": "0.6",
        "DTYPE": "auto",
        "VLLM_EXTRA_ARGS": "--dtype half",
    }
    assert parsed(environ) == {"gpu_memory_utilization": 0.6, "dtype": "half"}


def test_all_mistakes_are_told_at_once() -> None:
    environ = {"MAX_MODEL_LEN": "long", "DTYPE": "bf17", "ENFORCE_EAGER": "maybe", "LIMIT_MM_PER_PROMPT": "{image: 2}"}
    with pytest.raises(ConfigurationError) as caught:
        parsed(environ)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == "MAX_MODEL_LEN='long': invalid int value: 'long'; expected a whole number"
    assert lines[1].endswith("expected one of auto, half")
    assert lines[2] == "ENFORCE_EAGER='maybe': not a boolean; expected true or false"
    assert lines[3].startswith("LIMIT_MM_PER_PROMPT='{image: 2}'")
    assert lines[3].endswith("expected JSON")


def test_a_list_that_is_no_json_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="SERVED_MODEL_NAME"):
        parsed({"SERVED_MODEL_NAME": "[a, b"})


def test_extra_arguments_that_no_shell_would_read_are_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="VLLM_EXTRA_ARGS: No closing quotation"):
        parsed({"VLLM_EXTRA_ARGS": "--dtype 'half"})


@pytest.mark.parametrize("variable", ["MODEL_REVISION", "REVISION"])
def test_the_revision_goes_to_the_download_and_not_to_the_engine(variable: str) -> None:
    assert config.load({variable: "v1"}).model_revision == "v1"
    assert parsed({variable: "v1"}) == {}


def test_the_workers_own_settings() -> None:
    settings = config.load({"MODEL_NAME": "org/model", "MAX_CONCURRENCY": "30", "ALLOW_CONTROL_ROUTES": "on"})
    assert (settings.model_name, settings.max_concurrency, settings.allow_control_routes) == ("org/model", 30, True)
    assert config.load({}).model_name == config.DEFAULT_MODEL
    assert config.load({"MODEL_NAME": ""}).model_name == config.DEFAULT_MODEL


def test_mistakes_in_the_workers_own_settings() -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.load({"MAX_CONCURRENCY": "0", "ALLOW_CONTROL_ROUTES": "perhaps", "LOG_LEVEL": "loud"})
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["MAX_CONCURRENCY", "ALLOW_CONTROL_ROUTES", "LOG_LEVEL"]


def test_the_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(config.load({"HF_TOKEN": "hf_secret"}))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load({}).model_name = "other"


def test_the_users_word_on_a_library_counts() -> None:
    defaults = config.library_defaults({"RUNPOD_LOG_LEVEL": "DEBUG"})
    assert "RUNPOD_LOG_LEVEL" not in defaults
    assert defaults["RUNPOD_SKIP_GPU_CHECK"] == "true"


@pytest.mark.parametrize(
    ("environ", "mode", "port"),
    [
        pytest.param({}, "local", 8000, id="nothing"),
        pytest.param({"PORT": "9000"}, "http", 9000, id="port"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?"}, "queue", 8000, id="the platform's queue"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?", "PORT": "1"}, "queue", 1, id="queue and port"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?", "WORKER_MODE": "HTTP"}, "http", 8000, id="told"),
        pytest.param({"RUNPOD_POD_ID": "p", "WORKER_MODE": "http"}, "http", 80, id="on RunPod"),
    ],
)
def test_modes(environ: dict[str, str], mode: str, port: int) -> None:
    settings = config.load(environ)
    assert (settings.mode, settings.http_port) == (mode, port)


def test_keys_are_separated_by_commas_and_taken_from_vllms_variable_too() -> None:
    assert config.load({"WORKER_API_KEY": " a, b,,"}).worker_api_key == ("a", "b")
    assert config.load({"VLLM_API_KEY": "c"}).worker_api_key == ("c",)


def test_no_secret_is_public() -> None:
    environ = {"HF_TOKEN": "s3cret", "WORKER_API_KEY": "s3cret", "VLLM_EXTRA_ARGS": "--api-key s3cret"}
    public = config.load({**environ, "RUNPOD_WEBHOOK_GET_JOB": "http://s3cret?", "PORT": "1"}).public()
    assert "s3cret" not in str(public)
    assert (public["hf_token"], public["port"]) == ("***", 1)


@pytest.mark.parametrize(
    ("protocol", "endpoint"), [("grpc", "http://c:4317/"), ("http/protobuf", "http://c:4317/v1/traces")]
)
def test_traces_go_where_opentelemetry_says(protocol: str, endpoint: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317/", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    assert config.load(environ).otlp_traces_endpoint == endpoint
    assert config.library_defaults(environ)["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == protocol


def test_a_list_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"WORKER_API_KEY=',': .*expected one or more, separated by commas"):
        config.load({"WORKER_API_KEY": ","})


def test_the_password_of_a_url_is_not_public() -> None:
    public = config.load({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://user:pass@host/"}).public()
    assert public["otel_exporter_otlp_endpoint"] == "https://***@host/"
