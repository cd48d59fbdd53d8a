"""Variables from the environment, a file, older names and presets: which source wins, and which warnings appear."""

import json
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.settings import read, sources
from worker.settings.sources import collect, near_misses


def test_the_environment_comes_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: Qwen/Qwen2-VL-7B-Instruct\nmax-num-seqs: 4\nmax_model_len: 1024\nenforce-eager: true\n")
    variables = collect({"VLLM_CONFIG_FILE": str(file), "MAX_MODEL_LEN": "512"})
    sourced = {name: (variables.values[name], variables.origins[name]) for name in variables.origins}
    assert sourced["MODEL_NAME"] == ("Qwen/Qwen2-VL-7B-Instruct", "config.yaml")
    assert sourced["MAX_MODEL_LEN"] == ("512", "environment")
    assert sourced["MAX_NUM_SEQS"] == ("4", "config.yaml")
    assert sourced["ENFORCE_EAGER"] == ("true", "config.yaml")
    assert sourced["MAX_NUM_BATCHED_TOKENS"] == ("10240", "preset qwen2-vl-7b")
    assert variables.described("MAX_NUM_SEQS") == "MAX_NUM_SEQS (config.yaml)"


def test_an_old_name_in_the_environment_comes_before_a_new_one_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gpu-memory-utilization: 0.9\nmodel: org/m\napi-key: [a, b]\nrevision: 2024-01-01\n")
    environ = {"VLLM_CONFIG_FILE": str(file), "GPU_MEMORY_UTIL": "0.5", "MODEL": "another program's"}
    values = collect(environ).values
    assert (values["GPU_MEMORY_UTILIZATION"], values["MODEL_NAME"]) == ("0.5", "org/m")
    assert read(environ).worker_api_key == ("a", "b")
    assert values["MODEL_REVISION"] == '"2024-01-01"'


def test_lists_and_objects_in_a_file_become_json(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("served-model-name: [a, b]\nlimit-mm-per-prompt: {image: 2}\nseed: null\n")
    values = collect({"VLLM_CONFIG_FILE": str(file)}).values
    assert json.loads(values["SERVED_MODEL_NAME"]) == ["a", "b"]
    assert json.loads(values["LIMIT_MM_PER_PROMPT"]) == {"image": 2}
    assert "SEED" not in values


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "invalid YAML in line"), ("- a", "expected keys and values"), (None, "No such file")],
)
def test_an_invalid_file(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        collect({"VLLM_CONFIG_FILE": str(file)})


def test_the_default_model_has_its_preset() -> None:
    values = collect({}).values
    assert values["MODEL_NAME"] == read({}).model_name == "Qwen/Qwen2-VL-7B-Instruct"
    assert values["MAX_MODEL_LEN"] == "32768"
    assert values["IMAGE_LIMIT"] == "5"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"MODEL_NAME": "unsloth/Qwen2.5-VL-72B-Instruct"}, "qwen2.5-vl-72b"),
        ({"MODEL_NAME": "/models/Llama-3.1-8B-Instruct/"}, "llama-3"),
        ({"MODEL_NAME": "org/other"}, None),
        ({"MODEL_NAME": "Qwen/Qwen3-4B-Instruct-2507"}, "qwen3-instruct"),
        ({"MODEL_NAME": "Qwen/Qwen3-Embedding-8B"}, None),
        ({"MODEL_NAME": "Qwen/Qwen3-8B"}, "qwen3"),
        ({"MODEL_NAME": "Qwen/Qwen2.5-VL-32B-Instruct-AWQ"}, "qwen2.5-vl-32b"),
        ({"MODEL_NAME": "mistral-community/pixtral-12b"}, None),
        ({"MODEL_NAME": "org/other", "PRESET": "gpt-oss"}, "gpt-oss"),
        ({"PRESET": "none"}, None),
    ],
)
def test_the_preset_of_a_model(environ: dict[str, str], name: str | None) -> None:
    origins = {origin for origin in collect(environ).origins.values() if origin.startswith("preset")}
    assert origins == ({f"preset {name}"} if name else set())


def test_an_unknown_preset() -> None:
    with pytest.raises(ConfigurationError, match="PRESET='gpt': no such preset; expected auto, none, or one of"):
        collect({"PRESET": "gpt"})


def test_names_of_older_workers() -> None:
    environ = {"GPU_MEMORY_UTIL": "0.5", "VLLM_API_KEY": "k", "REVISION": "v1", "MODEL": "another program's"}
    values = collect(environ).values
    assert values["GPU_MEMORY_UTILIZATION"] == "0.5"
    assert values["WORKER_API_KEY"] == "k"
    assert values["MODEL_REVISION"] == "v1"
    assert values["MODEL_NAME"] == sources.DEFAULT_MODEL
    assert collect({**environ, "GPU_MEMORY_UTILIZATION": "0.6"}).values["GPU_MEMORY_UTILIZATION"] == "0.6"


@pytest.mark.parametrize(
    ("name", "value", "replacement"),
    [
        ("TASK", "embed", {"RUNNER": "pooling", "CONVERT": "embed"}),
        ("TASK", "reward", {"RUNNER": "pooling"}),
        ("SPECULATIVE_MODEL", "org/draft", {"SPECULATIVE_CONFIG": '{"model": "org/draft"}'}),
        ("ON_ENGINE_DEATH", "retry", {"UNFINISHED_JOBS": "leave"}),
        ("ON_ENGINE_DEATH", "fail", {"UNFINISHED_JOBS": "fail"}),
        ("LIMIT_MM_PER_PROMPT", "image=2,video=1", {"LIMIT_MM_PER_PROMPT": '{"image": 2, "video": 1}'}),
    ],
)
def test_old_settings_are_replaced(name: str, value: str, replacement: dict[str, str]) -> None:
    variables = collect({name: value})
    assert {new: variables.values[new] for new in replacement} == replacement
    assert name in replacement or any(name in warning for warning in variables.warnings)


@pytest.mark.parametrize("name", ["SWAP_SPACE", "DEFAULT_BATCH_SIZE", "ROPE_SCALING", "MAX_CONTEXT_LEN_TO_CAPTURE"])
def test_old_settings_without_effect_cause_a_warning(name: str) -> None:
    assert any(warning.startswith(f"{name} has no effect") for warning in collect({name: "1"}).warnings)


def test_a_value_without_a_replacement_causes_a_warning() -> None:
    assert "has no effect" in str(collect({"TASK": "no task"}).warnings)


def test_near_misses_are_reported_with_the_likely_name() -> None:
    known = {"MAX_MODEL_LEN", "TENSOR_PARALLEL_SIZE", "MODEL_NAME"}
    environ = {"MAX_MODEL_LENGTH": "1", "TENSOR_PARALEL_SIZE": "2", "MODEL_NAME": "org/m", "PATH": "/", "HOSTNAME": "h"}
    assert near_misses(collect(environ | {"HF_MODEL_NAME": "x"}), known) == [
        "MAX_MODEL_LENGTH is not a setting. Did you mean MAX_MODEL_LEN?",
        "TENSOR_PARALEL_SIZE is not a setting. Did you mean TENSOR_PARALLEL_SIZE?",
    ]


def test_values_are_not_shown() -> None:
    assert "s3cret" not in repr(collect({"HF_TOKEN": "s3cret"}))


CLUSTER = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("more", "file", "count"),
    [
        pytest.param({}, "", False, id="no number of machines"),
        pytest.param({"NUM_NODES": "1"}, "", False, id="one machine"),
        pytest.param({"NNODES": ""}, "", False, id="an empty number"),
        pytest.param({"NNODES": "2"}, "", True, id="vLLM's name"),
        pytest.param({"NUM_NODES": "2"}, "", True, id="RunPod's name"),
        pytest.param({}, "nnodes: 2", True, id="vLLM's name in the file"),
    ],
)
def test_variables_of_a_cluster_count_only_with_several_machines(
    tmp_path: Path, more: dict[str, str], file: str, *, count: bool
) -> None:
    if file:
        (tmp_path / "config.yaml").write_text(file)
        more = {"VLLM_CONFIG_FILE": str(tmp_path / "config.yaml")}
    values = collect({**CLUSTER, **more}).values
    assert CLUSTER.keys() & values.keys() == (CLUSTER.keys() if count else set())


def test_variables_of_runpods_clusters_are_no_misspelt_settings() -> None:
    names = "PRIMARY_ADDR PRIMARY_PORT NODE_ADDR NUM_NODES NUM_TRAINERS HOST_NODE_ADDR WORLD_SIZE GLOO_SOCKET_IFNAME"
    variables = collect({**CLUSTER, **dict.fromkeys(names.split(), "2")})
    known = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CLUSTER_PORT", "CLUSTER_KEY", "CLUSTER_TIMEOUT"}
    assert near_misses(variables, known) == []
