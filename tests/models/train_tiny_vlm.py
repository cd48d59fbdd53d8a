"""Train the tiny vision-language model of the tests, check it on unseen samples, and save it as a checkpoint folder.

    train_tiny_vlm.py [--out DIR] [--check-only]

The model is a Qwen2-VL of about a million parameters that answers a handful of questions about colours, tools and sums,
so that a test can prove which pixels, prompts and tools arrived. On one machine, two runs give the same bytes.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from PIL import Image
from tiny_vlm_data import (
    CITIES,
    COLOURS,
    KINDS,
    WEATHERS,
    WORDS,
    Author,
    Media,
    Sample,
    new_picture,
    new_video,
    thought,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SEED = 20
STEPS = 800
ROWS, ROW_TOKENS = 10, 400
IGNORED = -100
LEARNING_RATE = 4e-3
PICTURES, VIDEOS = 1500, 720
CHECKS_PER_KIND = 100
MERGE = 2
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
# As Qwen2's, but with two digits in one piece: a number up to 99 is then always one token, which sums are learnt by.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD = re.compile(r"<\|(image|video)_pad\|>")
TEMPLATE = r"""
{%- macro shown(part) -%}
    {%- if part.type in ("image", "image_url") -%}
        {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
    {%- elif part.type in ("video", "video_url") -%}
        {{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
    {%- elif part.type == "text" -%}
        {{- part.text -}}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- "<|im_start|>system\n" -}}
    {%- if messages[0].role == "system" -%}
        {%- if messages[0].content is string -%}
            {{- messages[0].content -}}
        {%- else -%}
            {%- for part in messages[0].content -%}
                {{- shown(part) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- "\n\n" -}}
    {%- endif -%}
    {{- "# Tools\n\nYou may call these functions:\n<tools>" -}}
    {%- for tool in tools -%}
        {{- "\n" + (tool | tojson) -}}
    {%- endfor -%}
    {{- "\n</tools>\n\nCall each of them with\n<tool_call>\n" -}}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}' + "\n</tool_call><|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (tools and loop.first and message.role == "system") -%}
        {%- if message.role != "tool" -%}
            {{- "<|im_start|>" + message.role + "\n" -}}
        {%- elif loop.first or loop.previtem.role != "tool" -%}
            {{- "<|im_start|>user" -}}
        {%- endif -%}
        {{- "\n<tool_response>\n" if message.role == "tool" -}}
        {%- if message.content is string -%}
            {{- message.content.split("</think>\n\n")[-1] -}}
        {%- else -%}
            {%- for part in message.content or [] -%}
                {{- shown(part) -}}
            {%- endfor -%}
        {%- endif -%}
        {{- "\n</tool_response>" if message.role == "tool" -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set arguments = function.arguments -%}
            {{- "\n" if message.content or not loop.first -}}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
            {{- (arguments if arguments is string else arguments | tojson) + "}\n</tool_call>" -}}
        {%- endfor -%}
        {%- if message.role != "tool" or loop.last or loop.nextitem.role != "tool" -%}
            {{- "<|im_end|>\n" -}}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
    {%- if enable_thinking is not defined or enable_thinking is not true -%}
        {{- "<think>\n\n</think>\n\n" -}}
    {%- endif -%}
{%- endif -%}
""".strip()


def prompt_text(processor: Qwen2VLProcessor, sample: Sample) -> str:
    """Return the whole prompt of a sample, with one placeholder per picture or video."""
    if sample.raw is not None:
        return sample.raw
    text: str = processor.apply_chat_template(
        sample.messages, tools=sample.tools, add_generation_prompt=True, tokenize=False, enable_thinking=sample.thinking
    )
    return text


def completion(sample: Sample) -> str:
    """Return what the model is to write, its thought included."""
    return f"<think>\n{thought(sample)}\n</think>\n\n{sample.answer}" if sample.thinking else sample.answer


def ascii_corpus() -> Iterator[str]:
    """Yield the plain words of some samples, and each word that shall be one token."""
    dot = Media(("red",), picture=Image.new("RGB", (1, 1)))
    author = Author(random.Random(SEED), lambda _: dot, lambda _: dot)
    processor = make_processor(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    markup = re.compile("|".join(map(re.escape, SPECIAL + MARKUP)) + "|[^\x00-\x7f]")
    for sample in samples(author, 4000):
        yield markup.sub("\n", prompt_text(processor, sample) + completion(sample))
    for word in (*map(str, range(20)), *COLOURS, *CITIES, *WEATHERS, *WORDS):
        yield f'"{word}" {word} {word.lower()} "{word.lower()}"' * 50


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows ASCII words only, so that any other character is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ascii_corpus(),
        trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
    """The processor that shrinks every picture and video frame to about four tokens."""
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=PIXELS),
        tokenizer,
        Qwen2VLVideoProcessor(size=PIXELS, cap_pixels_per_frame=False, do_sample_frames=False),
        chat_template=TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLForConditionalGeneration:
    """The untrained model."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    torch.manual_seed(SEED)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 4},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    return model


def samples(author: Author, count: int) -> Iterator[Sample]:
    """Yield random samples, the kinds mixed by their weights."""
    for kind in author.rng.choices(list(KINDS), list(KINDS.values()), k=count):
        yield author.sample(kind)


@dataclass
class Encoded:
    """A sample as the model takes it: token ids, the same where they are to be learnt, positions, patches and grids."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    pixels: list[tuple[Media, Tensor, Tensor]]


def patches(grid: Tensor) -> int:
    """How many tokens a picture or video takes."""
    return int(grid.prod()) // MERGE**2


class Encoder:
    """Turns samples into token ids and pixels as the processor does, but processes each picture only once."""

    def __init__(self, processor: Qwen2VLProcessor, model: Qwen2VLForConditionalGeneration) -> None:
        self.processor, self.model = processor, model
        self.cache: dict[Media, tuple[Tensor, Tensor]] = {}

    def pixels(self, media: Media) -> tuple[Tensor, Tensor]:
        """The patches of a picture or video, and their grid."""
        if media not in self.cache:
            if media.picture:
                found = self.processor.image_processor(media.picture, return_tensors="pt")
            else:
                found = self.processor.video_processor([media.frames], return_tensors="pt")
            self.cache[media] = tuple(found.values())[:2]
        return self.cache[media]

    def __call__(self, sample: Sample) -> Encoded:
        pixels = [(media, *self.pixels(media)) for media in sample.media]
        grids = iter(grid for _, _, grid in pixels)
        prompt = PAD.sub(lambda pad: pad.group() * patches(next(grids)), prompt_text(self.processor, sample))
        read = self.processor.tokenizer.encode(prompt)
        end = "<|im_end|>" if sample.raw is None else "<|endoftext|>"
        write = self.processor.tokenizer.encode(completion(sample) + end)
        ids, labels = read + write, [IGNORED] * len(read) + write
        tokens = torch.tensor(ids)
        return Encoded(tokens, torch.tensor(labels), self.positions(tokens, pixels), pixels)

    def positions(self, ids: Tensor, pixels: list[tuple[Media, Tensor, Tensor]]) -> Tensor:
        """Return the plain position of each token, and the three of the rotary embedding."""
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        pictures = [grid[0] for media, _, grid in pixels if media.picture]
        videos = [grid[0] for media, _, grid in pixels if not media.picture]
        places = row_positions(kinds.tolist(), {1: iter(pictures), 2: iter(videos)})
        return torch.cat([torch.arange(len(ids))[None], places])


def row_positions(kinds: list[int], grids: dict[int, Iterator[Tensor]]) -> Tensor:
    """Return the rotary positions, of shape (3, tokens), of text (type 0), pictures (1) and videos (2)."""
    parts: list[Tensor] = []
    start = 0
    for kind, group in itertools.groupby(kinds):
        if kind:
            count, height, width = next(grids[kind]).tolist()
            sizes = (count, height // MERGE, width // MERGE)
            places = torch.cartesian_prod(*map(torch.arange, sizes)).T
        else:
            places = torch.arange(len(list(group))).expand(3, -1)
        parts.append(places + start)
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, 1)


def rope_index(
    _: Qwen2VLModel,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_unused: object,
) -> tuple[Tensor, Tensor]:
    """Count positions as vLLM and Qwen2-VL's paper do: what follows a video starts after its last frame.

    Takes the place of the model's own method, which in transformers 5.19 starts it after the first.
    """
    grids = {1: iter([] if image_grid_thw is None else image_grid_thw)}
    grids[2] = iter([] if video_grid_thw is None else video_grid_thw)
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long)
    deltas = []
    for row, kinds in enumerate(mm_token_type_ids):
        present = torch.ones_like(kinds).bool() if attention_mask is None else attention_mask[row].bool()
        found = row_positions(kinds[present].tolist(), grids)
        positions[:, row, present] = found
        deltas.append(int(found.max()) + 1 - int(present.sum()))
    return positions, torch.tensor(deltas)[:, None]


def collate(rows: list[list[Encoded]]) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs for rows of samples packed one behind the other, and the labels."""
    ids = torch.zeros(len(rows), ROW_TOKENS, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros(4, *ids.shape, dtype=torch.long)
    for index, row in enumerate(rows):
        length = sum(len(item.ids) for item in row)
        ids[index, :length] = torch.cat([item.ids for item in row])
        labels[index, :length] = torch.cat([item.labels for item in row])
        positions[:, index, :length] = torch.cat([item.positions for item in row], 1)
    inputs = {"input_ids": ids, "position_ids": positions}
    pixels = [found for row in rows for item in row for found in item.pixels]
    for names, kind in (
        (("pixel_values", "image_grid_thw"), "image"),
        (("pixel_values_videos", "video_grid_thw"), "video"),
    ):
        found = [tensors for media, *tensors in pixels if media.part["type"] == kind]
        if found:
            inputs |= {name: torch.cat(tensors) for name, tensors in zip(names, zip(*found, strict=True), strict=True)}
    return inputs, labels


def batches(author: Author, encoder: Encoder) -> Iterator[list[list[Encoded]]]:
    """Endless batches of packed rows."""
    rows: list[list[Encoded]] = [[] for _ in range(ROWS)]
    while True:
        for item in map(encoder, samples(author, 100)):
            if len(item.ids) > ROW_TOKENS:
                continue
            room = next((row for row in rows if sum(len(other.ids) for other in [*row, item]) <= ROW_TOKENS), None)
            if room is None:
                yield rows
                rows = [[] for _ in range(ROWS)]
                room = rows[0]
            room.append(item)


def answer_lengths(labels: Tensor) -> Tensor:
    """For each label, how many there are in the answer that it belongs to."""
    row = (labels != IGNORED).flatten()
    number = torch.cat([row[:1].int(), (row[1:] & ~row[:-1]).int()]).cumsum(0)
    lengths = torch.bincount(number[row], minlength=int(number[-1]) + 1)
    return lengths[number].view_as(labels)


def loss_of(model: Qwen2VLForConditionalGeneration, rows: list[list[Encoded]]) -> Tensor:
    """The mean loss over the answer tokens; the more there are in a sample, the less each counts."""
    inputs, labels = collate(rows)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    losses = cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted], reduction="none")
    weights = answer_lengths(labels[:, 1:])[wanted] ** -0.5
    return (losses * weights).sum() / weights.sum()


def media_pools() -> tuple[list[Media], list[Media]]:
    """The pictures and videos of the training, every colour and every change of colour as often as any other."""
    rng = random.Random(SEED + 1)
    pictures = [new_picture(rng, COLOURS[index % 10]) for index in range(PICTURES)]
    pairs = [(first, last) for first in COLOURS for last in COLOURS if first != last]
    return pictures, [new_video(rng, *pairs[index % len(pairs)]) for index in range(VIDEOS)]


def make_optimizers(model: Qwen2VLForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, which makes it learn in half the steps, and AdamW for the rest."""
    inner = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for weight in model.parameters() if not any(weight is matrix for matrix in inner)]
    return [
        torch.optim.Muon(inner, LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05),
    ]


def train(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """The trained model."""
    model = make_model(processor.tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)
    pictures, videos = media_pools()
    author = Author(random.Random(SEED + 2), lambda rng: rng.choice(pictures), lambda rng: rng.choice(videos))
    optimizers = make_optimizers(model)
    source, started, seen = batches(author, Encoder(processor, model)), time.monotonic(), 0
    for step, rows in zip(range(1, STEPS + 1), source, strict=False):
        loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(step / (STEPS // 20), 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * scale
            optimizer.step()
            optimizer.zero_grad()
        seen += sum(map(len, rows))
        if step % 50 == 0:
            spent = time.monotonic() - started
            print(f"step {step}/{STEPS}: loss {loss:.4f}, {seen} samples, {spent:.0f} s", flush=True)
    return model.eval()


def generate(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, batch: list[Sample]) -> list[str]:
    """What the model answers to each sample, markup included."""
    pictures = [media.picture for sample in batch for media in sample.media if media.picture]
    videos = [media.frames for sample in batch for media in sample.media if not media.picture]
    inputs = processor(
        text=[prompt_text(processor, sample) for sample in batch],
        images=pictures or None,
        videos=videos or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(model.dtype)
    output = model.generate(**inputs, max_new_tokens=320)
    return processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check(folder: Path) -> dict[str, float]:
    """The share of right answers for each kind, over unseen samples, of the model as it was saved."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    model.model.get_rope_index = types.MethodType(rope_index, model.model)
    processor = Qwen2VLProcessor.from_pretrained(folder)
    author = Author(random.Random(SEED + 3))
    shares = {}
    for kind in KINDS:
        right = 0
        for _ in range(CHECKS_PER_KIND // 25):
            batch = [author.sample(kind) for _ in range(25)]
            for sample, said in zip(batch, generate(model, processor, batch), strict=True):
                right += said == completion(sample)
                if said != completion(sample):
                    print(f"  {prompt_text(processor, sample)[-300:]!r}\n    said {said!r}, not {completion(sample)!r}")
        shares[kind] = right / CHECKS_PER_KIND
        print(f"{kind:14} {shares[kind]:.1%}", flush=True)
    print(f"{'overall':14} {sum(shares.values()) / len(shares):.2%}", flush=True)
    return shares


def save(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, folder: Path) -> None:
    """Write the checkpoint folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    defaults = folder / "generation_config.json"
    # vLLM is greedy only at temperature 0, which transformers does not write for a model that never samples.
    defaults.write_text(json.dumps(json.loads(defaults.read_text()) | {"temperature": 0.0}, indent=2) + "\n")
    for part in (processor.tokenizer, processor.image_processor, processor.video_processor):
        part.save_pretrained(folder)


def write_readme(folder: Path, shares: dict[str, float]) -> None:
    """Say what the folder is, and how good."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rows = "\n".join(f"| {kind} | {share:.0%} |" for kind, share in shares.items())
    (folder / "README.md").write_text(f"""# Tiny vision-language model

A Qwen2-VL of about a million parameters for tests, trained by `train_tiny_vlm.py` on the samples of
`tiny_vlm_data.py`. It names the colours of pictures and videos, calls `get_weather`, adds small
numbers, thinks aloud when asked to, and tells one story.

Right answers on {CHECKS_PER_KIND} unseen samples of each kind:

| kind | right |
| --- | --- |
{rows}

SHA-256 of `model.safetensors`: `{digest}`
""")
    print(f"sha256 {digest}")


def main() -> int:
    """Train, save and check, or only check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-vlm")
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    if not options.check_only:
        processor = make_processor(train_tokenizer())
        save(train(processor), processor, options.out)
    shares = check(options.out)
    write_readme(options.out, shares)
    return int(min(shares.values()) < 0.99)


if __name__ == "__main__":
    sys.exit(main())
