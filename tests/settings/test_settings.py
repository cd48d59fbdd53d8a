"""The worker's own settings: values, defaults, mistakes and secrets."""

from pathlib import Path

import pytest

from worker.cluster.role import Role
from worker.errors import ConfigurationError
from worker.settings import read, read_or_report
from worker.settings.sources import DEFAULT_MODEL

QUEUE = {"WORKER_MODE": "queue", "RUNPOD_WEBHOOK_GET_JOB": "http://x?"}


def test_the_workers_own_settings() -> None:
    settings = read({"MODEL_NAME": "org/model", "MAX_CONCURRENCY": "30", "ALLOW_CONTROL_ROUTES": "on"})
    assert (settings.model_name, settings.max_concurrency, settings.allow_control_routes) == ("org/model", 30, True)
    assert read({}).model_name == DEFAULT_MODEL
    assert read({"MODEL_NAME": ""}).model_name == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(QUEUE, 250, id="queue"),
        pytest.param({"WORKER_MODE": "http"}, 512, id="HTTP"),
        pytest.param({**QUEUE, "MAX_CONCURRENCY": "300"}, 300, id="set"),
        pytest.param({**QUEUE, "MAX_CONCURRENCY": "1000"}, 512, id="more than a worker accepts"),
    ],
)
def test_the_most_requests_at_once(environ: dict[str, str], expected: int) -> None:
    settings = read(environ)
    assert settings.concurrency(1024) == expected
    assert settings.max_concurrency or settings.concurrency(8) == 16


def test_mistakes_in_the_workers_own_settings() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({"MAX_CONCURRENCY": "-1", "ALLOW_CONTROL_ROUTES": "perhaps", "LOG_LEVEL": "loud"})
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == ["MAX_CONCURRENCY", "ALLOW_CONTROL_ROUTES", "LOG_LEVEL"]


def test_a_mistake_names_the_file_that_it_is_in(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-concurrency: many\n")
    with pytest.raises(ConfigurationError, match=r"MAX_CONCURRENCY \(config.yaml\)='many': "):
        read({"VLLM_CONFIG_FILE": str(file)})


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"MAX_CONCURRENCY": "many"}, id="wrong value"),
        pytest.param({"PRESET": "gpt"}, id="unknown preset"),
        pytest.param({"VLLM_CONFIG_FILE": "/missing.yaml"}, id="missing file"),
    ],
)
def test_the_settings_for_reporting_a_mistake_are_read_without_the_others(mistake: dict[str, str]) -> None:
    environ = {"MODEL_NAME": "org/model", "WORKER_API_KEY": "a", "PORT": "9000", "LOG_PROMPTS": "true", **mistake}
    settings, error = read_or_report(environ)
    assert isinstance(error, ConfigurationError)
    assert (settings.model_name, settings.worker_api_key, settings.ports) == ("org/model", ("a",), (9000,))
    assert not settings.log_prompts


def test_settings_without_mistakes_are_read_without_an_error() -> None:
    settings, error = read_or_report({"MAX_CONCURRENCY": "3"})
    assert (settings.max_concurrency, error) == (3, None)


def test_a_mistake_cannot_be_reported_if_the_settings_for_reporting_it_are_wrong_too() -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_or_report({"MAX_CONCURRENCY": "many", "PORT": "high"})
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == ["MAX_CONCURRENCY", "PORT"]


def test_the_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(read({"HF_TOKEN": "hf_secret"}))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read({}).model_name = "other"


@pytest.mark.parametrize(
    ("environ", "mode", "ports"),
    [
        pytest.param({}, "local", (), id="nothing"),
        pytest.param({"PORT": "9000"}, "http", (9000,), id="port"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?"}, "queue", (), id="RunPod's queue"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?", "PORT": "1"}, "queue", (), id="queue and port"),
        pytest.param({"RUNPOD_WEBHOOK_GET_JOB": "http://x?", "WORKER_MODE": "HTTP"}, "http", (8000,), id="WORKER_MODE"),
        pytest.param({"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_POD_ID": "p"}, "http", (80,), id="load balancer"),
        pytest.param({"RUNPOD_POD_ID": "p"}, "http", (8000,), id="pod"),
        pytest.param({"RUNPOD_POD_ID": "p", "PORT": "9000"}, "http", (9000,), id="pod with a port"),
        pytest.param({"WORKER_IMAGE": "0.2.0"}, "http", (8000,), id="docker run"),
        pytest.param({"WORKER_IMAGE": "0.2.0", "RUNPOD_WEBHOOK_GET_JOB": "http://x?"}, "queue", (), id="image, queue"),
        pytest.param({"WORKER_IMAGE": "0.2.0", "WORKER_MODE": "local"}, "local", (), id="one job in the image"),
        pytest.param({"PORT": "9000", "WORKER_MODE": "local"}, "local", (), id="local in spite of a port"),
        pytest.param({**QUEUE, "METRICS_PORT": "9"}, "queue", (9,), id="queue with metrics"),
        pytest.param({"PORT": "1", "PORT_HEALTH": "2", "METRICS_PORT": "1"}, "http", (1, 2), id="the same port twice"),
    ],
)
def test_mode_and_ports(environ: dict[str, str], mode: str, ports: tuple[int, ...]) -> None:
    settings = read(environ)
    assert (settings.mode, settings.ports) == (mode, ports)


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        pytest.param({"MODEL_NAME": ""}, "MODEL_NAME is not set", id="no model"),
        pytest.param({"MODEL_NAME": '"org/model"'}, "MODEL_NAME is in quotation marks", id="quotation marks"),
        pytest.param({"HF_TOKEN": "{{ RUNPOD_SECRET_hf }}"}, "HF_TOKEN names a secret", id="an unknown secret"),
        pytest.param({"RUNPOD_POD_ID": "p"}, "WORKER_API_KEY", id="a pod that everybody can use"),
        pytest.param({"MAX_CONCURRENCY": "1000"}, "MAX_CONCURRENCY=1000", id="more requests than a worker accepts"),
        pytest.param({"ADAPTER_FOLDER": "/a"}, "ADAPTER_FOLDER has no effect", id="adapters that nobody may load"),
    ],
)
def test_settings_that_may_be_a_mistake_cause_a_warning(environ: dict[str, str], variable: str) -> None:
    (warning,) = read({"MODEL_NAME": "org/model", **environ}).variables.warnings
    assert warning.startswith(variable)


@pytest.mark.parametrize("more", [{"WORKER_API_KEY": "k"}, {"RUNPOD_ENDPOINT_ID": "e"}, {"WORKER_MODE": "local"}])
def test_other_workers_need_no_key(more: dict[str, str]) -> None:
    assert read({"MODEL_NAME": "org/model", "RUNPOD_POD_ID": "p", **more}).variables.warnings == ()


def test_a_queue_worker_needs_a_queue() -> None:
    with pytest.raises(ConfigurationError, match="RunPod has set up no queue"):
        read({"WORKER_MODE": "queue"})


@pytest.mark.parametrize("mode", ["Pod", "queue"])
def test_a_wrong_mode_is_reported_in_the_mode_of_the_environment(mode: str) -> None:
    settings, error = read_or_report({"WORKER_MODE": mode, "RUNPOD_POD_ID": "p", "WORKER_API_KEY": "k"})
    assert "WORKER_MODE=" in str(error)
    assert (settings.mode, settings.worker_api_key) == ("http", ("k",))


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        pytest.param({}, "/runpod-volume", id="own machine"),
        pytest.param({"RUNPOD_POD_ID": "p"}, "/workspace", id="pod"),
        pytest.param({"RUNPOD_POD_ID": "p", "RUNPOD_ENDPOINT_ID": "e"}, "/runpod-volume", id="serverless"),
        pytest.param({"RUNPOD_POD_ID": "p", "BASE_PATH": "/data"}, "/data", id="BASE_PATH"),
    ],
)
def test_where_the_volume_is(environ: dict[str, str], folder: str) -> None:
    assert read(environ).volume == Path(folder)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        pytest.param(QUEUE, 2.5, id="queue"),
        pytest.param({"WORKER_MODE": "http"}, 30.0, id="HTTP"),
        pytest.param({"WORKER_MODE": "http", "DRAIN_SECONDS": "0"}, 0.0, id="DRAIN_SECONDS"),
    ],
)
def test_the_time_for_running_requests_at_a_stop(environ: dict[str, str], seconds: float) -> None:
    assert read(environ).grace == seconds


def test_keys_are_separated_by_commas() -> None:
    assert read({"WORKER_API_KEY": " a, b,,"}).worker_api_key == ("a", "b")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        pytest.param("k1, k2", {"k1": "", "k2": ""}, id="keys without names"),
        pytest.param("ann:k1,bob:k2,k3", {"k1": "ann", "k2": "bob", "k3": ""}, id="keys with names"),
        pytest.param("ann:k1,ann:k2", {"k1": "ann", "k2": "ann"}, id="two keys of one name"),
        pytest.param("ann:k:1", {"k:1": "ann"}, id="a key with a colon"),
        pytest.param("ann:", {"ann:": ""}, id="nothing after the colon"),
    ],
)
def test_an_api_key_may_have_a_name(text: str, keys: dict[str, str]) -> None:
    assert read({"WORKER_API_KEY": text}).api_keys == keys


def test_secrets_are_not_public() -> None:
    environ = {"HF_TOKEN": "s3cret", "WORKER_API_KEY": "s3cret", "VLLM_EXTRA_ARGS": "--api-key s3cret"}
    public = read({**environ, "RUNPOD_WEBHOOK_GET_JOB": "http://s3cret?", "PORT": "1"}).public()
    assert "s3cret" not in str(public)
    assert (public["hf_token"], public["port"]) == ("***", 1)


@pytest.mark.parametrize(
    ("protocol", "endpoint"), [("grpc", "http://c:4317/"), ("http/protobuf", "http://c:4317/v1/traces")]
)
def test_the_endpoint_for_traces_depends_on_the_protocol(protocol: str, endpoint: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317/", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    assert read(environ).otlp_traces_endpoint == endpoint


def test_an_empty_list_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"WORKER_API_KEY: .*expected one or more, separated by commas"):
        read({"WORKER_API_KEY": ","})


def test_a_mistake_in_a_secret_does_not_reveal_it() -> None:
    with pytest.raises(ConfigurationError, match="WORKER_API_KEY: ") as raised:
        read({"WORKER_API_KEY": '["sk-very-secret"'})
    assert "sk-very-secret" not in str(raised.value)


@pytest.mark.parametrize("mistake", [{"MAX_QUEUE": "x"}, {"PRESET": "x"}, {"VLLM_CONFIG_FILE": "/no/such/file"}])
def test_a_mistake_leaves_the_key_in_force_whatever_it_is_called(mistake: dict[str, str]) -> None:
    settings, error = read_or_report({"VLLM_API_KEY": "key", "PORT": "80", **mistake})
    assert error is not None
    assert (settings.worker_api_key, settings.mode) == (("key",), "http")


def test_the_password_of_a_url_is_not_public() -> None:
    public = read({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://user:pass@host/"}).public()
    assert public["otel_exporter_otlp_endpoint"] == "https://***@host/"


CLUSTER = {"NUM_NODES": "2", "NODE_RANK": "1", "PRIMARY_ADDR": "10.0.0.1", "CLUSTER_KEY": "s3cret", "MODEL_NAME": "o/m"}


def test_the_settings_of_a_follower() -> None:
    """It has the ports of HTTP, whatever the mode."""
    settings = read({**CLUSTER, "WORKER_MODE": "queue", "NUM_TRAINERS": "8"})
    assert settings.role == Role(1, 2, "10.0.0.1", None, 8, 29501)
    assert (settings.is_follower, settings.ports) == (True, (8000,))
    assert (settings.cluster_port, settings.cluster_timeout, settings.cluster_key) == (29560, 600, "s3cret")
    assert settings.variables.warnings == ()
    assert "s3cret" not in repr(settings)


def test_a_single_machine_has_no_role() -> None:
    settings = read({**CLUSTER, "NUM_NODES": "1"})
    assert (settings.role, settings.is_follower, settings.ports) == (None, False, ())


def test_a_cluster_without_any_key_causes_a_warning() -> None:
    (warning,) = read({**CLUSTER, "CLUSTER_KEY": ""}).variables.warnings
    assert warning.startswith("CLUSTER_KEY is not set: any machine that reaches CLUSTER_PORT can join the cluster.")
    assert read({**CLUSTER, "CLUSTER_KEY": "", "WORKER_API_KEY": "k"}).variables.warnings == ()


def test_mistakes_of_a_cluster_are_reported_with_the_others_and_to_callers(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("nnodes: two\n")
    _, error = read_or_report({"VLLM_CONFIG_FILE": str(file), "MAX_QUEUE": "x", "CLUSTER_PORT": "0x"})
    assert [line.partition("=")[0] for line in str(error).splitlines()] == [
        "MAX_QUEUE",
        "CLUSTER_PORT",
        "NNODES (config.yaml)",
    ]


@pytest.mark.parametrize(
    ("more", "is_mistake"),
    [
        pytest.param({"TENSOR_PARALLEL_SIZE": "8", "PIPELINE_PARALLEL_SIZE": "3"}, True, id="too many GPUs"),
        pytest.param({"TENSOR_PARALLEL_SIZE": "8", "PIPELINE_PARALLEL_SIZE": "2"}, False, id="as many as there are"),
        pytest.param({"TENSOR_PARALLEL_SIZE": "auto"}, False, id="left to the worker"),
        pytest.param({"PRESET": "qwen2.5-vl-72b"}, False, id="a preset"),
    ],
)
def test_sizes_that_do_not_match_the_nodes_are_a_mistake(more: dict[str, str], *, is_mistake: bool) -> None:
    _, error = read_or_report({**CLUSTER, "NUM_TRAINERS": "8", **more})
    assert ("2 nodes with 8 GPUs" in str(error)) is is_mistake
