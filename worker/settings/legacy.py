"""Settings of older workers that vLLM has no more: translated where that can be, explained where it cannot. Pure."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType

Translation = Callable[[str], dict[str, str]]


def _to(name: str) -> Translation:
    return lambda value: {name: value}


def _structured(value: str) -> dict[str, str]:
    backend = value.partition(":")[0]
    return {
        "STRUCTURED_OUTPUTS_CONFIG": json.dumps({"backend": "guidance" if backend == "lm-format-enforcer" else backend})
    }


def _task(value: str) -> dict[str, str]:
    converted = {"embed": "embed", "embedding": "embed", "classify": "classify", "score": "classify"}
    task = value.strip().lower()
    if task in converted:
        return {"RUNNER": "pooling", "CONVERT": converted[task]}
    return {"reward": {"RUNNER": "pooling"}, "generate": {"RUNNER": "generate"}, "auto": {"RUNNER": "auto"}}.get(
        task, {}
    )


TRANSLATED: Mapping[str, Translation] = MappingProxyType(
    {
        "GUIDED_DECODING_BACKEND": _structured,
        "TASK": _task,
        "SPECULATIVE_MODEL": _to("SPEC_MODEL"),
        "NUM_SPECULATIVE_TOKENS": _to("SPEC_TOKENS"),
        "OPENAI_RESPONSE_ROLE": _to("RESPONSE_ROLE"),
        "VLLM_ATTENTION_BACKEND": _to("ATTENTION_BACKEND"),
        "KV_CACHE_MEMORY": _to("KV_CACHE_MEMORY_BYTES"),
    }
)
"""What a setting has become."""

_BATCHES = "streams are paced by STREAM_BATCH_MS now"
_GONE = "vLLM has it no more"
_ROPE = "HF_OVERRIDES='{\"rope_parameters\": {…}}' says it now, type and theta together"
_SPECULATION = "put it into SPECULATIVE_CONFIG, a JSON object"

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "DEFAULT_BATCH_SIZE": _BATCHES,
        "DEFAULT_MIN_BATCH_SIZE": _BATCHES,
        "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": _BATCHES,
        "RAW_OPENAI_OUTPUT": "the proxy always gets what the engine sent",
        "ROPE_SCALING": _ROPE,
        "ROPE_THETA": _ROPE,
        "MAX_CONTEXT_LEN_TO_CAPTURE": "MAX_CUDAGRAPH_CAPTURE_SIZE bounds the batches that are captured",
        "DISABLE_ASYNC_OUTPUT_PROC": _GONE,
        "ENABLE_PROMPT_ADAPTER": _GONE,
        "SWAP_SPACE": "vLLM has no swap space any more; KV_OFFLOADING_SIZE offloads the cache, CPU_OFFLOAD_GB weights",
        "DISABLE_LOG_REQUESTS": "requests are not logged unless LOG_PROMPTS=true",
        "DISABLE_LOGGING_REQUEST": "requests are not logged unless LOG_PROMPTS=true",
        "ENGINE_USE_RAY": _GONE,
        "WORKER_USE_RAY": "DISTRIBUTED_EXECUTOR_BACKEND=ray says it now",
        "USE_V2_BLOCK_MANAGER": _GONE,
        "NUM_LOOKAHEAD_SLOTS": _GONE,
        "NUM_SCHEDULER_STEPS": _GONE,
        "MULTI_STEP_STREAM_OUTPUTS": _GONE,
        "SCHEDULER_DELAY_FACTOR": _GONE,
        "PREEMPTION_MODE": _GONE,
        "MAX_SEQ_LEN_TO_CAPTURE": "MAX_CUDAGRAPH_CAPTURE_SIZE bounds the batches that are captured",
        "MAX_PADDINGS": _GONE,
        "DEVICE": "vLLM finds its device by itself",
        "QUANTIZATION_PARAM_PATH": "the checkpoint holds the scales",
        "TOKENIZER_POOL_SIZE": _GONE,
        "TOKENIZER_POOL_TYPE": _GONE,
        "TOKENIZER_POOL_EXTRA_CONFIG": _GONE,
        "LORA_EXTRA_VOCAB_SIZE": _GONE,
        "LONG_LORA_SCALING_FACTORS": _GONE,
        "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE": _SPECULATION,
        "SPECULATIVE_MAX_MODEL_LEN": _SPECULATION,
        "SPECULATIVE_DISABLE_BY_BATCH_SIZE": _SPECULATION,
        "NGRAM_PROMPT_LOOKUP_MAX": _SPECULATION,
        "NGRAM_PROMPT_LOOKUP_MIN": _SPECULATION,
        "SPEC_DECODING_ACCEPTANCE_METHOD": _SPECULATION,
        "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_THRESHOLD": _SPECULATION,
        "TYPICAL_ACCEPTANCE_SAMPLER_POSTERIOR_ALPHA": _SPECULATION,
        "MODEL_LOADER_EXTRA_CONFIG_FILE": "MODEL_LOADER_EXTRA_CONFIG takes the JSON itself",
        "GUIDED_DECODING_DISABLE_FALLBACK": "STRUCTURED_OUTPUTS_CONFIG='{\"disable_fallback\": true}' says it now",
        "ENABLE_REASONING": "REASONING_PARSER alone says it now",
        "DISABLE_MM_PREPROCESSOR_CACHE": "MM_PROCESSOR_CACHE_GB=0 says it now",
    }
)
"""Why a setting does nothing, and what does instead."""
