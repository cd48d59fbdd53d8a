"""Properties that hold for any input. A target raises AssertionError when one does not."""

import json
from typing import Any

from worker.errors import JobError
from worker.media.parts import Parts
from worker.request import shape, sse
from worker.request.inputs import JobInput

LINE_ENDS = b"\r\n"


def job(value: Any) -> None:
    """Parse a job's input. The result is a call that can be sent, or an error of the client with a message."""
    job_input = JobInput(value)
    if job_input.stream_form not in (None, "sse", "objects"):
        raise AssertionError(f"unknown stream form {job_input.stream_form!r}")
    for control_routes in (False, True):
        try:
            call = job_input.call(control_routes)
        except JobError as caught:
            error = caught.error()
            if not error["message"] or not 400 <= error["code"] < 500:
                raise AssertionError(f"not an error of the client with a message: {error}") from caught
            continue
        if not call.path.startswith("/") or call.method not in ("GET", "POST"):
            raise AssertionError(f"a call that cannot be sent: {call}")
        Parts(json.dumps(call.body).encode()).paths_of("image")


def job_text(data: bytes) -> None:
    """Check the shape of a JSON text, and parse it as a job's input. Other text is ignored."""
    accepted = is_accepted(data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    if json.detect_encoding(data).startswith("utf-8") and accepted != (measured_depth(value) <= shape.MAX_DEPTH):
        raise AssertionError("the check of the shape differs from what the parser has found")
    job(value)


def is_accepted(body: bytes) -> bool:
    """Return whether the check of the shape accepts a body."""
    try:
        shape.check_shape(body)
    except JobError:
        return False
    return True


def measured_depth(value: Any) -> int:
    """Return how deep lists and objects are nested in a parsed value."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def stream(data: bytes, size: int) -> None:
    """Split a stream that arrives in pieces of `size` bytes. Nothing is lost, and no event is cut."""
    buffer = sse.EventBuffer()
    parts = [buffer.feed(data[start : start + size]) for start in range(0, len(data), size)]
    if any(part and not part.endswith((b"\n\n", b"\r\n\r\n")) for part in parts):
        raise AssertionError("an event was cut")
    parts.append(buffer.flush())
    if b"".join(parts) != data:
        raise AssertionError("bytes were lost")
    if _contents(parts) != _contents([data]):
        raise AssertionError("the events depend on how the stream was cut")
    events = list(sse.split(data))
    batches = list(sse.batches(data, 1000))
    if [event for batch in batches for event in sse.split(batch)] != events:
        raise AssertionError("events were lost")
    if any(batch not in events and sse.posted_size(batch) > 1000 for batch in batches):
        raise AssertionError("a batch is too large")
    for event in events:
        status = sse.error_status(event)
        if status is not None and not isinstance(status, int):
            raise AssertionError(f"not a status: {status!r}")
    text = data.decode(errors="replace")
    if "".join(sse.texts(text.encode(), 600)) != text:
        raise AssertionError("text was lost")


def _contents(parts: list[bytes]) -> list[bytes]:
    """Return all events that are not empty, without the line ends around them."""
    stripped = (event.strip(LINE_ENDS) for part in parts for event in sse.split(part))
    return [event for event in stripped if event]
