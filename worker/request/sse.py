"""Server-sent events as bytes: split between events, batched, parsed. Pure: no I/O, no clock.

Text is cut between events wherever possible, so that neither an event nor a UTF-8 character is broken.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from worker.errors import status_of

MAX_BATCH_BYTES = 900_000
"""RunPod accepts at most 1 MB in one yield. The rest is room for the envelope."""

CHARACTER_BYTES = 6
"""The most bytes that one character takes in a JSON string: control characters are written as `\\u001f`."""

DONE = b"data: [DONE]\n\n"

_GAPS = (b"\n\n", b"\r\n\r\n")
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n")
_ERROR_STARTS = (b'data: {"error"', b"event: error\n", b"event: response.failed\n")


class EventBuffer:
    """Collects a byte stream that arrives in pieces of any size, and returns whole events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return all events that are complete now, each with its closing blank line."""
        buffer = self._rest + data
        end = max((at + len(gap) for gap in _GAPS if (at := buffer.rfind(gap)) >= 0), default=0)
        self._rest = buffer[end:]
        return buffer[:end]

    def flush(self) -> bytes:
        """Return an event without its blank line, once the stream has ended."""
        rest, self._rest = self._rest, b""
        return rest


def split(events: bytes) -> Iterator[bytes]:
    """Yield the single events, each with its closing blank line."""
    start = 0
    for end in _EVENT_END.finditer(events):
        yield events[start : end.end()]
        start = end.end()
    if start < len(events):
        yield events[start:]


def batches(events: bytes, limit: int = MAX_BATCH_BYTES) -> Iterator[bytes]:
    """Cut events into batches of at most `limit` bytes once posted. An event that is larger is a batch of its own."""
    if not events:
        return
    if posted_size(events) <= limit:
        yield events
        return
    batch, size = bytearray(), 0
    for event in split(events):
        posted = posted_size(event)
        if batch and size + posted > limit:
            yield bytes(batch)
            batch, size = bytearray(), 0
        batch += event
        size += posted
    yield bytes(batch)


def texts(events: bytes, limit: int = MAX_BATCH_BYTES) -> Iterator[str]:
    """Return the events as text of at most `limit` bytes each once posted. Only a larger event is cut in pieces."""
    for batch in batches(events, limit):
        text = batch.decode()
        if len(batch) * 2 <= limit or posted_size(batch) <= limit:
            yield text
        else:
            most = limit // CHARACTER_BYTES
            yield from (text[start : start + most] for start in range(0, len(text), most))


def posted_size(text: bytes) -> int:
    """Return the bytes that UTF-8 text takes in a JSON string, where quotes, backslashes and newlines are escaped."""
    return len(text) + sum(map(text.count, (b'"', b"\\", b"\n", b"\r")))


def payload(event: bytes) -> Any | None:
    """Return the JSON of an event's data lines; None for a comment, `[DONE]` or an event without data."""
    lines = [line[5:].lstrip(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    return None if data in (b"", b"[DONE]") else json.loads(data)


def error_status(part: bytes) -> int | None:
    """Return the HTTP status of the error event at the start of a stream's part; None without one."""
    if not part.startswith(_ERROR_STARTS):
        return None
    try:
        return status_of(payload(next(split(part)))) or 500
    except ValueError:
        return 500


def event(value: Any, name: str | None = None) -> bytes:
    """Return one event, with or without a name, whose data is `value` as JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode(errors="replace")
