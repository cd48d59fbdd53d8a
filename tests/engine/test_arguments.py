"""vLLM's own parser, fed from the environment, and its collector of outputs, kept to a pace.

The running engine is tested through the whole worker.
"""

import argparse
import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from tests.support import tiny
from tests.support.tiny import MODEL
from worker.engine import arguments, parse_arguments, place
from worker.engine.arguments import SERVER_FLAGS, _Parser, changed
from worker.engine.client import PacedCollector
from worker.engine.startup_errors import failure
from worker.errors import ConfigurationError, StartupError
from worker.request.pace import Pace
from worker.settings import flags, sources
from worker.settings import settings as config


def parsed(**environ: str) -> argparse.Namespace:
    said = sources.gather({"MODEL_NAME": "org/tiny", **environ})
    args = parse_arguments(said, config.load(said.values))
    place(args, said, {said.values["MODEL_NAME"]: MODEL})
    return args


def parse(**environ: str) -> dict[str, object]:
    return vars(parsed(**environ))


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


def test_every_flag_of_vllms_parser_can_be_said() -> None:
    """Whatever kind it is of: each is given a value that its parser takes, and arrives."""
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    settable = flags.settable(parser, SERVER_FLAGS)
    assert len(settable) > 250
    for variable, action in settable.items():
        words = flags.arguments({variable: value_for(action)}, parser, SERVER_FLAGS)
        assert words, variable
        said = getattr(parser.parse_args(words), action.dest)
        assert said not in (None, [], {}), variable
        if action.nargs == 0:
            off = flags.arguments({variable: "off"}, parser, SERVER_FLAGS)
            on = isinstance(action, argparse._StoreFalseAction)
            assert getattr(parser.parse_args(off), action.dest) in ((on, action.default) if not off else (False,))


def value_for(action: argparse.Action) -> str:
    """Return some value that a flag takes."""
    if action.nargs == 0:
        return "yes"
    if action.choices:
        return str(next(iter(action.choices)))
    for value in ("1", "{}", '{"a": "1"}', "a=1", "auto", "x"):
        try:
            make_arg_parser(_Parser()).parse_args(flags._flags(action, value))  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, argparse.ArgumentError):
            continue
        return value
    raise AssertionError(f"no value for {action.option_strings}")


@pytest.mark.parametrize("template", ["{% if x %}", "/no/such/template.jinja"])
def test_a_template_that_is_none_is_told_before_anything_is_loaded(template: str, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    with pytest.raises(ConfigurationError, match="template"):
        parse(CHAT_TEMPLATE=str(file) if "{%" in template else template)


@pytest.mark.parametrize(
    ("cause", "wrong", "words"),
    [
        pytest.param(None, StartupError, "Engine core initialization failed", id="unknown"),
        pytest.param("RuntimeError: NCCL error", StartupError, "NCCL error", id="may pass"),
        pytest.param("ValueError: bad head size", ConfigurationError, "bad head size", id="will not pass"),
        pytest.param("OutOfMemoryError: CUDA out of memory", ConfigurationError, "Lower MAX_MODEL_LEN", id="memory"),
        pytest.param("RuntimeError: no kernel image is available", ConfigurationError, "no kernel", id="GPU"),
    ],
)
def test_why_an_engine_did_not_start(cause: str | None, wrong: type[StartupError], words: str) -> None:
    error = failure("Engine core initialization failed", cause)
    assert type(error) is wrong
    assert words in str(error)


@pytest.mark.parametrize("preset", sources.presets(), ids=lambda preset: str(preset["name"]))
def test_every_preset_is_one_that_vllm_takes(preset: dict[str, Any]) -> None:
    """But for tensor parallelism, which wants so many GPUs, and settings of the worker's own."""
    said = {name: value for name, value in preset["settings"].items() if name != "MM_PROCESSOR_KWARGS"}
    args = parse(**said)
    for name, value in said.items():
        if name.lower() in args and name.lower() != "limit_mm_per_prompt":
            assert str(args[name.lower()]).lower() == value.lower(), name


def test_every_name_of_the_hub_becomes_its_folder(tmp_path: Path) -> None:
    said = sources.gather(
        {
            "MODEL_NAME": "org/tiny",
            "TOKENIZER": "org/words",
            "LORA_MODULES": "a=org/a,b=/local",
            "SPECULATIVE_CONFIG": '{"model": "org/draft", "num_speculative_tokens": 2}',
        }
    )
    folders = {f"org/{name}": tmp_path / name for name in ("tiny", "words", "a", "draft")}
    args = parse_arguments(said, config.load(said.values))
    place(args, said, folders)
    assert (args.model, args.tokenizer) == (str(tmp_path / "tiny"), str(tmp_path / "words"))
    assert [one.path for one in args.lora_modules] == [str(tmp_path / "a"), "/local"]
    assert args.speculative_config["model"] == str(tmp_path / "draft")
    assert args.served_model_name == ["org/tiny"]


@pytest.mark.parametrize(
    ("gpus", "heads", "said", "used"),
    [
        pytest.param(8, 28, {}, 4, id="as many as divide heads, keys and layers"),
        pytest.param(8, 64, {"VLLM_EXTRA_ARGS": "-tp 2"}, 2, id="said in extra arguments"),
        pytest.param(2, 64, {"PRESET": "qwen2.5-vl-72b"}, 2, id="a preset's wish for more than there are"),
        pytest.param(8, 64, {"PRESET": "qwen2.5-vl-72b"}, 8, id="a preset's wish"),
        pytest.param(8, 64, {}, 8, id="all"),
        pytest.param(4, 64, {"PIPELINE_PARALLEL_SIZE": "2"}, 2, id="pipelines share them"),
        pytest.param(1, 64, {}, 1, id="one"),
        pytest.param(8, None, {}, 1, id="unknown heads"),
        pytest.param(8, 64, {"TENSOR_PARALLEL_SIZE": "2"}, 2, id="said"),
        pytest.param(8, 64, {"TENSOR_PARALLEL_SIZE": "Auto"}, 8, id="said to be found"),
    ],
)
def test_how_many_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    heads: int | None,
    said: dict[str, str],
    used: int,
) -> None:
    monkeypatch.setattr(arguments, "current_platform", SimpleNamespace(is_cpu=lambda: False, device_count=lambda: gpus))
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "intermediate_size": 18944 if heads == 28 else 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes}))
    told = sources.gather({"MODEL_NAME": "org/tiny", **said})
    args = parse_arguments(told, config.load(told.values))
    place(args, told, {told.values["MODEL_NAME"]: tmp_path})
    assert args.tensor_parallel_size == used
    assert (args.mm_encoder_tp_mode == "data") is (used > 1)


@pytest.mark.parametrize(
    ("scheme", "widths", "used"),
    [
        pytest.param({"weight_block_size": [128, 128]}, {"moe_intermediate_size": 1536}, 4, id="blocks of experts"),
        pytest.param({"weight_block_size": [128, 128]}, {"intermediate_size": 12288}, 8, id="blocks"),
        pytest.param({"group_size": 128}, {"intermediate_size": 29568}, 1, id="groups that cannot be divided"),
        pytest.param({"group_size": 128}, {"intermediate_size": 29696}, 8, id="groups that can"),
        pytest.param({"group_size": -1}, {"intermediate_size": 29568}, 8, id="no groups"),
    ],
)
def test_blocks_of_quantized_layers_are_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: dict[str, Any], widths: dict[str, int], used: int
) -> None:
    monkeypatch.setattr(arguments, "current_platform", SimpleNamespace(is_cpu=lambda: False, device_count=lambda: 8))
    sizes = {"num_attention_heads": 64, "num_key_value_heads": 8, **widths, "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    said = sources.gather({"MODEL_NAME": "org/tiny"})
    args = parse_arguments(said, config.load(said.values))
    place(args, said, {"org/tiny": tmp_path})
    assert args.tensor_parallel_size == used


def test_what_is_told_of_arguments_can_be_said_again() -> None:
    told = changed(parsed(LORA_MODULES="a=/p", ENABLE_LORA="true", STRUCTURED_OUTPUTS_CONFIG='{"backend": "guidance"}'))
    said = {name.upper(): json.dumps(told[name]) for name in ("lora_modules", "structured_outputs_config")}
    again = changed(parsed(ENABLE_LORA="true", **said))
    assert again == told
    assert again["lora_modules"][0]["path"] == "/p"


def test_limits_of_media_have_short_names() -> None:
    args = parse(IMAGE_LIMIT="5", VIDEO_LIMIT="1", VIDEO_MAX_FRAMES="16")
    assert args["limit_mm_per_prompt"] == {"image": 5, "video": 1}
    assert args["media_io_kwargs"] == {"video": {"num_frames": 16, "max_frames": 16}}
    longer = {"LIMIT_MM_PER_PROMPT": '{"image": 2}', "MEDIA_IO_KWARGS": '{"video": {"num_frames": 8}}'}
    args = parse(IMAGE_LIMIT="5", AUDIO_LIMIT="1", VIDEO_MAX_FRAMES="16", **longer)
    assert args["limit_mm_per_prompt"] == {"image": 2, "audio": 1}
    assert args["media_io_kwargs"] == {"video": {"num_frames": 8, "max_frames": 16}}
    assert not args["trust_request_mm_kwargs"]


def test_prompts_are_logged_when_that_is_wanted_and_keys_are_not_checked_twice() -> None:
    args = parse(LOG_PROMPTS="true", VLLM_API_KEY="key")
    assert (args["enable_log_requests"], args["enable_log_outputs"]) == (True, True)
    assert args["api_key"] == [""]


def test_what_differs_from_vllms_defaults_is_told_without_secrets() -> None:
    environ = {"MAX_MODEL_LEN": "2048", "VLLM_EXTRA_ARGS": "--hf-token s3cret", "LIMIT_MM_PER_PROMPT": '{"image": 4}'}
    told = changed(parsed(**environ))
    assert (told["max_model_len"], told["served_model_name"], told["hf_token"]) == (2048, ["org/tiny"], "***")
    assert "s3cret" not in json.dumps(told)
    assert "dtype" not in told


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
        pytest.param({"ENABLE_LOG_REQUESTS": "true"}, "Set LOG_PROMPTS=true", id="prompts in the log"),
        pytest.param({"VLLM_EXTRA_ARGS": "--nope 1"}, "unrecognized arguments: --nope", id="extra arguments"),
    ],
)
def test_mistakes(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(**environ)
    assert message in str(caught.value)


def part(text: str, finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(0, text, [ord(letter) for letter in text], None, None)
    return RequestOutput("request", "prompt", [1], None, [completion], finished)


def collector(*early: RequestOutput) -> PacedCollector:
    taken_over = RequestOutputCollector(RequestOutputKind.DELTA, "request")
    for output in early:
        taken_over.put(output)
    return PacedCollector(taken_over, Pace(60.0))


async def text_of(paced: PacedCollector) -> str:
    async with asyncio.timeout(10):
        output = await paced.get()
    assert isinstance(output, RequestOutput)
    return output.outputs[0].text


def test_the_first_output_is_given_at_once_and_the_rest_as_one_at_the_end() -> None:
    async def run() -> list[str]:
        paced = collector(part("a"))
        texts = [await text_of(paced)]
        paced.put(part("b"))
        waiting = asyncio.create_task(text_of(paced))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        paced.put(part("c"))
        paced.put(part("d", finished=True))
        return [*texts, await waiting]

    assert asyncio.run(run()) == ["a", "bcd"]


def test_an_output_whose_window_has_passed_is_given_at_once() -> None:
    async def run() -> list[str]:
        paced = PacedCollector(RequestOutputCollector(RequestOutputKind.DELTA, "request"), Pace(0.001))
        texts = []
        for letter in "abc":
            paced.put(part(letter))
            texts.append(await text_of(paced))
        return texts

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_an_engine_that_fails_is_not_waited_for() -> None:
    async def run() -> None:
        paced = collector(part("a"))
        await text_of(paced)
        paced.put(part("b"))
        paced.put(RuntimeError("dead"))
        await text_of(paced)

    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(run())
