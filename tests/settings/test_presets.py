"""The presets: which models get which, vLLM accepts their settings, and docs/models.md says the same."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer
from vllm.tool_parsers import ToolParserManager

from tests.support.tiny import MODEL, ROOT
from worker import settings
from worker.engine import parse_arguments
from worker.model import fit
from worker.settings import sources

PAGE = ROOT / "docs/models.md"
PARSERS = ("TOOL_CALL_PARSER", "REASONING_PARSER")
MEMORY_GB = {
    "24 GB": 24,
    "48 GB": 48,
    "80 GB": 80,
    "2 × 48 GB": 96,
    "141 GB": 141,
    "2 × 80 GB": 160,
    "2 × 141 GB": 282,
    "4 × 80 GB": 320,
    "4 × 141 GB": 564,
    "8 × 80 GB": 640,
    "8 × 141 GB": 1128,
}
"""The GPUs of the page's table, and the memory of each choice."""
MODELS: dict[str, str | None] = {
    # Qwen, chat
    "Qwen/Qwen3.5-9B": "qwen3.5",
    "Qwen/Qwen3.5-35B-A3B-GPTQ-Int4": "qwen3.5",
    "nvidia/Qwen3.6-27B-NVFP4": "qwen3.5",
    "unsloth/Qwen3.8-27B-NVFP4": "qwen3.5",
    "Qwen/Qwen3.8-Flash-Next-FP8": "qwen3.5",
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen3-32B-AWQ": "qwen3",
    "RedHatAI/Qwen3-30B-A3B-FP8-dynamic": "qwen3",
    "Qwen/Qwen3-4B-Thinking-2507": "qwen3",
    "Qwen/Qwen3-Next-80B-A3B-Thinking-FP8": "qwen3",
    "Qwen/Qwen3-VL-8B-Thinking": "qwen3",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-instruct",
    "unsloth/Qwen3-4B-Instruct-2507-unsloth-bnb-4bit": "qwen3-instruct",
    "nvidia/Qwen3-Next-80B-A3B-Instruct-NVFP4": "qwen3-instruct",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-instruct",
    "Qwen/Qwen3-VL-30B-A3B-Instruct-FP8": "qwen3-instruct",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "qwen3-coder",
    "cpatonn/Qwen3-Coder-30B-A3B-Instruct-AWQ-4bit": "qwen3-coder",
    "Qwen/Qwen3-Coder-Next-FP8": "qwen3-coder",
    "Qwen/Qwen3-Omni-30B-A3B-Instruct": "qwen3-omni-instruct",
    "Qwen/Qwen3-Omni-30B-A3B-Thinking": "qwen3-omni-thinking",
    "Qwen/Qwen3-Omni-30B-A3B-Captioner": None,
    "Qwen/QwQ-32B-AWQ": "qwq",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5",
    "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4": "qwen2.5",
    "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ": None,
    "Qwen/Qwen2.5-Math-7B-Instruct": None,
    "Qwen/Qwen2.5-Omni-7B": None,
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2-vl-7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
    "Qwen/Qwen2.5-VL-32B-Instruct-AWQ": "qwen2.5-vl-32b",
    "unsloth/Qwen2.5-VL-72B-Instruct": "qwen2.5-vl-72b",
    # Qwen, everything else
    "Qwen/Qwen3-8B-Base": None,
    "Qwen/Qwen3.5-9B-Base": None,
    "Qwen/Qwen3-Embedding-8B": None,
    "Qwen/Qwen3-VL-Embedding-2B": "qwen3-vl-embedding",
    "Qwen/Qwen3-Reranker-4B": "qwen3-reranker",
    "tomaarsen/Qwen3-Reranker-0.6B-seq-cls": None,
    "Qwen/Qwen3-VL-Reranker-8B": "qwen3-vl-reranker",
    "Qwen/Qwen3Guard-Gen-8B": None,
    "Qwen/Qwen3-ASR-1.7B": None,
    "Qwen/Qwen2.5-Math-PRM-7B": None,
    # Meta, and models of others made from Meta's
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3",
    "/models/Llama-3.1-8B-Instruct/": "llama-3",
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": "llama-3",
    "unsloth/Llama-3.2-3B-Instruct": "llama-3",
    "nvidia/Llama-3.3-70B-Instruct-NVFP4": "llama-3",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": None,
    "meta-llama/Llama-3.1-8B": None,
    "meta-llama/Llama-Guard-3-8B": None,
    "allenai/Llama-3.1-8B-Instruct-RM-RB2": None,
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5": None,
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": None,
    "RedHatAI/Llama-4-Scout-17B-16E-Instruct-NVFP4": "llama-4",
    "meta-llama/Llama-4-Scout-17B-16E": None,
    "NousResearch/Hermes-3-Llama-3.1-8B": "hermes",
    # Google
    "google/gemma-4-31B-it": "gemma-4",
    "nvidia/gemma-4-31B-it-NVFP4": "gemma-4",
    "google/gemma-4-E4B": None,
    "google/gemma-3-12b-it": None,
    "google/gemma-3n-E4B-it": None,
    "google/embeddinggemma-300m": None,
    # Mistral
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "mistralai/Mistral-Large-3-675B-Instruct-2512-NVFP4": "mistral",
    "mistralai/Ministral-3-8B-Instruct-2512": "mistral",
    "mistralai/Devstral-Small-2-24B-Instruct-2512": "mistral",
    "mistralai/Magistral-Small-2506": "mistral",
    "mistralai/Pixtral-12B-2409": "mistral",
    "mistralai/Magistral-Small-2509": "mistral-reasoning",
    "mistralai/Ministral-3-14B-Reasoning-2512": "mistral-reasoning",
    "mistralai/Mistral-Small-4-119B-2603": "mistral-reasoning",
    "mistralai/Mistral-Medium-3.5-128B": "mistral-reasoning",
    "mistralai/Mistral-Small-3.1-24B-Base-2503": None,
    "RedHatAI/Pixtral-Large-Instruct-2411-hf-FP8-dynamic": None,
    "unsloth/Mistral-Small-3.2-24B-Instruct-2506": None,
    "mistral-community/pixtral-12b": None,
    "mistralai/Voxtral-Mini-3B-2507": None,
    # DeepSeek
    "deepseek-ai/DeepSeek-R1-0528": "deepseek-r1",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "deepseek-r1",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "deepseek-r1",
    "deepseek-ai/DeepSeek-V3-0324": None,
    "deepseek-ai/DeepSeek-V3.1-Terminus": "deepseek-v3.1",
    "deepseek-ai/DeepSeek-V3.1-Base": None,
    "nvidia/DeepSeek-V3.2-NVFP4": "deepseek-v3.2",
    "deepseek-ai/DeepSeek-V3.2-Exp": None,
    "deepseek-ai/DeepSeek-V3.2-Speciale": None,
    "deepseek-ai/DeepSeek-V4-Flash": "deepseek-v4",
    "deepseek-ai/DeepSeek-OCR": None,
    # Other makers
    "openai/gpt-oss-20b": "gpt-oss",
    "unsloth/gpt-oss-120b-BF16": "gpt-oss",
    "openai/gpt-oss-safeguard-20b": "gpt-oss",
    "zai-org/GLM-4.5-Air-FP8": "glm-4.5",
    "zai-org/GLM-4.6V-Flash": "glm-4.5",
    "zai-org/GLM-4.5-Air-Base": None,
    "zai-org/GLM-4.7-Flash": "glm-4.7",
    "Inferact/GLM-5.3-NVFP4": "glm-4.7",
    "zai-org/GLM-4.1V-9B-Thinking": None,
    "moonshotai/Kimi-K2-Instruct-0905": "kimi-k2",
    "moonshotai/Kimi-K2-Thinking": "kimi-k2-thinking",
    "nvidia/Kimi-K2.5-NVFP4": "kimi-k2-thinking",
    "moonshotai/Kimi-K3": "kimi-k3",
    "moonshotai/Kimi-VL-A3B-Instruct": None,
    "MiniMaxAI/MiniMax-M2.5": "minimax-m2",
    "MiniMaxAI/MiniMax-M3-MXFP8": "minimax-m3",
    "MiniMaxAI/MiniMax-M1-40k": None,
    "microsoft/Phi-4-mini-instruct": "phi",
    "microsoft/Phi-3.5-vision-instruct": "phi",
    "microsoft/phi-4": None,
    "microsoft/Phi-4-reasoning-plus": None,
    "OpenGVLab/InternVL3_5-8B": None,
    "ibm-granite/granite-3.1-8b-instruct": "granite-3.1",
    "ibm-granite/granite-4.0-h-small": "granite-4.0",
    "ibm-granite/granite-4.0-h-tiny-base": None,
    "ibm-granite/granite-4.0-1b-speech": None,
    "ibm-granite/granite-4.2-8b": "granite-4.2",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8": "nemotron-3",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-Base-BF16": None,
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": None,
    "tencent/Hunyuan-A13B-Instruct-FP8": "hunyuan-a13b",
    "tencent/Hy3-FP8": "hy3",
    "ByteDance-Seed/Seed-OSS-36B-Instruct": "seed-oss",
    "ByteDance-Seed/Seed-OSS-36B-Base": None,
    "baidu/ERNIE-4.5-21B-A3B-Thinking": "ernie-4.5-thinking",
    "baidu/ERNIE-4.5-21B-A3B-PT": None,
    "stepfun-ai/Step-3.7-Flash-FP8": "step-3.5",
    "LiquidAI/LFM2.5-1.2B-Instruct": "lfm2.5",
    "LiquidAI/LFM2.5-1.2B-Thinking": "lfm2.5-thinking",
    "LiquidAI/LFM2.5-1.2B-Base": None,
    "allenai/Olmo-3-7B-Instruct": "olmo-3",
    "allenai/Olmo-3-32B-Think": "olmo-3-think",
    "ai21labs/AI21-Jamba-1.5-Mini": "jamba-1.5",
    "CohereLabs/command-a-reasoning-08-2025": None,
    "HuggingFaceTB/SmolLM3-3B": None,
    "openai/whisper-large-v3-turbo": None,
    "BAAI/bge-m3": None,
    "BAAI/bge-reranker-v2-m3": None,
    "BAAI/bge-reranker-v2-gemma": "bge-reranker-gemma",
    "mixedbread-ai/mxbai-rerank-large-v2": "mxbai-rerank",
    "intfloat/multilingual-e5-large-instruct": None,
    "org/other": None,
}
"""Names on the Hugging Face Hub, and paths, with the preset of each."""

every_preset = pytest.mark.parametrize("preset", sources.presets(), ids=lambda preset: str(preset["name"]))


def preset_of(**environ: str) -> str | None:
    origins = {origin for origin in sources.collect(environ).origins.values() if origin.startswith("preset ")}
    assert len(origins) <= 1
    return origins.pop().removeprefix("preset ") if origins else None


def arguments(**environ: str) -> argparse.Namespace:
    return parse_arguments(settings.read(environ))


@pytest.mark.parametrize(("model", "preset"), MODELS.items(), ids=MODELS)
def test_the_preset_of_a_model(model: str, preset: str | None) -> None:
    assert preset_of(MODEL_NAME=model) == preset


def test_the_names_cover_every_preset() -> None:
    assert {name for name in MODELS.values() if name} == {
        each["name"] for each in sources.presets() if each["settings"]
    }


def test_a_preset_can_be_chosen_by_name_and_turned_off() -> None:
    assert preset_of(MODEL_NAME="org/fine-tuned", PRESET="gpt-oss") == "gpt-oss"
    assert preset_of(MODEL_NAME="openai/gpt-oss-20b", PRESET="none") is None


def test_the_settings_of_a_preset_are_not_chosen_by_the_user() -> None:
    variables = sources.collect({"PRESET": "qwen2.5-vl-72b", "MAX_MODEL_LEN": "1024"})
    assert variables.values["TENSOR_PARALLEL_SIZE"] == "8"
    assert variables.chosen["MAX_MODEL_LEN"] == "1024"
    assert "TENSOR_PARALLEL_SIZE" not in variables.chosen


def test_a_preset_without_settings_only_keeps_other_presets_away() -> None:
    presets = sources.presets()
    empty = [pattern for each in presets if not each["settings"] for pattern in each["models"]]
    others = [pattern for each in presets if each["settings"] for pattern in each["models"]]
    names = [name.lower() for name in MODELS]
    needed = {
        pattern
        for pattern in empty
        for name in names
        if sources._matches(name, pattern) and any(sources._matches(name, other) for other in others)
    }
    assert needed == set(empty)


@every_preset
def test_the_example_of_a_preset_gets_it(preset: dict[str, Any]) -> None:
    assert preset_of(MODEL_NAME=preset["example"]) == (preset["name"] if preset["settings"] else None)


@every_preset
def test_vllm_accepts_the_settings(preset: dict[str, Any]) -> None:
    args = arguments(MODEL_NAME=preset["example"])
    for name, value in preset["settings"].items():
        if (parsed := getattr(args, name.lower(), None)) is not None:
            expected = json.loads(value) if isinstance(parsed, dict) else value
            assert (parsed if isinstance(parsed, dict) else str(parsed).lower()) == expected, name
        else:
            assert name.lower() in settings.Settings.model_fields, name


@every_preset
def test_vllm_has_the_parsers(preset: dict[str, Any]) -> None:
    """Each parser is registered, and its module can be loaded without a package that vLLM does not install."""
    tool, reasoning = (preset["settings"].get(name) for name in PARSERS)
    assert tool is None or (tool in ToolParserManager.list_registered() and ToolParserManager.get_tool_parser(tool))
    assert reasoning is None or reasoning in ReasoningParserManager.list_registered()
    assert reasoning is None or ReasoningParserManager.get_reasoning_parser(reasoning)


@every_preset
def test_no_preset_trusts_remote_code(preset: dict[str, Any]) -> None:
    """That needs a pinned revision, which only a person can have read."""
    assert "TRUST_REMOTE_CODE" not in preset["settings"]


def test_each_parser_has_a_source() -> None:
    """The comment above a preset, or above the one before if they share it, names the source."""
    comment: list[str] = []
    name = ""
    for line in sources.PRESETS.read_text().splitlines():
        if line.startswith("#"):
            comment = [*comment, line] if comment and not name else [line]
            name = ""
        elif line.startswith("- name:"):
            name = line
        elif "_PARSER:" in line or "HF_OVERRIDES:" in line or "RUNNER:" in line:
            assert "Source:" in " ".join(comment), name


def test_qwen2_5_coder_gets_no_parser_because_hermes_returns_its_calls_as_text() -> None:
    """Qwen2.5-Coder writes tool calls without the tags that `hermes` looks for (vLLM issue 32926)."""
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    parser = ToolParserManager.get_tool_parser("hermes")(get_tokenizer(str(MODEL)))
    request = ChatCompletionRequest.model_validate({"messages": [], "model": "m"})
    for text in (f"<tools>\n{call}\n</tools>", f"```json\n{call}\n```"):
        assert not parser.extract_tool_calls(text, request).tools_called
    assert parser.extract_tool_calls(f"<tool_call>\n{call}\n</tool_call>", request).tools_called
    assert preset_of(MODEL_NAME="Qwen/Qwen2.5-Coder-7B-Instruct") is None


def test_a_parser_for_other_tokens_stops_the_start() -> None:
    with pytest.raises(TypeError, match="--tool-call-parser jamba cannot be used with the tokenizer"):
        ParserManager.get_parser(tool_parser_name="jamba", enable_auto_tools=True, tokenizer=get_tokenizer(str(MODEL)))


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without the head."""
    text = page.read_text().partition(f"\n## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def described(preset: dict[str, Any]) -> list[str]:
    """Return the row of a preset in the page's table."""
    values = dict(preset["settings"])
    parsers = [f"`{value}`" if (value := values.pop(name, None)) else "" for name in PARSERS]
    more = [f"`{name}`" if name == "HF_OVERRIDES" else f"`{name}={value}`" for name, value in values.items()]
    return [f"`{preset['name']}`", preset["example"], *parsers, ", ".join(more)]


def test_the_page_lists_the_presets() -> None:
    assert table(PAGE, "Presets") == [described(preset) for preset in sources.presets() if preset["settings"]]


def test_the_pages_table_of_gpus_follows_from_its_rule() -> None:
    for parameters, *cells in table(PAGE, "Which GPU"):
        for cell, size in zip(cells, (2, 1, 0.6), strict=True):
            weights = float(parameters.split()[0]) * size
            fitting = (name for name, memory in MEMORY_GB.items() if weights <= 0.75 * memory)
            assert cell == f"{weights:g} GB: {next(fitting, 'more than 8 GPUs')}", parameters


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
            id="the example, Llama-3.1-8B",
        ),
        pytest.param(
            {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, id="latent attention, DeepSeek-R1"
        ),
    ],
)
def test_the_pages_bytes_of_a_token_are_those_of_the_fit_check(config: dict[str, int]) -> None:
    plan = fit.Plan(tensor=1, pipeline=1, utilization=0.92, max_model_len=None, dtype="auto", cache_dtype="auto")
    assert f"{fit._cache_per_token(config, plan):,.0f} bytes" in PAGE.read_text()


def recipes() -> Iterator[str]:
    """Yield the page's examples that consist of variables only."""
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if all(re.match("[A-Z_]+=", line) for line in block.splitlines()):
            yield block


@pytest.mark.parametrize("block", list(recipes()))
def test_the_pages_recipes_are_accepted(block: str) -> None:
    pairs = (line.split("=", 1) for line in block.splitlines())
    environ = {name: value.strip("'") for name, value in pairs}
    args = arguments(**environ)
    for name in environ.keys() & {"MAX_MODEL_LEN", "MAX_NUM_SEQS", "MAX_LORA_RANK", "QUANTIZATION", "KV_CACHE_DTYPE"}:
        assert str(getattr(args, name.lower())) == environ[name]
