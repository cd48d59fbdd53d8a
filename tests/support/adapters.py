"""The LoRA adapters of the embedded model, and wrong ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support.tiny import ROOT

FOLDER = ROOT / "tests/models/tiny-adapters"
BASE = "tests/models/tiny-vlm"
RANK = "8"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def files_of(name: str, **changes: Any) -> dict[str, bytes]:
    """Return the files of one of the two adapters; `changes` are made to its configuration."""
    config = json.loads((FOLDER / name / CONFIG).read_text()) | changes
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: (FOLDER / name / WEIGHTS).read_bytes()}


def weights(module: str = "layers.0.self_attn.q_proj", inputs: int = 128, outputs: int = 128, rank: int = 4) -> bytes:
    """Return the file of an adapter that changes one module."""
    name = f"base_model.model.model.language_model.{module}"
    matrices = {"lora_A": np.ones((rank, inputs), "float32"), "lora_B": np.ones((outputs, rank), "float32")}
    return save({f"{name}.{part}.weight": matrix for part, matrix in matrices.items()})


def wrong() -> dict[str, tuple[dict[str, bytes], str]]:
    """Return adapters that are refused with 400, by name: the files, and a part of the message."""
    french = files_of("french")
    (config, _), cut = french.items(), french[WEIGHTS][:-100]
    small, deep = weights(inputs=64), weights("layers.4.self_attn.q_proj")
    other = weights("layers.0.self_attn.rotary_emb")
    no_numbers = save({"base_model.model.model.language_model.layers.0.mlp.lora_A.weight": np.ones(3, "float32")})
    return {
        "other-model": (
            files_of("french", base_model_name_or_path="org/gpt-9"),
            "was trained for 'org/gpt-9'",
        ),
        "no-model": (files_of("french", base_model_name_or_path=None), "was trained for an unnamed model"),
        "no-lora": (files_of("french", peft_type="IA3"), "peft_type='IA3'"),
        "no-rank": (files_of("french", r=None), "must be a positive number"),
        "high-rank": (files_of("french", r=64), "has rank 64, and MAX_LORA_RANK=8"),
        "high-rank-of-one": (files_of("french", rank_pattern={"q_proj": 65}), "has rank 65"),
        "dora": (files_of("french", use_dora=True), "vLLM does not yet support DoRA"),
        "pickled": (dict([config]) | {"adapter_model.bin": french[WEIGHTS]}, "has no"),
        "no-config": ({WEIGHTS: french[WEIGHTS]}, "has no"),
        "config-is-no-json": ({CONFIG: b"{", WEIGHTS: french[WEIGHTS]}, "adapter_config.json is damaged"),
        "config-is-a-list": ({CONFIG: b"[]", WEIGHTS: french[WEIGHTS]}, "adapter_config.json is damaged"),
        "deep-config": ({CONFIG: b"[" * 200_000, WEIGHTS: french[WEIGHTS]}, "adapter_config.json is damaged"),
        "cut-off": (french | {WEIGHTS: cut}, "adapter_model.safetensors is damaged"),
        "empty": (french | {WEIGHTS: b""}, "adapter_model.safetensors is damaged"),
        "too-large": (french | {WEIGHTS: french[WEIGHTS] * 40}, "bytes; at most"),
        "small": (french | {WEIGHTS: small}, "has a matrix of shape [4, 64] for layers.0.self_attn.q_proj"),
        "deep": (french | {WEIGHTS: deep}, "layers.4.self_attn.q_proj, which the model does not have"),
        "other-module": (french | {WEIGHTS: other}, "vLLM cannot load"),
        "no-matrix": (french | {WEIGHTS: no_numbers}, "vLLM cannot load"),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Write an adapter's folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
