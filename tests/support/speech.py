"""The tiny speech model, and sounds that it understands."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np

from tests.models import tiny_asr_data
from tests.support.tiny import ROOT

RATE = tiny_asr_data.RATE
MODEL = ROOT / "tests/models/tiny-asr"
ENVIRONMENT = {"MODEL_NAME": str(MODEL), "MAX_MODEL_LEN": "128", "LIMIT_MM_PER_PROMPT": '{"audio": 1}'}
"""The settings that differ from those of the embedded model."""
LONGEST_SECONDS = 20
LARGEST_BYTES = 2_000_000
"""The longest sound and the largest file that the worker of the tests accepts."""
CODECS = {"wav": "pcm_s16le", "mp3": "libmp3lame", "flac": "flac", "ogg": "libopus", "mp4": "aac", "adts": "aac"}
"""The codec for each of FFmpeg's formats."""


def wav(keys: str, language: str = "de") -> bytes:
    """Return a WAV file with the sounds of some keys; a space is a pause between two segments."""
    return tiny_asr_data.wav(tiny_asr_data.speech(keys, language))


def silence(seconds: float = 1.0) -> bytes:
    """Return a WAV file without any sound."""
    return tiny_asr_data.wav(tiny_asr_data.silence(seconds))


def encoded(keys: str, form: str, rate: int = 44_100) -> bytes:
    """Return the sounds of some keys in one of FFmpeg's formats, with two channels at another rate than the model's."""
    rate = 48_000 if CODECS[form] == "libopus" else rate
    samples = tiny_asr_data.speech(keys, "de")
    places = np.arange(0, len(samples), tiny_asr_data.RATE / rate)
    resampled = np.interp(places, np.arange(len(samples)), samples).astype(np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(CODECS[form], rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([resampled, resampled]), format="fltp", layout="stereo")
        frame.rate, frame.time_base = rate, Fraction(1, rate)
        resampler = av.AudioResampler(stream.codec_context.format, "stereo", rate, stream.codec_context.frame_size or 0)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()
