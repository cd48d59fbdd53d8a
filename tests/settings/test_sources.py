"""Who said what: the environment, a file, an older worker's names, a preset."""

import json
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.settings import settings as config
from worker.settings import sources
from worker.settings.sources import gather, near_misses


def test_the_environment_comes_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: Qwen/Qwen2-VL-7B-Instruct\nmax-num-seqs: 4\nmax_model_len: 1024\nenforce-eager: true\n")
    said = gather({"VLLM_CONFIG_FILE": str(file), "MAX_MODEL_LEN": "512"})
    told = {name: (said.values[name], said.origins[name]) for name in said.origins}
    assert told["MODEL_NAME"] == ("Qwen/Qwen2-VL-7B-Instruct", "config.yaml")
    assert told["MAX_MODEL_LEN"] == ("512", "environment")
    assert told["MAX_NUM_SEQS"] == ("4", "config.yaml")
    assert told["ENFORCE_EAGER"] == ("true", "config.yaml")
    assert told["MAX_NUM_BATCHED_TOKENS"] == ("10240", "preset qwen2-vl-7b")
    assert said.told("MAX_NUM_SEQS") == "MAX_NUM_SEQS (config.yaml)"


def test_an_old_name_in_the_environment_comes_before_a_new_one_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("gpu-memory-utilization: 0.9\nmodel: org/m\napi-key: [a, b]\nrevision: 2024-01-01\n")
    said = gather({"VLLM_CONFIG_FILE": str(file), "GPU_MEMORY_UTIL": "0.5", "MODEL": "somebody else's"})
    assert (said.values["GPU_MEMORY_UTILIZATION"], said.values["MODEL_NAME"]) == ("0.5", "org/m")
    assert config.load(said.values).worker_api_key == ("a", "b")
    assert said.values["MODEL_REVISION"] == '"2024-01-01"'


def test_lists_and_objects_of_a_file_are_json(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("served-model-name: [a, b]\nlimit-mm-per-prompt: {image: 2}\nseed: null\n")
    said = gather({"VLLM_CONFIG_FILE": str(file)}).values
    assert json.loads(said["SERVED_MODEL_NAME"]) == ["a", "b"]
    assert json.loads(said["LIMIT_MM_PER_PROMPT"]) == {"image": 2}
    assert "SEED" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "no valid YAML in line"), ("- a", "expected keys and values"), (None, "No such file")],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        gather({"VLLM_CONFIG_FILE": str(file)})


def test_the_default_model_has_its_preset() -> None:
    said = gather({})
    assert said.values["MODEL_NAME"] == config.load({}).model_name == "Qwen/Qwen2-VL-7B-Instruct"
    assert said.values["MAX_MODEL_LEN"] == "32768"
    assert said.values["IMAGE_LIMIT"] == "5"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"MODEL_NAME": "unsloth/Qwen2.5-VL-72B-Instruct"}, "qwen2.5-vl-72b"),
        ({"MODEL_NAME": "/models/Llama-3.1-8B-Instruct/"}, "llama-3"),
        ({"MODEL_NAME": "org/Some-Model-AWQ"}, "awq"),
        ({"MODEL_NAME": "org/other"}, None),
        ({"MODEL_NAME": "Qwen/Qwen3-4B-Instruct-2507"}, "qwen3-instruct"),
        ({"MODEL_NAME": "Qwen/Qwen3-Embedding-8B"}, None),
        ({"MODEL_NAME": "Qwen/Qwen3-8B"}, "qwen3"),
        ({"MODEL_NAME": "Qwen/Qwen2.5-VL-32B-Instruct-AWQ"}, "qwen2.5-vl-32b"),
        ({"MODEL_NAME": "OpenGVLab/InternVL3-8B"}, "internvl3"),
        ({"MODEL_NAME": "evil/InternVL3-8B"}, None),
        ({"MODEL_NAME": "mistral-community/pixtral-12b"}, None),
        ({"MODEL_NAME": "org/other", "PRESET": "gpt-oss"}, "gpt-oss"),
        ({"PRESET": "none"}, None),
    ],
)
def test_which_preset(environ: dict[str, str], name: str | None) -> None:
    origins = {origin for origin in gather(environ).origins.values() if origin.startswith("preset")}
    assert origins == ({f"preset {name}"} if name else set())


def test_a_preset_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="PRESET='gpt': no such preset; expected auto, none, or one of"):
        gather({"PRESET": "gpt"})


def test_names_of_older_workers() -> None:
    said = gather({"GPU_MEMORY_UTIL": "0.5", "VLLM_API_KEY": "k", "REVISION": "v1", "MODEL": "somebody else's"})
    assert said.values["GPU_MEMORY_UTILIZATION"] == "0.5"
    assert said.values["WORKER_API_KEY"] == "k"
    assert said.values["MODEL_REVISION"] == "v1"
    assert said.values["MODEL_NAME"] == sources.DEFAULT_MODEL
    assert gather({"GPU_MEMORY_UTIL": "0.5", "GPU_MEMORY_UTILIZATION": "0.6"}).values["GPU_MEMORY_UTILIZATION"] == "0.6"


@pytest.mark.parametrize(
    ("name", "value", "became"),
    [
        ("GUIDED_DECODING_BACKEND", "outlines", {"STRUCTURED_OUTPUTS_CONFIG": '{"backend": "outlines"}'}),
        ("TASK", "embed", {"RUNNER": "pooling", "CONVERT": "embed"}),
        ("TASK", "reward", {"RUNNER": "pooling"}),
        ("SPECULATIVE_MODEL", "org/draft", {"SPEC_MODEL": "org/draft"}),
        ("LIMIT_MM_PER_PROMPT", "image=2,video=1", {"LIMIT_MM_PER_PROMPT": '{"image": 2, "video": 1}'}),
    ],
)
def test_settings_that_have_become_others(name: str, value: str, became: dict[str, str]) -> None:
    said = gather({name: value})
    assert {new: said.values[new] for new in became} == became
    assert name in became or any(name in warning for warning in said.warnings)


@pytest.mark.parametrize("name", ["SWAP_SPACE", "DEFAULT_BATCH_SIZE", "ROPE_SCALING", "MAX_CONTEXT_LEN_TO_CAPTURE"])
def test_settings_without_effect_are_named(name: str) -> None:
    assert any(warning.startswith(f"{name} has no effect") for warning in gather({name: "1"}).warnings)


def test_what_cannot_be_translated_is_named() -> None:
    assert "has no effect" in str(gather({"TASK": "no task"}).warnings)


def test_near_misses_are_named_with_what_was_probably_meant() -> None:
    known = {"MAX_MODEL_LEN", "TENSOR_PARALLEL_SIZE", "MODEL_NAME"}
    environ = {"MAX_MODEL_LENGTH": "1", "TENSOR_PARALEL_SIZE": "2", "MODEL_NAME": "org/m", "PATH": "/", "HOSTNAME": "h"}
    assert near_misses(gather(environ | {"HF_MODEL_NAME": "x"}), known) == [
        "MAX_MODEL_LENGTH is no setting. Is MAX_MODEL_LEN meant?",
        "TENSOR_PARALEL_SIZE is no setting. Is TENSOR_PARALLEL_SIZE meant?",
    ]


def test_values_are_not_shown() -> None:
    assert "s3cret" not in repr(gather({"HF_TOKEN": "s3cret"}))


def test_what_a_cluster_sets_counts_where_a_cluster_is_meant() -> None:
    cluster = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
    assert not cluster.keys() & gather(cluster).values.keys()
    assert gather({**cluster, "NNODES": "2"}).values["NODE_RANK"] == "1"
