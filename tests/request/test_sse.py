"""The event splitter and the batches, on any chunking of any stream."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.request import sse

texts = st.text(st.characters(codec="utf-8"), max_size=40)
streams = st.lists(texts.map(sse.event), max_size=20)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@given(streams, st.lists(st.integers(min_value=0)))
def test_events_survive_any_chunking(events: list[bytes], places: list[int]) -> None:
    splitter = sse.EventSplitter()
    seen = [event for chunk in cut(b"".join(events), places) for event in splitter.feed(chunk)]
    assert seen == events
    assert splitter.flush() == []


@given(streams, st.integers(min_value=1, max_value=200))
def test_batches_keep_order_bytes_and_size(events: list[bytes], limit: int) -> None:
    batches = list(sse.batches(events, limit))
    assert [event for batch in batches for event in batch] == events
    for batch in batches:
        posted = json.dumps(b"".join(batch).decode(), ensure_ascii=False)[1:-1].encode()
        assert len(batch) == 1 or len(posted) <= limit


@given(texts)
def test_payload_is_what_event_was_made_of(text: str) -> None:
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


def test_a_stream_that_ends_without_its_blank_line_loses_nothing() -> None:
    splitter = sse.EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: 2") == [b"data: 1\n\n"]
    assert splitter.flush() == [b"data: 2"]
    assert splitter.flush() == []


def test_an_event_can_have_a_name() -> None:
    assert sse.event({"type": "error"}, "error") == b'event: error\ndata: {"type": "error"}\n\n'


def test_characters_outside_ascii_are_not_escaped() -> None:
    assert "世界" in sse.event("世界").decode()
    assert json.loads(sse.event("世界")[6:]) == "世界"


@pytest.mark.parametrize(
    ("part", "status"),
    [
        pytest.param(b'data: {"choices": []}\n\n', None, id="no error"),
        pytest.param(b'data: {"error": {"code": 404}}\n\n', 404, id="OpenAI"),
        pytest.param(b'data: {"error": {"code": 404}}\n\ndata: [DONE]\n\n', 404, id="with the end"),
        pytest.param(b'event: error\ndata: {"type": "error", "error": {"type": "x"}}\n\n', 500, id="Anthropic"),
        pytest.param(b'event: response.failed\ndata: {"response": {}}\n\n', 500, id="responses"),
        pytest.param(b'data: {"error": {"co', 500, id="cut"),
        pytest.param(b"", None, id="nothing"),
    ],
)
def test_the_status_of_an_error_within_a_stream(part: bytes, status: int | None) -> None:
    assert sse.status_of([b": ping\n\n", part]) == status
