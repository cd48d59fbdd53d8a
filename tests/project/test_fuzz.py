"""Generated job inputs and streams. `make fuzz` runs 20,000 of them, then fuzzing guided by coverage."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4000"))
without_limit: Any = {"deadline": None, "suppress_health_check": list(HealthCheck)}

KEYS = """
messages prompt openai_route openai_input route body method stream sampling_params image images video videos
apply_chat_template role content type image_url url model tools
""".split()
WORDS = """
/v1/chat/completions /v1/completions v1/models /v1/../ping /v1/chat/completions?x=1 /metrics // user text image_url POST
GET true data:image/png;base64,AAAA https://example.org/a.png
""".split()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WORDS)
names = st.sampled_from(KEYS) | st.text(max_size=5)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=8
)

VALID: tuple[Any, ...] = (
    {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "sampling_params": {"max_tokens": 5}},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    {"prompt": "Hello", "image": "AAAA", "videos": ["https://example.org/v.mp4"], "max_tokens": 3},
    {"prompt": [1, 2, 3], "stream": False},
    {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [], "stream": True}},
    {"openai_route": "/v1/models"},
    {"route": "/tokenize", "body": {"prompt": "Hello"}, "method": "POST"},
)


@st.composite
def mutations(draw: Any) -> Any:
    """Return a valid input in which some values were replaced, removed or moved."""
    mutated = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 3))):
        holder = mutated
        while isinstance(holder, dict | list) and holder:
            key = draw(st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.integers(0, len(holder) - 1))
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                if isinstance(holder, dict) and draw(st.booleans()):
                    del holder[key]
                    key = draw(st.sampled_from(KEYS))
                holder[key] = draw(json_values)
                break
            holder = inner
    return mutated


@pytest.mark.timeout(600)
@given(mutations() | json_values)
@settings(max_examples=EXAMPLES, **without_limit)
def test_any_job_is_a_call_or_an_error_with_a_message(job_input: Any) -> None:
    targets.job(job_input)


PARTS = (b"data: {}\n\n", b"data: [DONE]\n\n", b"\r\n\r\n", b"\n", b":", b'data: {"error": {"code": 400}}\n\n')
pieces = st.sampled_from(PARTS)


@given(st.lists(pieces | st.binary(max_size=30), max_size=20).map(b"".join), st.integers(1, 40))
@settings(max_examples=3_000, **without_limit)
def test_any_stream_is_split_between_its_events(data: bytes, size: int) -> None:
    targets.stream(data, size)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_inputs_that_failed_once(file: Path) -> None:
    data = file.read_bytes()
    targets.job_text(data)
    targets.stream(data, 1)


@pytest.mark.parametrize("depth", [500, 990, 100_000])
def test_deeply_nested_input(depth: int) -> None:
    targets.job_text(b'{"prompt": "?", "x": ' + b"[" * depth + b"]" * depth + b"}")
