"""A tiny model that takes audio: Qwen3-ASR's architecture with random weights, so its answers have no meaning."""

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import MODEL

AUDIO_TOKENS = {"<|audio_start|>": 1014, "<|audio_end|>": 1015, "<|audio_pad|>": 1016}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ASRForConditionalGeneration"],
    "model_type": "qwen3_asr",
    "thinker_config": {
        "model_type": "qwen3_asr_thinker",
        "audio_token_id": AUDIO_TOKENS["<|audio_pad|>"],
        "audio_start_token_id": AUDIO_TOKENS["<|audio_start|>"],
        "audio_config": {
            "d_model": 64,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "encoder_layers": 1,
            "output_dim": 64,
            "n_window": 50,
            "downsample_hidden_size": 16,
        },
        "text_config": {
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
        },
    },
}
TOKENIZER = {
    "extra_special_tokens": {
        "audio_token": "<|audio_pad|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    }
}
PROCESSOR = {"processor_class": "Qwen3ASRProcessor", "feature_extractor_type": "Qwen3ASRFeatureExtractor"}
ENVIRONMENT = {"LOAD_FORMAT": "dummy", "LIMIT_MM_PER_PROMPT": '{"audio": 2}'}


def create(folder: Path) -> dict[str, str]:
    """Write the model without weights to `folder`, and return the settings that serve it with random ones."""
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    special = next(token for token in tokenizer["added_tokens"] if token["special"])
    tokenizer["added_tokens"] += [special | {"id": id_, "content": text} for text, id_ in AUDIO_TOKENS.items()]
    files = {
        "config.json": CONFIG,
        "preprocessor_config.json": PROCESSOR,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.loads((MODEL / "tokenizer_config.json").read_text()) | TOKENIZER,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return {**ENVIRONMENT, "MODEL_NAME": str(folder)}
