"""vLLM's own parser, fed from the environment. The running engine is tested through the whole worker."""

import json

import pytest

from tests import tiny
from tests.tiny import MODEL
from worker import config
from worker.engine import parse_arguments
from worker.errors import ConfigurationError


def parse(**environ: str) -> dict[str, object]:
    return vars(parse_arguments(environ, config.load({"MODEL_NAME": "org/tiny", **environ}), MODEL))


def test_the_snapshot_is_the_model_and_the_name_is_what_the_user_wrote() -> None:
    args = parse()
    assert (args["model"], args["served_model_name"]) == (str(MODEL), ["org/tiny"])
    assert parse(SERVED_MODEL_NAME="a,b")["served_model_name"] == ["a", "b"]
    assert parse(OPENAI_SERVED_MODEL_NAME_OVERRIDE="c")["served_model_name"] == ["c"]


def test_the_embedded_models_settings_are_understood() -> None:
    environ = tiny.environment()
    args = parse(**environ)
    assert (args["max_model_len"], args["enforce_eager"], args["tool_call_parser"]) == (2048, True, "hermes")
    assert args["limit_mm_per_prompt"] == json.loads(environ["LIMIT_MM_PER_PROMPT"])


def test_vllms_own_spellings_work() -> None:
    args = parse(MAX_MODEL_LEN="8k", LORA_MODULES='[{"name": "l", "path": "/p"}]', ENABLE_LORA="true")
    assert args["max_model_len"] == 8000
    assert "'l'" in str(args["lora_modules"])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        pytest.param(
            {"MAX_MODEL_LEN": "long"},
            "MAX_MODEL_LEN='long': invalid human_readable_int_or_auto value: 'long'; expected human readable int",
            id="number",
        ),
        pytest.param({"DTYPE": "bf17"}, "expected one of auto, bfloat16", id="choice"),
        pytest.param({"LIMIT_MM_PER_PROMPT": "two"}, "LIMIT_MM_PER_PROMPT='two'", id="JSON"),
        pytest.param({"ENABLE_AUTO_TOOL_CHOICE": "true"}, "requires --tool-call-parser", id="combination"),
        pytest.param(
            {"ENABLE_AUTO_TOOL_CHOICE": "1", "TOOL_CALL_PARSER": "nope"},
            "invalid tool call parser: nope",
            id="tool parser",
        ),
        pytest.param({"REASONING_PARSER": "nope"}, "REASONING_PARSER='nope': no such parser", id="reasoning parser"),
        pytest.param({"CUSTOM_CHAT_TEMPLATE": "nofile.jinja"}, "nofile.jinja", id="chat template"),
        pytest.param({"VLLM_EXTRA_ARGS": "--nope 1"}, "unrecognized arguments: --nope", id="extra arguments"),
    ],
)
def test_mistakes(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(**environ)
    assert message in str(caught.value)
