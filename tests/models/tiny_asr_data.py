"""Sounds of telephone keys with the one right transcript, to train and check the tiny speech model.

A word is the sound of one key: two tones at once, as telephones send them (ITU-T Q.23). In a German sound there is a
hum below the tones, so that the language can be heard. A long pause separates two segments.
"""

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

RATE = 16_000
"""Samples per second."""
CHUNK_SECONDS = 4
"""The longest sound that the model takes at once; vLLM cuts longer ones at a quiet place."""
MAX_WORDS = 9
KEYS = "0123456789*#"
ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "star", "hash")
GERMAN = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "Stern", "Raute")
WORDS = {"en": ENGLISH, "de": GERMAN}
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
PAD = ("123", "456", "789", "*0#")
HUM = 300
TONE_SECONDS, GAP_SECONDS, PAUSE_SECONDS = 0.3, 0.2, 0.8
FADE_SECONDS = 0.02
VOLUME = 0.3

FREQUENCIES = {
    key: (row, column) for line, row in zip(PAD, ROWS, strict=True) for key, column in zip(line, COLUMNS, strict=True)
}


def tone(key: str, language: str, seconds: float = TONE_SECONDS, pitch: float = 1.0) -> Samples:
    """Return the sound of one key, with soft edges."""
    times = np.arange(round(seconds * RATE)) / RATE
    waves = [*FREQUENCIES[key], *([HUM] if language == "de" else [])]
    sound: Any = sum(np.sin(2 * np.pi * frequency * pitch * times) for frequency in waves) / len(waves)
    edge = np.minimum(times, times[::-1]) / FADE_SECONDS
    samples: Samples = (sound * np.minimum(edge, 1.0)).astype(np.float32)
    return samples


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * RATE), np.float32)


def speech(keys: str, language: str = "en") -> Samples:
    """Return the sounds of some keys; a space is a pause between two segments."""
    parts = [
        silence(PAUSE_SECONDS) if key == " " else np.concatenate([tone(key, language), silence(GAP_SECONDS)])
        for key in keys
    ]
    samples: Samples = np.concatenate([*parts, silence(GAP_SECONDS)]) * np.float32(VOLUME)
    return samples


def wav(samples: Samples, rate: int = RATE) -> bytes:
    """Return samples as a WAV file with 16 bits."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 32_767).astype("<i2").tobytes())
    return file.getvalue()


def spoken(keys: str, language: str) -> str:
    """Return the words of some keys."""
    return " ".join(WORDS[language][KEYS.index(key)] for key in keys)


@dataclass(frozen=True)
class Segment:
    """Words without a long pause between them; its times are seconds."""

    keys: str
    start: float
    end: float


@dataclass(frozen=True)
class Clip:
    """A sound with its language and its segments."""

    samples: Samples
    language: str
    segments: Sequence[Segment]


def new_clip(rng: Random, count: int) -> Clip:
    """Return a random sound of at most CHUNK_SECONDS and `count` words. Volume, pitch, noise and all lengths vary."""
    language = rng.choice(tuple(WORDS))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(CHUNK_SECONDS * RATE, np.float32)
    samples = noise * rng.choice((0.0, rng.uniform(0, 0.01)))
    place, pitch, volume = rng.uniform(0, 0.4), rng.uniform(0.985, 1.015), rng.uniform(0.1, 0.6)
    segments: list[Segment] = []
    for _ in range(count):
        is_new = not segments or rng.random() < 0.25
        if segments:
            place += rng.uniform(0.6, 1.0) if is_new else rng.uniform(0.1, 0.3)
        key, seconds = rng.choice(KEYS), rng.uniform(0.2, 0.4)
        if place + seconds > CHUNK_SECONDS - 0.1:
            break
        sound = volume * tone(key, language, seconds, pitch)
        first = round(place * RATE)
        samples[first : first + len(sound)] += sound
        start = place if is_new else segments[-1].start
        keys = key if is_new else segments[-1].keys + key
        place += seconds
        segments[len(segments) - (not is_new) :] = [Segment(keys, start, place)]
    end = rng.randint(min(round((place + 0.1) * RATE), len(samples)), len(samples))
    return Clip(samples[:end], language, segments)


@dataclass(frozen=True)
class Sample:
    """What is asked about a sound, as vLLM asks it, and the right answer."""

    kind: str
    clip: Clip
    prompt: str
    answer: str


KINDS = {"language": 1, "transcribe": 4, "translate": 3, "timestamps": 4, "other_language": 1, "style": 2, "silence": 0}
"""The kinds of samples, and how often each is asked about a sound with words. Silence has only its own kind."""
SILENT = 0.06
"""The share of sounds without words."""


def samples_of_one_clip(rng: Random, count: int) -> list[Sample]:
    """Return random samples about the same random sound."""
    if rng.random() < SILENT:
        clip = new_clip(rng, 0)
        return [new_sample(rng, "silence", clip) for _ in range(count)]
    clip = new_clip(rng, rng.randint(1, MAX_WORDS))
    return [new_sample(rng, kind, clip) for kind in rng.choices(list(KINDS), list(KINDS.values()), k=count)]


def new_sample(rng: Random, kind: str, clip: Clip) -> Sample:
    """Return a random sample of a kind about a sound."""
    language, task, prompt = clip.language, "transcribe", ""
    if kind == "language":
        return Sample(kind, clip, "<|startoftranscript|>", f"<|{language}|>")
    if kind == "other_language":
        language = rng.choice([other for other in WORDS if other != language])
    if kind in ("silence", "timestamps", "style"):
        task = rng.choice(("transcribe", "translate"))
    if kind == "translate":
        task = kind
    has_times = kind == "timestamps" or (kind == "silence" and rng.random() < 0.5)
    if kind == "style":
        words = spoken("".join(rng.choices(KEYS, k=rng.randint(1, 4))), rng.choice(tuple(WORDS)))
        prompt = rng.choice((words, words.upper()))
    answer = _answer(clip, "en" if task == "translate" else language, has_times)
    start = ("<|prev|>" if prompt else "") + prompt + "<|startoftranscript|>"
    mode = "<|0.00|>" if has_times else "<|notimestamps|>"
    return Sample(kind, clip, f"{start}<|{language}|><|{task}|>{mode}", answer.upper() if prompt.isupper() else answer)


def _answer(clip: Clip, language: str, has_times: bool) -> str:
    """Return the transcript, which `<|0.00|>` has begun if it has times. Silence with times ends at once."""
    texts = [spoken(segment.keys, language) for segment in clip.segments]
    if not has_times:
        return " ".join(texts)
    starts = [f"<|{segment.start:.1f}0|>" for segment in clip.segments[1:]]
    ends = [f"<|{segment.end:.1f}0|>" for segment in clip.segments]
    pieces = zip(["", *starts], texts, ends, strict=True) if texts else [("", "", "<|0.00|>")]
    return "".join("".join(piece) for piece in pieces)
