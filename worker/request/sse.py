"""Server-sent events as bytes: split at event borders, gathered into batches, read. Pure: no I/O, no clock.

A batch holds whole events only, so a border between batches can cut neither an event nor a UTF-8 character.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

MAX_BATCH_BYTES = 900_000
"""RunPod takes at most 1 MB in one yield; the rest is room for the envelope."""

CHARACTER_BYTES = 6
"""What a character takes at most within a JSON string: a control character is written as `\\u001f`."""

DONE = b"data: [DONE]\n\n"

_EVENT_END = re.compile(rb"\r\n\r\n|\n\n")


class EventSplitter:
    """Cuts a byte stream, arriving in pieces of any size, into whole events with their closing blank line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes."""
        buffer = self._rest + data
        events, start = [], 0
        for end in _EVENT_END.finditer(buffer):
            events.append(buffer[start : end.end()])
            start = end.end()
        self._rest = buffer[start:]
        return events

    def flush(self) -> list[bytes]:
        """Return what is left when the stream has ended: an event without its blank line, or nothing."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def batches(events: Iterable[bytes], limit: int = MAX_BATCH_BYTES) -> Iterator[list[bytes]]:
    """Group events, in order, into lists of at most `limit` bytes once posted; a larger event stands alone."""
    batch: list[bytes] = []
    size = 0
    for event in events:
        posted = posted_size(event)
        if batch and size + posted > limit:
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += posted
    if batch:
        yield batch


def pieces(text: str, limit: int = MAX_BATCH_BYTES) -> Iterator[str]:
    """Cut text that takes more than `limit` bytes once posted; whoever reads the stream joins the pieces again."""
    if posted_size(text.encode(errors="replace")) <= limit:
        yield text
        return
    most = limit // CHARACTER_BYTES
    yield from (text[start : start + most] for start in range(0, len(text), most))


def posted_size(event: bytes) -> int:
    """Return how many bytes an event takes within a JSON string, where quotes and the like are escaped."""
    return len(event) + sum(map(event.count, (b'"', b"\\", b"\n", b"\r")))


def payload(event: bytes) -> Any | None:
    """Return the JSON of an event's data lines; None for a comment, `[DONE]` or an event without data."""
    lines = [line[5:].lstrip(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    data = b"\n".join(lines)
    return None if data in (b"", b"[DONE]") else json.loads(data)


def status_of(parts: Iterable[bytes]) -> int | None:
    """Return the HTTP status that an error at the start of one of a stream's parts would have; None without one."""
    for part in parts:
        if part.startswith(_ERROR_STARTS):
            first = _EVENT_END.split(part, maxsplit=1)[0]
            try:
                code = (payload(first) or {})["error"]["code"]
            except (ValueError, LookupError, TypeError):
                code = None
            return code if isinstance(code, int) else 500
    return None


_ERROR_STARTS = (b'data: {"error"', b"event: error\n", b"event: response.failed\n")


def event(value: Any, name: str | None = None) -> bytes:
    """Return one event, named or not, whose data is `value` as JSON."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode(errors="replace")
