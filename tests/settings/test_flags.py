"""Variables become command line arguments."""

import argparse
import json
from typing import Any, NoReturn

import pytest

from worker.errors import ConfigurationError
from worker.settings import flags


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def parser() -> Parser:
    """Return a parser with one flag of each kind in vLLM's parser."""
    built = Parser()
    built.add_argument("model_tag", nargs="?")
    built.add_argument("--model")
    built.add_argument("--max-model-len", type=int)
    built.add_argument("--dtype", choices=["auto", "half"])
    built.add_argument("--hf-token", nargs="?")
    built.add_argument("--port", type=int)
    built.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    built.add_argument("--disable-log-stats", action="store_true")
    built.add_argument("--served-model-name", nargs="+")
    built.add_argument("--lora-modules", nargs="+")
    built.add_argument("--middleware", action="append")
    built.add_argument("--limit-mm-per-prompt", type=json.loads)
    built.add_argument("--tensor-parallel-size", "-tp", type=int)
    built.add_argument("--chat-template")
    built.add_argument("--gpu-memory-utilization", type=float)
    return built


def parsed(environ: dict[str, str]) -> dict[str, Any]:
    arguments = flags.arguments(environ, parser(), frozenset({"port"}))
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
        pytest.param("VLLM_EXTRA_ARGS", "--dtype half -tp 4", {"dtype": "half", "tensor_parallel_size": 4}, id="extra"),
        pytest.param("PORT", "80", {}, id="flag that the worker replaces"),
        pytest.param("HF_TOKEN", "secret", {}, id="secret"),
        pytest.param("MODEL", "other", {}, id="only MODEL_NAME sets the model"),
    ],
)
def test_a_flag_from_its_variable(variable: str, value: str, result: dict[str, Any]) -> None:
    assert parsed({variable: value}) == result


def test_false_is_passed_on_if_the_flag_has_a_negative_form() -> None:
    environ = {"ENFORCE_EAGER": "false"}
    assert flags.arguments(environ, parser()) == ["--no-enforce-eager"]


def test_extra_arguments_override_variables() -> None:
    environ = {"GPU_MEMORY_UTILIZATION": "0.6", "DTYPE": "auto", "VLLM_EXTRA_ARGS": "--dtype half"}
    assert parsed(environ) == {"gpu_memory_utilization": 0.6, "dtype": "half"}


def test_all_mistakes_are_reported_at_once() -> None:
    environ = {"MAX_MODEL_LEN": "long", "DTYPE": "bf17", "ENFORCE_EAGER": "maybe", "LIMIT_MM_PER_PROMPT": "{image: 2}"}
    with pytest.raises(ConfigurationError) as caught:
        parsed(environ)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == "MAX_MODEL_LEN='long': expected a whole number"
    assert lines[1].endswith("expected one of auto, half")
    assert lines[2] == "ENFORCE_EAGER='maybe': not a boolean; expected true or false"
    assert lines[3].startswith("LIMIT_MM_PER_PROMPT='{image: 2}'")
    assert lines[3].endswith("expected JSON")


def test_a_list_that_is_not_json_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="SERVED_MODEL_NAME"):
        parsed({"SERVED_MODEL_NAME": "[a, b"})


def test_extra_arguments_with_an_open_quotation_are_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="VLLM_EXTRA_ARGS: No closing quotation"):
        parsed({"VLLM_EXTRA_ARGS": "--dtype 'half"})


def test_a_mistake_names_the_source_of_the_variable() -> None:
    with pytest.raises(ConfigurationError, match=r"DTYPE \(file\)='bf17'"):
        flags.arguments({"DTYPE": "bf17"}, parser(), described="{} (file)".format)
