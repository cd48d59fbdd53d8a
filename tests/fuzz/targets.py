"""What must hold for any input whatever. Each target raises when it does not."""

import json
from typing import Any

from worker.errors import JobError
from worker.media.parts import paths_of
from worker.request import inputs as jobs
from worker.request import sse


def job(job_input: Any) -> None:
    """Parse a job's input: a call that can be sent, or one of the worker's own errors with something to say."""
    form = jobs.stream_form(job_input)
    if form not in (None, "sse", "objects"):
        raise AssertionError(f"a stream in the form {form!r}")
    for control_routes in (False, True):
        try:
            call = jobs.parse(job_input, control_routes)
        except JobError as error:
            told = error.error()
            if not told["message"] or not 400 <= told["code"] < 500:
                raise AssertionError(f"an error that says nothing: {told}") from error
            continue
        if not call.path.startswith("/") or call.method not in ("GET", "POST"):
            raise AssertionError(f"a call that cannot be sent: {call}")
        paths_of(json.dumps(call.body).encode(), "image")


def job_text(data: bytes) -> None:
    """Parse a job as it arrives, if it is JSON."""
    try:
        job_input = json.loads(data)
    except (ValueError, RecursionError):
        return
    job(job_input)


def stream(data: bytes, size: int) -> None:
    """Split a stream that arrives in pieces of so many bytes: nothing is lost, and no event is cut."""
    splitter = sse.EventSplitter()
    events = [event for start in range(0, len(data), size) for event in splitter.feed(data[start : start + size])]
    if b"".join([*events, *splitter.flush()]) != data:
        raise AssertionError("bytes were lost")
    batches = list(sse.batches(events, 1000))
    if [event for batch in batches for event in batch] != events:
        raise AssertionError("events were lost")
    if any(len(batch) > 1 and sum(map(sse.posted_size, batch)) > 1000 for batch in batches):
        raise AssertionError("a batch is too large")
    status = sse.status_of(events)
    if status is not None and not isinstance(status, int):
        raise AssertionError(f"a status that is none: {status!r}")
    text = data.decode(errors="replace")
    if "".join(sse.pieces(text, 600)) != text:
        raise AssertionError("text was lost")
