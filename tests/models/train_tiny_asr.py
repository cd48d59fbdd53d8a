"""Train the tiny speech model of the tests, check it on unseen sounds, and save it as a checkpoint folder.

    train_tiny_asr.py [--out DIR] [--steps N] [--check-only]

The model is a Whisper of about 300,000 parameters that writes down the sounds of telephone keys in two languages, so
that a test can prove which sound, language, task and prompt arrived. On one machine, two runs give the same bytes.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tiny_asr_data import (
    CHUNK_SECONDS,
    KINDS,
    MAX_WORDS,
    RATE,
    WORDS,
    Sample,
    new_clip,
    new_sample,
    samples_of_one_clip,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

SEED = 20
STEPS = 2400
CLIPS, SAMPLES_PER_CLIP = 16, 4
IGNORED = -100
LEARNING_RATE = 4e-3
CHECKS_PER_KIND = 200
WIDTH, LAYERS, HEADS = 64, 2, 2
HOP = 320
"""Samples between two frames of features; half as many frames as Whisper's make training faster."""
FRAMES = CHUNK_SECONDS * RATE // HOP
TIME_STEPS = 50
"""Steps of timestamps in a second."""
MAX_TOKENS = 128
END = "<|endoftext|>"
SPECIAL = (
    END,
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
"""In the order of Whisper's vocabulary; vLLM expects a token for each language."""
TIMES = tuple(f"<|{step / TIME_STEPS:.2f}|>" for step in range(CHUNK_SECONDS * TIME_STEPS + 1))


def make_tokenizer() -> WhisperTokenizer:
    """A byte-level BPE in which each word, with or without a space before it, is one token."""
    words = [word for language in WORDS.values() for word in language]
    corpus = [f"{word} {word} {word.upper()} {word.upper()}" for word in words for _ in range(50)]
    corpus += [f"{word}\n{word.upper()}" for word in words for _ in range(50)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(learner.to_str())["model"]
    tokenizer = WhisperTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True, normalized=False) for token in SPECIAL[1:]]}
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TIMES])
    return tokenizer


def make_processor() -> WhisperProcessor:
    """The processor for sounds of CHUNK_SECONDS."""
    extractor = WhisperFeatureExtractor(chunk_length=CHUNK_SECONDS, sampling_rate=RATE, hop_length=HOP)
    return WhisperProcessor(extractor, make_tokenizer())


def make_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """The untrained model."""
    torch.manual_seed(SEED)
    end, start = tokenizer.convert_tokens_to_ids([END, "<|startoftranscript|>"])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=WIDTH * 4,
        decoder_ffn_dim=WIDTH * 4,
        max_source_positions=FRAMES // 2,
        max_target_positions=MAX_TOKENS,
        dropout=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start
    )
    return model


class Encoder:
    """Turns samples into the features of their sounds and the ids of their tokens."""

    def __init__(self, processor: WhisperProcessor) -> None:
        self.processor = processor
        self.end: int = processor.tokenizer.convert_tokens_to_ids(END)

    def features(self, batch: Sequence[Sample]) -> Tensor:
        """Return the features, of shape (samples, bins, frames)."""
        sounds = [sample.clip.samples for sample in batch]
        features: Tensor = self.processor.feature_extractor(
            sounds, sampling_rate=RATE, return_tensors="pt"
        ).input_features
        return features

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text's tokens."""
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def tokens(self, batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return the decoder's inputs and, shifted by one, the labels."""
        rows = []
        for sample in batch:
            prompt, answer = self.ids(sample.prompt), self.ids(sample.answer)
            ending = [] if sample.kind == "language" else [self.end]
            rows.append((prompt + answer + ending, [IGNORED] * len(prompt) + answer + ending))
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [self.end] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        return ids[:, :-1], labels[:, 1:]


def train(processor: WhisperProcessor, steps: int) -> WhisperForConditionalGeneration:
    """The trained model."""
    model, encoder, rng = make_model(processor.tokenizer), Encoder(processor), random.Random(SEED + 1)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for weight in weights if not any(weight is matrix for matrix in inner)]
    optimizers = [
        torch.optim.Muon(inner, LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    started = time.monotonic()
    for step in range(1, steps + 1):
        groups = [samples_of_one_clip(rng, SAMPLES_PER_CLIP) for _ in range(CLIPS)]
        ids, labels = encoder.tokens([sample for group in groups for sample in group])
        sounds = model.model.encoder(encoder.features([group[0] for group in groups])).last_hidden_state
        sounds = sounds.repeat_interleave(SAMPLES_PER_CLIP, 0)
        logits = model(encoder_outputs=(sounds,), decoder_input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scale = min(step / (steps // 20), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{steps}: loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def written(model: WhisperForConditionalGeneration, encoder: Encoder, batch: Sequence[Sample]) -> list[str]:
    """What the model writes about each sound, the likeliest token at a time."""
    features = encoder.features(batch).to(model.dtype)
    sounds = model.model.encoder(features).last_hidden_state
    texts = []
    for sample, sound in zip(batch, sounds, strict=True):
        ids = encoder.ids(sample.prompt)
        start = len(ids)
        while len(ids) < MAX_TOKENS and (len(ids) == start or sample.kind != "language"):
            hidden = model.model.decoder(
                input_ids=torch.tensor([ids]), encoder_hidden_states=sound[None], use_cache=False
            ).last_hidden_state
            ids.append(int(model.proj_out(hidden[0, -1]).argmax()))
            if ids[-1] == encoder.end:
                break
        texts.append(encoder.processor.tokenizer.decode(ids[start:], decode_with_timestamps=True).removesuffix(END))
    return texts


def check(folder: Path) -> dict[str, float]:
    """The share of right answers for each kind, over unseen sounds, of the model as it was saved.

    A time counts as right if it is at most 0.1 s off.
    """
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    encoder, rng = Encoder(WhisperProcessor.from_pretrained(folder)), random.Random(SEED + 2)
    shares = {}
    for kind in KINDS:
        counts = [0 if kind == "silence" else rng.randint(1, MAX_WORDS) for _ in range(CHECKS_PER_KIND)]
        batch = [new_sample(rng, kind, new_clip(rng, count)) for count in counts]
        right = 0
        for sample, said in zip(batch, written(model, encoder, batch), strict=True):
            right += is_right(encoder.ids(said), encoder.ids(sample.answer), encoder.ids(TIMES[0])[0])
            if said != sample.answer:
                print(f"  {sample.prompt!r}\n    said {said!r}, not {sample.answer!r}")
        shares[kind] = right / CHECKS_PER_KIND
        print(f"{kind:14} {shares[kind]:.1%}", flush=True)
    return shares


def is_right(said: list[int], answer: list[int], first_time: int) -> bool:
    """Whether two lists of tokens are equal, but for times that are at most 0.1 s apart."""
    tolerance = TIME_STEPS // 10
    return len(said) == len(answer) and all(
        one == other or (min(one, other) >= first_time and abs(one - other) <= tolerance)
        for one, other in zip(said, answer, strict=True)
    )


def save(model: WhisperForConditionalGeneration, processor: WhisperProcessor, folder: Path) -> None:
    """Write the checkpoint folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_readme(folder: Path, shares: dict[str, float]) -> None:
    """Say what the folder is, and how good."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = "\n".join(f"| {kind} | {share:.1%} |" for kind, share in shares.items())
    (folder / "README.md").write_text(f"""# Tiny speech model

A Whisper of about 300,000 parameters for tests, trained by `train_tiny_asr.py` on the sounds of
`tiny_asr_data.py`: telephone keys. It writes them down in English or German, translates German
into English, marks segments with their times, detects the language, and writes capitals after a
prompt in capitals.

Right answers on {CHECKS_PER_KIND} unseen sounds of each kind (a time may be 0.1 s off):

| kind | right |
| --- | --- |
{rows}

SHA-256 of `model.safetensors`: `{digest}`
""")
    print(f"sha256 {digest}")


def main() -> int:
    """Train, save and check, or only check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-asr")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    if not options.check_only:
        processor = make_processor()
        save(train(processor, options.steps), processor, options.out)
    shares = check(options.out)
    write_readme(options.out, shares)
    return int(min(shares.values()) < 0.97)


if __name__ == "__main__":
    sys.exit(main())
