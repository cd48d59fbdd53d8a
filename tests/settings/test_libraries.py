"""Variables of vLLM, CUDA and the Hugging Face libraries that the worker reads too."""

import json
from pathlib import Path

import pytest

from worker.settings import read
from worker.settings.libraries import Libraries


def test_nothing_is_set() -> None:
    home = Path.home()
    libraries = Libraries.of({})
    assert libraries == Libraries(
        tokenizer=None,
        tokenizer_revision=None,
        hf_config_path=None,
        draft_models=(),
        adapters=(),
        loads_adapters_at_runtime=False,
        chosen_cache=False,
        hub_caches=(home / ".cache/huggingface/hub",),
        vllm_cache=home / ".cache/vllm",
        visible_gpus=None,
        start_method=None,
    )


def test_variables_that_are_taken_as_they_are() -> None:
    libraries = Libraries.of(
        {
            "TOKENIZER": "org/tokenizer",
            "TOKENIZER_REVISION": "v1",
            "HF_CONFIG_PATH": "org/config",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CACHE_ROOT": "~/vllm",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
    )
    assert (libraries.tokenizer, libraries.tokenizer_revision) == ("org/tokenizer", "v1")
    assert libraries.hf_config_path == "org/config"
    assert libraries.loads_adapters_at_runtime
    assert libraries.vllm_cache == Path.home() / "vllm"
    assert libraries.start_method == "spawn"


@pytest.mark.parametrize(
    ("values", "draft_models"),
    [
        pytest.param({"SPEC_MODEL": "org/draft"}, (("SPEC_MODEL", "org/draft", None),), id="SPEC_MODEL"),
        pytest.param(
            {"SPECULATIVE_CONFIG": '{"model": "org/draft", "revision": "v1"}'},
            (("SPECULATIVE_CONFIG", "org/draft", "v1"),),
            id="SPECULATIVE_CONFIG",
        ),
        pytest.param({"SPECULATIVE_CONFIG": '{"method": "ngram"}'}, (), id="no model"),
        pytest.param({"SPECULATIVE_CONFIG": "{model: org/draft}"}, (), id="invalid JSON"),
        pytest.param({"SPECULATIVE_CONFIG": '"org/draft"'}, (), id="not an object"),
    ],
)
def test_draft_models(values: dict[str, str], draft_models: object) -> None:
    assert Libraries.of(values).draft_models == draft_models


@pytest.mark.parametrize(
    ("values", "adapters"),
    [
        pytest.param({"LORA_MODULES": "a=org/a, b=/b"}, ["org/a", "/b"], id="names and paths"),
        pytest.param({"LORA_MODULES": '{"name": "a", "path": "org/a"}'}, ["org/a"], id="object"),
        pytest.param({"LORA_MODULES": '[{"name": "a", "path": "org/a"}, "b=/b"]'}, ["org/a", "/b"], id="JSON list"),
        pytest.param({"LORA_MODULES": '[{"name": "a"'}, [], id="invalid JSON"),
    ],
)
def test_adapters(values: dict[str, str], adapters: list[str]) -> None:
    assert Libraries.of(values).adapters == tuple(("LORA_MODULES", path) for path in adapters)


def test_adapters_of_a_modality() -> None:
    values = {"DEFAULT_MM_LORAS": json.dumps({"audio": "org/a"}), "LORA_MODULES": "b=/b"}
    assert Libraries.of(values).adapters == (("DEFAULT_MM_LORAS", "org/a"), ("LORA_MODULES", "/b"))


@pytest.mark.parametrize(
    ("values", "caches", "chosen"),
    [
        pytest.param({"XDG_CACHE_HOME": "/x"}, ["/x/huggingface/hub"], False, id="XDG_CACHE_HOME"),
        pytest.param({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/h/hub"], True, id="HF_HOME"),
        pytest.param({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}, ["/c", "/h/hub"], True, id="HF_HUB_CACHE"),
    ],
)
def test_caches_of_the_hub(values: dict[str, str], caches: list[str], chosen: bool) -> None:
    libraries = Libraries.of(values)
    assert ([str(folder) for folder in libraries.hub_caches], libraries.chosen_cache) == (caches, chosen)


@pytest.mark.parametrize(
    ("value", "gpus"), [("2, 0", (2, 0)), ("0", (0,)), ("GPU-8f1c", None), ("0,GPU-8f1c", None), ("-1", None)]
)
def test_visible_gpus(value: str, gpus: tuple[int, ...] | None) -> None:
    assert Libraries.of({"CUDA_VISIBLE_DEVICES": value}).visible_gpus == gpus


def test_settings_have_the_libraries_of_all_sources(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("tokenizer-revision: v1\nlora-modules: [{name: a, path: org/a}]\n")
    libraries = read({"VLLM_CONFIG_FILE": str(file), "TOKENIZER_NAME": "org/tokenizer"}).libraries
    assert (libraries.tokenizer, libraries.tokenizer_revision) == ("org/tokenizer", "v1")
    assert libraries.adapters == (("LORA_MODULES", "org/a"),)
