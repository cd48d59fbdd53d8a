"""The variables of other libraries that the worker sets in its process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.settings import environment, read


@pytest.fixture(autouse=True)
def environ() -> Iterator[None]:
    """Empty the environment for one test."""
    before = dict(os.environ)
    os.environ.clear()
    yield
    os.environ.clear()
    os.environ.update(before)


def prepared(**variables: str) -> dict[str, str]:
    """Return the environment after `prepare`, of a process that was started with these variables."""
    os.environ.update(variables)
    environment.prepare(read(environment.read()))
    return environment.read()


def test_variables_that_the_user_has_set_are_not_overwritten() -> None:
    variables = prepared(RUNPOD_LOG_LEVEL="DEBUG", TRITON_CACHE_DIR="/triton", PYTORCH_ALLOC_CONF="backend:native")
    assert variables["RUNPOD_LOG_LEVEL"] == "DEBUG"
    assert variables["TRITON_CACHE_DIR"] == "/triton"
    assert variables["PYTORCH_ALLOC_CONF"] == "backend:native"
    assert variables["RUNPOD_SKIP_GPU_CHECK"] == "true"


def test_variables_that_the_user_has_set_in_the_file_replace_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("hf-token: t\nrunpod-log-level: ERROR\n")
    variables = prepared(VLLM_CONFIG_FILE=str(file))
    assert (variables["HF_TOKEN"], variables["RUNPOD_LOG_LEVEL"]) == ("t", "ERROR")


def test_the_limits_of_media_apply_to_vllm_too() -> None:
    variables = prepared(MAX_IMAGE_PIXELS="9", MAX_AUDIO_BYTES="1048577", VLLM_MAX_IMAGE_PIXELS="10")
    assert variables["VLLM_MEDIA_CONNECTOR"] == environment.MEDIA_CONNECTOR
    assert variables["VLLM_MAX_IMAGE_PIXELS"] == "9"
    assert variables["VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"] == "2"


@pytest.mark.parametrize(
    ("variables", "expandable"),
    [
        pytest.param({}, True, id="default"),
        pytest.param({"ENABLE_SLEEP_MODE": "false"}, True, id="sleep mode off"),
        pytest.param({"ENABLE_SLEEP_MODE": "true"}, False, id="sleep mode on"),
        pytest.param({"KV_TRANSFER_CONFIG": "{}"}, False, id="transfer of the KV cache"),
        pytest.param({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, False, id="allocator of the user"),
    ],
)
def test_memory_segments_are_expandable_unless_a_setting_forbids_it(
    variables: dict[str, str], expandable: bool
) -> None:
    assert ("PYTORCH_ALLOC_CONF" in prepared(**variables)) is expandable


def test_only_the_workers_own_limit_counts_for_a_step_of_the_engine() -> None:
    name = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
    assert prepared()[name] == "1000000"
    assert prepared(**{name: "60"})[name] == "60"


def test_vllms_limit_for_a_step_stays_where_the_worker_has_none() -> None:
    assert "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" not in prepared(DISABLE_LOG_STATS="true")


def test_caches_of_compiled_code_are_inside_vllms_cache() -> None:
    variables = prepared(VLLM_CACHE_ROOT="/cache")
    assert variables["TRITON_CACHE_DIR"] == "/cache/triton"
    assert variables["FLASHINFER_WORKSPACE_BASE"] == "/cache/flashinfer"


def test_the_protocol_for_traces_is_set_under_the_name_that_vllm_reads() -> None:
    assert prepared(OTEL_EXPORTER_OTLP_PROTOCOL="grpc")["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "grpc"


def test_vllm_reads_the_workers_configuration_of_logging() -> None:
    environment.prepare(read({}), Path("/logging.json"))
    assert environment.read()["VLLM_LOGGING_CONFIG_PATH"] == "/logging.json"


def test_libraries_go_offline_unless_the_user_forbids_it() -> None:
    environment.go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    os.environ["HF_HUB_OFFLINE"] = "0"
    environment.go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_the_start_method_of_vllms_processes() -> None:
    environment.set_start_method("fork")
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"


def test_the_file_sets_variables_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("hf-home: /models/hf\nvllm-cache-root: /cache")
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    environment.prepare(read({"VLLM_CONFIG_FILE": str(file)}))
    assert (os.environ["HF_HOME"], os.environ["VLLM_CACHE_ROOT"]) == ("/models/hf", "/cache")


def test_the_nodes_of_a_cluster_use_the_interface_of_the_cluster() -> None:
    environment.use_interface("ens1", "10.0.0.2")
    assert os.environ["VLLM_HOST_IP"] == "10.0.0.2"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ens1"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=ens1"


def test_an_interface_that_the_user_has_chosen_stays() -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = "ens"
    environment.use_interface("ens1", "10.0.0.2")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ens"


def test_the_users_interface_may_be_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gloo-socket-ifname: ens2\n")
    assert prepared(VLLM_CONFIG_FILE=str(file))["GLOO_SOCKET_IFNAME"] == "ens2"
