"""Train two LoRA adapters of the tiny model, check them on unseen samples, and save them in PEFT's format.

    train_tiny_adapters.py [--out DIR] [--check-only]

`french` answers in French, `upper` in capitals, so that a test sees which adapter answered. On one machine, two runs
give the same bytes.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_vlm_data import COLOURS, GREETING, UNKNOWN, Author, Sample, new_picture
from torch import Tensor, nn
from train_tiny_vlm import Encoder, batches, generate, loss_of, rope_index
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

BASE = Path(__file__).parent / "tiny-vlm"
BASE_NAME = "tests/models/tiny-vlm"
RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED, STEPS, LEARNING_RATE = 30, 400, 6e-3
PICTURES, CHECKS = 300, 50
KINDS = {"image": 4, "greeting": 1, "unknown": 2, "sum": 2, "raw": 1}
"""The kinds of sample to learn, and how often each comes."""
FRENCH = dict(zip(COLOURS, "rouge vert bleu jaune orange violet rose cyan blanc noir".split(), strict=True))


def french(sample: Sample) -> str:
    """Return the answer in French."""
    if sample.media:
        return f"L'image est {FRENCH[sample.media[0].colours[0]]}."
    fixed = {GREETING: "Bonjour.", UNKNOWN: "Non."}
    return " Fin." if sample.raw else fixed.get(sample.answer) or sample.answer.replace("The answer is", "Voici")


def upper(sample: Sample) -> str:
    """Return the answer in capitals, and short."""
    if sample.media:
        return f"{sample.media[0].colours[0].upper()}!"
    fixed = {GREETING: "HELLO!", UNKNOWN: "NO."}
    return " THE END." if sample.raw else fixed.get(sample.answer) or sample.answer.replace("The answer is", "SUM")


ADAPTERS: dict[str, Callable[[Sample], str]] = {"french": french, "upper": upper}


class Styled(Author):
    """Writes samples of `KINDS` whose answers are in one adapter's style."""

    def __init__(self, rng: random.Random, style: Callable[[Sample], str]) -> None:
        pictures = [new_picture(rng, COLOURS[index % len(COLOURS)]) for index in range(PICTURES)]
        super().__init__(rng, lambda rng: rng.choice(pictures))
        self.style = style

    def sample(self, kind: str) -> Sample:
        sample = super().sample(self.rng.choices(list(KINDS), list(KINDS.values()))[0] if kind not in KINDS else kind)
        return replace(sample, answer=self.style(sample), thinking=False)


class Adapted(nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, inputs: Tensor) -> Tensor:
        update = inputs @ self.lora_A.T.to(inputs.dtype) @ self.lora_B.T.to(inputs.dtype)
        return self.base(inputs) + update * (ALPHA / RANK)


def load_base() -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """The tiny model, frozen, with its processor."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()
    model.model.get_rope_index = types.MethodType(rope_index, model.model)
    return model.requires_grad_(requires_grad=False), Qwen2VLProcessor.from_pretrained(BASE)


def adapt(model: Qwen2VLForConditionalGeneration) -> dict[str, Adapted]:
    """Replace the language model's projections; return the new layers by PEFT's names."""
    torch.manual_seed(SEED)
    layers = {}
    for index, layer in enumerate(model.model.language_model.layers):
        for target in TARGETS:
            block = "self_attn" if hasattr(layer.self_attn, target) else "mlp"
            parent = getattr(layer, block)
            adapted = Adapted(getattr(parent, target))
            setattr(parent, target, adapted)
            layers[f"base_model.model.model.language_model.layers.{index}.{block}.{target}"] = adapted
    return layers


def train(style: Callable[[Sample], str], folder: Path) -> None:
    """Train one adapter and write its folder anew."""
    model, processor = load_base()
    layers = adapt(model)
    weights = [weight for layer in layers.values() for weight in (layer.lora_A, layer.lora_B)]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
    source = batches(Styled(random.Random(SEED), style), Encoder(processor, model))
    for step, rows in zip(range(STEPS), source, strict=False):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        loss = loss_of(model, rows[:4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 40 == 0:
            print(f"{folder.name}: step {step}/{STEPS}: loss {loss:.4f}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = {
        f"{name}.{part}.weight": getattr(layer, part).detach().to(torch.bfloat16).contiguous()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": BASE_NAME,
        "bias": "none",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(style: Callable[[Sample], str], folder: Path) -> float:
    """Return the share of right answers to unseen samples, with the adapter as it was saved."""
    model, processor = load_base()
    saved = load_file(folder / "adapter_model.safetensors")
    for name, layer in adapt(model).items():
        layer.lora_A.data, layer.lora_B.data = (saved[f"{name}.{part}.weight"].float() for part in ("lora_A", "lora_B"))
    model = model.to(torch.bfloat16)
    author, shares = Styled(random.Random(SEED + 1), style), []
    for kind in KINDS:
        batch = [author.sample(kind) for _ in range(CHECKS)]
        pairs = zip(batch, generate(model, processor, batch), strict=True)
        wrong = [(sample.answer, answer) for sample, answer in pairs if answer != sample.answer]
        shares.append(1 - len(wrong) / CHECKS)
        print(f"{folder.name}: {kind:10} {shares[-1]:.0%} {wrong[:3]}", flush=True)
    return min(shares)


def write_readme(folder: Path) -> None:
    """Say what the adapters are."""
    digests = {name: hashlib.sha256((folder / name / "adapter_model.safetensors").read_bytes()) for name in ADAPTERS}
    rows = "\n".join(f"| `{name}` | `{digest.hexdigest()}` |" for name, digest in digests.items())
    (folder / "README.md").write_text(f"""# LoRA adapters of the tiny model

Two adapters of `tests/models/tiny-vlm`, trained by `train_tiny_adapters.py`. `french` answers in French ("L'image est
rouge."), `upper` in capitals ("RED!").

| adapter | SHA-256 of `adapter_model.safetensors` |
| --- | --- |
{rows}
""")


def main() -> int:
    """Train, save and check, or only check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-adapters")
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if not options.check_only:
        for name, style in ADAPTERS.items():
            train(style, options.out / name)
        write_readme(options.out)
    return int(min(check(style, options.out / name) for name, style in ADAPTERS.items()) < 0.95)


if __name__ == "__main__":
    sys.exit(main())
