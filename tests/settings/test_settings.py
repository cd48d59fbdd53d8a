"""What has been said becomes settings."""

import pytest

from worker.errors import ConfigurationError
from worker.settings import settings as config
from worker.settings.sources import DEFAULT_MODEL


def test_the_workers_own_settings() -> None:
    settings = config.load({"MODEL_NAME": "org/model", "MAX_CONCURRENCY": "30", "ALLOW_CONTROL_ROUTES": "on"})
    assert (settings.model_name, settings.max_concurrency, settings.allow_control_routes) == ("org/model", 30, True)
    assert config.load({}).model_name == DEFAULT_MODEL
    assert config.load({"MODEL_NAME": ""}).model_name == DEFAULT_MODEL


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


def test_keys_are_separated_by_commas() -> None:
    assert config.load({"WORKER_API_KEY": " a, b,,"}).worker_api_key == ("a", "b")


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


def test_a_token_in_a_file_reaches_the_hubs_library() -> None:
    assert config.library_defaults({"HF_TOKEN": "t"})["HF_TOKEN"] == "t"


@pytest.mark.parametrize(("sleep", "segments"), [("true", False), ("", True)])
def test_memory_has_segments_that_grow_unless_the_model_may_sleep(sleep: str, segments: bool) -> None:
    assert ("PYTORCH_ALLOC_CONF" in config.library_defaults({"ENABLE_SLEEP_MODE": sleep})) is segments
