"""Server-sent events: split, batched, as text, parsed. Most tests are properties of generated streams."""

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.request import sse

strings = st.text(st.characters(codec="utf-8"), max_size=40)
names = st.sampled_from([None, "error"])
line_ends = st.sampled_from([b"\n", b"\r\n"])
single_events = st.builds(
    lambda value, name, end: sse.event(value, name).replace(b"\n", end), strings, names, line_ends
)
streams = st.lists(single_events, max_size=20)
no_deadline = settings(deadline=None)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


def posted_size(text: str) -> int:
    """Return the bytes of a text in the body of a post."""
    return len(json.dumps(text, ensure_ascii=False)[1:-1].encode())


def ends(parts: Iterable[bytes | str]) -> set[int]:
    """Return the positions at which the parts end in the whole."""
    return set(itertools.accumulate(map(len, parts)))


@no_deadline
@given(streams, st.lists(st.integers(min_value=0)))
def test_any_cutting_of_a_stream_gives_the_same_events(events: list[bytes], places: list[int]) -> None:
    buffer = sse.EventBuffer()
    pieces = cut(b"".join(events), places)
    assert [event for piece in pieces for event in sse.split(buffer.feed(piece))] == events
    assert buffer.flush() == b""


@no_deadline
@given(streams, st.integers(min_value=1, max_value=200))
def test_batches_keep_order_bytes_and_size(events: list[bytes], limit: int) -> None:
    batches = list(sse.batches(b"".join(events), limit))
    assert [event for batch in batches for event in sse.split(batch)] == events
    for batch in batches:
        assert batch in events or posted_size(batch.decode()) <= limit


@no_deadline
@given(streams, st.integers(min_value=sse.CHARACTER_BYTES, max_value=200))
def test_texts_keep_order_characters_and_size(events: list[bytes], limit: int) -> None:
    texts = list(sse.texts(b"".join(events), limit))
    assert "".join(texts) == b"".join(events).decode()
    assert all(posted_size(text) <= limit for text in texts)


@no_deadline
@given(streams, st.integers(min_value=sse.CHARACTER_BYTES, max_value=200))
def test_texts_are_cut_between_events_unless_an_event_is_too_large(events: list[bytes], limit: int) -> None:
    decoded = [event.decode() for event in events]
    borders, start = {0}, 0
    for event in decoded:
        end = start + len(event)
        borders |= {end} if posted_size(event) <= limit else set(range(start, end + 1))
        start = end
    assert ends(sse.texts(b"".join(events), limit)) <= borders


@no_deadline
@given(streams)
def test_events_that_fit_are_one_text(events: list[bytes]) -> None:
    assert len(list(sse.texts(b"".join(events)))) == bool(events)


@no_deadline
@given(strings)
def test_the_payload_of_an_event_is_the_value_that_it_was_made_of(text: str) -> None:
    assert sse.payload(sse.event({"text": text})) == {"text": text}


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        pytest.param(b"data: [DONE]\n\n", None, id="done"),
        pytest.param(b": keep-alive\n\n", None, id="comment"),
        pytest.param(b"\n\n", None, id="empty"),
        pytest.param(b'event: ping\ndata: {"a": 1}\n\n', {"a": 1}, id="named"),
        pytest.param(b'data: {"a":\ndata: 1}\n\n', {"a": 1}, id="two data lines"),
        pytest.param(b'data: {"a": 1}\r\n\r\n', {"a": 1}, id="carriage returns"),
    ],
)
def test_payload(event: bytes, payload: object) -> None:
    assert sse.payload(event) == payload


def test_a_stream_that_ends_without_a_blank_line_loses_nothing() -> None:
    buffer = sse.EventBuffer()
    assert buffer.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert buffer.flush() == b"data: 2"
    assert buffer.flush() == b""


def test_an_event_can_have_a_name() -> None:
    assert sse.event({"type": "error"}, "error") == b'event: error\ndata: {"type": "error"}\n\n'


def test_characters_outside_ascii_are_not_escaped() -> None:
    assert "世界" in sse.event("世界").decode()
    assert json.loads(sse.event("世界")[6:]) == "世界"


@pytest.mark.parametrize(
    ("part", "status"),
    [
        pytest.param(b'data: {"choices": []}\n\n', None, id="no error"),
        pytest.param(b": ping\n\n", None, id="comment"),
        pytest.param(b'data: {"error": {"code": 404}}\n\n', 404, id="OpenAI"),
        pytest.param(b'data: {"error": {"code": 404}}\n\ndata: [DONE]\n\n', 404, id="with [DONE]"),
        pytest.param(b'event: error\ndata: {"type": "error", "error": {"type": "x"}}\n\n', 500, id="Anthropic"),
        pytest.param(b'event: response.failed\ndata: {"response": {}}\n\n', 500, id="responses"),
        pytest.param(b'data: {"error": {"co', 500, id="cut"),
        pytest.param(b"", None, id="empty"),
    ],
)
def test_the_status_of_an_error_in_a_stream(part: bytes, status: int | None) -> None:
    assert sse.error_status(part) == status
