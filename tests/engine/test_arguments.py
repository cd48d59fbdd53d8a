"""vLLM's arguments from the settings, with vLLM's own parser and checks. No engine runs."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.tiny import MODEL
from worker import settings
from worker.engine import parse_arguments, place, remarks
from worker.engine.arguments import SERVER_FLAGS, changed, make_parser
from worker.errors import ConfigurationError
from worker.settings import flags, sources


def arguments(**environ: str) -> argparse.Namespace:
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **environ})
    args = parse_arguments(worker_settings)
    place(args, worker_settings, {worker_settings.model_name: MODEL})
    return args


def parse(**environ: str) -> dict[str, object]:
    return vars(arguments(**environ))


def test_the_model_is_the_folder_and_its_name_the_one_that_the_user_wrote() -> None:
    args = parse()
    assert (args["model"], args["served_model_name"]) == (str(MODEL), ["org/tiny"])
    assert parse(SERVED_MODEL_NAME="a,b")["served_model_name"] == ["a", "b"]
    assert parse(OPENAI_SERVED_MODEL_NAME_OVERRIDE="c")["served_model_name"] == ["c"]


def test_the_settings_of_the_embedded_model() -> None:
    environ = tiny.environment()
    args = parse(**environ)
    assert (args["max_model_len"], args["enforce_eager"], args["tool_call_parser"]) == (2048, True, "hermes")
    assert args["limit_mm_per_prompt"] == json.loads(environ["LIMIT_MM_PER_PROMPT"])


def test_values_in_vllms_own_formats() -> None:
    args = parse(MAX_MODEL_LEN="8k", LORA_MODULES='[{"name": "l", "path": "/p"}]', ENABLE_LORA="true")
    assert args["max_model_len"] == 8000
    assert "'l'" in str(args["lora_modules"])


def test_every_flag_of_vllms_parser_can_be_set() -> None:
    """Each flag gets a value that the parser accepts, and the parsed arguments contain it."""
    parser = make_parser()
    settable = flags.settable(parser, SERVER_FLAGS)
    assert len(settable) > 250
    for variable, action in settable.items():
        words = flags.arguments({variable: value_for(action)}, parser, SERVER_FLAGS)
        assert words, variable
        parsed = getattr(parser.parse_args(words), action.dest)
        assert parsed not in (None, [], {}), variable
        if action.nargs == 0:
            off = flags.arguments({variable: "off"}, parser, SERVER_FLAGS)
            on = isinstance(action, argparse._StoreFalseAction)
            assert getattr(parser.parse_args(off), action.dest) in ((on, action.default) if not off else (False,))


def value_for(action: argparse.Action) -> str:
    """Return a value that the flag accepts."""
    if action.nargs == 0:
        return "yes"
    if action.choices:
        return str(next(iter(action.choices)))
    for value in ("1", "{}", '{"a": "1"}', "a=1", "auto", "x"):
        try:
            make_parser().parse_args(flags._flags(action, value))
        except (ValueError, TypeError, argparse.ArgumentError):
            continue
        return value
    raise AssertionError(f"no value for {action.option_strings}")


@pytest.mark.parametrize("template", ["{% if x %}", "/no/such/template.jinja"])
def test_an_invalid_chat_template_is_reported_before_anything_is_loaded(template: str, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(ConfigurationError, match="template"):
        parse(CHAT_TEMPLATE=str(file) if "{%" in template else template)


@pytest.mark.parametrize("preset", sources.presets(), ids=lambda preset: str(preset["name"]))
def test_vllm_accepts_every_preset(preset: dict[str, Any]) -> None:
    """Except for tensor parallelism, which needs as many GPUs, and the worker's own settings."""
    preset_settings = {name: value for name, value in preset["settings"].items() if name != "MM_PROCESSOR_KWARGS"}
    args = parse(**preset_settings)
    for name, value in preset_settings.items():
        if name.lower() in args and name.lower() != "limit_mm_per_prompt":
            accepted = args[name.lower()]
            assert (
                accepted == json.loads(value) if isinstance(accepted, dict) else str(accepted).lower() == value.lower()
            ), name


def test_the_name_of_each_repository_is_replaced_by_its_folder(tmp_path: Path) -> None:
    worker_settings = settings.read(
        {
            "MODEL_NAME": "org/tiny",
            "TOKENIZER": "org/words",
            "LORA_MODULES": "a=org/a,b=/local",
            "SPECULATIVE_CONFIG": '{"model": "org/draft", "num_speculative_tokens": 2}',
        }
    )
    folders = {f"org/{name}": tmp_path / name for name in ("tiny", "words", "a", "draft")}
    args = parse_arguments(worker_settings)
    place(args, worker_settings, folders)
    assert (args.model, args.tokenizer) == (str(tmp_path / "tiny"), str(tmp_path / "words"))
    assert [adapter.path for adapter in args.lora_modules] == [str(tmp_path / "a"), "/local"]
    assert args.speculative_config["model"] == str(tmp_path / "draft")
    assert args.served_model_name == ["org/tiny"]


def test_changed_arguments_can_be_set_again() -> None:
    once = changed(
        arguments(LORA_MODULES="a=/p", ENABLE_LORA="true", STRUCTURED_OUTPUTS_CONFIG='{"backend": "guidance"}')
    )
    environ = {name.upper(): json.dumps(once[name]) for name in ("lora_modules", "structured_outputs_config")}
    again = changed(arguments(ENABLE_LORA="true", **environ))
    assert again == once
    assert again["lora_modules"][0]["path"] == "/p"


def test_short_names_for_media_limits() -> None:
    args = parse(IMAGE_LIMIT="5", VIDEO_LIMIT="1", VIDEO_MAX_FRAMES="16")
    assert args["limit_mm_per_prompt"] == {"image": 5, "video": 1}
    assert args["media_io_kwargs"] == {"video": {"num_frames": 16, "max_frames": 16}}
    long_names = {"LIMIT_MM_PER_PROMPT": '{"image": 2}', "MEDIA_IO_KWARGS": '{"video": {"num_frames": 8}}'}
    args = parse(IMAGE_LIMIT="5", AUDIO_LIMIT="1", VIDEO_MAX_FRAMES="16", **long_names)
    assert args["limit_mm_per_prompt"] == {"image": 2, "audio": 1}
    assert args["media_io_kwargs"] == {"video": {"num_frames": 8, "max_frames": 16}}
    assert not args["trust_request_mm_kwargs"]


@pytest.mark.parametrize(
    ("environ", "limits"),
    [
        pytest.param({}, {"image": 100}, id="nothing"),
        pytest.param({"IMAGE_LIMIT": "200"}, {"image": 200}, id="IMAGE_LIMIT"),
        pytest.param({"IMAGE_LIMIT": "0"}, {"image": 0}, id="no images"),
        pytest.param({"VIDEO_LIMIT": "1"}, {"image": 100, "video": 1}, id="another kind"),
        pytest.param({"LIMIT_MM_PER_PROMPT": '{"image": 300}'}, {"image": 300}, id="vLLM's variable"),
        pytest.param({"LIMIT_MM_PER_PROMPT": '{"video": 2}'}, {"image": 100, "video": 2}, id="vLLM's for another kind"),
        pytest.param({"VLLM_EXTRA_ARGS": "--limit-mm-per-prompt.image 7"}, {"image": 7}, id="vLLM's flag"),
        pytest.param({"PRESET": "qwen2-vl-7b"}, {"image": 5, "video": 1}, id="preset"),
    ],
)
def test_the_limit_of_images_per_request(environ: dict[str, str], limits: dict[str, int]) -> None:
    assert parse(**environ)["limit_mm_per_prompt"] == limits


def test_log_prompts_turns_vllms_request_log_on_and_vllm_checks_no_keys() -> None:
    args = parse(LOG_PROMPTS="true", VLLM_API_KEY="key")
    assert (args["enable_log_requests"], args["enable_log_outputs"]) == (True, True)
    assert args["api_key"] == [""]


@pytest.mark.parametrize(
    ("environ", "reported"),
    [
        pytest.param({"ENABLE_LOG_REQUESTS": "true"}, ["ENABLE_LOG_REQUESTS"], id="variable"),
        pytest.param({"ENABLE_LOG_OUTPUTS": "true"}, ["ENABLE_LOG_OUTPUTS"], id="without the flag that it needs"),
        pytest.param({"VLLM_EXTRA_ARGS": "--enable-log-outputs"}, ["enable_log_outputs"], id="flag"),
        pytest.param({"ENABLE_LOG_REQUESTS": "false", "ENABLE_LOG_OUTPUTS": "0"}, [], id="off"),
        pytest.param({"ENABLE_LOG_REQUESTS": "true", "LOG_PROMPTS": "true"}, [], id="allowed"),
    ],
)
def test_prompts_are_logged_only_with_log_prompts(environ: dict[str, str], reported: list[str]) -> None:
    worker_settings = settings.read({"MODEL_NAME": "org/tiny", **environ})
    args = parse_arguments(worker_settings)
    assert (args.enable_log_requests, args.enable_log_outputs) == (worker_settings.log_prompts,) * 2
    assert [warning.split(" ")[0] for warning in remarks(worker_settings)] == reported


def test_flags_of_vllms_server_have_no_effect_in_extra_arguments_either() -> None:
    args = parse(VLLM_EXTRA_ARGS="--middleware no.such.module --root-path /x --enable-request-id-headers --uds /x")
    assert (args["middleware"], args["root_path"], args["enable_request_id_headers"], args["uds"]) == (
        [],
        None,
        False,
        None,
    )


def test_changed_arguments_contain_no_secrets_and_no_defaults() -> None:
    environ = {"MAX_MODEL_LEN": "2048", "VLLM_EXTRA_ARGS": "--hf-token s3cret", "LIMIT_MM_PER_PROMPT": '{"image": 4}'}
    values = changed(arguments(**environ))
    assert (values["max_model_len"], values["served_model_name"], values["hf_token"]) == (2048, ["org/tiny"], "***")
    assert "s3cret" not in json.dumps(values)
    assert "dtype" not in values


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        pytest.param(
            {"MAX_MODEL_LEN": "long"},
            "MAX_MODEL_LEN='long': expected a whole number, such as 8192 or 8k",
            id="number",
        ),
        pytest.param({"DTYPE": "bf17"}, "expected one of auto, bfloat16", id="choice"),
        pytest.param({"LIMIT_MM_PER_PROMPT": "two"}, "LIMIT_MM_PER_PROMPT='two'", id="JSON"),
        pytest.param({"ENABLE_AUTO_TOOL_CHOICE": "true"}, "requires --tool-call-parser", id="combination"),
        pytest.param(
            {"ENABLE_AUTO_TOOL_CHOICE": "1", "TOOL_CALL_PARSER": "nope"},
            "TOOL_CALL_PARSER='nope': no such parser",
            id="tool parser",
        ),
        pytest.param({"REASONING_PARSER": "nope"}, "REASONING_PARSER='nope': no such parser", id="reasoning parser"),
        pytest.param({"CUSTOM_CHAT_TEMPLATE": "nofile.jinja"}, "nofile.jinja", id="chat template"),
        pytest.param(
            {"VLLM_EXTRA_ARGS": "--nope 1"}, "VLLM_EXTRA_ARGS: unrecognized arguments: --nope", id="extra arguments"
        ),
        pytest.param({"GPU_MEMORY_UTILIZATION": "1.5"}, "GPU_MEMORY_UTILIZATION=1.5: Input should be less", id="bound"),
        pytest.param({"SPECULATIVE_CONFIG": "x"}, "SPECULATIVE_CONFIG='x': expected JSON", id="wrapped converter"),
    ],
)
def test_mistakes(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(**environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "enabled"),
    [
        pytest.param({}, False, id="no parser"),
        pytest.param({"TOOL_CALL_PARSER": "hermes"}, True, id="parser"),
        pytest.param({"TOOL_CALL_PARSER": "hermes", "ENABLE_AUTO_TOOL_CHOICE": "false"}, False, id="turned off"),
        pytest.param(
            {"TOOL_CALL_PARSER": "hermes", "VLLM_EXTRA_ARGS": "--no-enable-auto-tool-choice"}, False, id="flag"
        ),
    ],
)
def test_a_tool_parser_turns_tool_calls_on(environ: dict[str, str], enabled: bool) -> None:
    assert parse_arguments(settings.read({"MODEL_NAME": str(MODEL), **environ})).enable_auto_tool_choice == enabled


def test_adapters_turn_lora_on() -> None:
    adapters = {"MODEL_NAME": str(MODEL), "LORA_MODULES": "a=org/a"}
    assert parse_arguments(settings.read(adapters)).enable_lora
    assert not parse_arguments(settings.read({**adapters, "ENABLE_LORA": "false"})).enable_lora


def test_code_that_may_change_causes_a_warning() -> None:
    code = {"MODEL_NAME": "org/model", "TRUST_REMOTE_CODE": "true"}
    for changing in (code, {**code, "MODEL_REVISION": "main", "CODE_REVISION": "c" * 40}):
        (warning,) = remarks(settings.read(changing))
        assert "MODEL_REVISION" in warning
    assert remarks(settings.read({"MODEL_NAME": "org/model", "VLLM_EXTRA_ARGS": "--trust-remote-code"}))
    assert not remarks(settings.read({**code, "MODEL_REVISION": "c" * 40}))
    assert not remarks(settings.read({**code, "MODEL_NAME": str(MODEL)}))


def test_the_log_level_is_the_workers_own() -> None:
    """vLLM has a flag of this name, which accepts capitals only."""
    assert "log_level" not in parse(LOG_LEVEL="debug")
