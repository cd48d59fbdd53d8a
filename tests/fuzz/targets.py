"""Properties that hold for any input. A target raises AssertionError when one does not."""

import json
from time import process_time
from typing import Any

from tests.fuzz import media, texts
from worker.errors import JobError
from worker.media.formats import media_type
from worker.media.parts import Parts
from worker.request import shape, sse
from worker.request.inputs import JobInput

LINE_ENDS = b"\r\n"
CPU_SECONDS = 20.0
"""For one body of at most a few megabytes."""
MAX_TEXT = 40
"""Bytes of a host or a secret."""


def everything(data: bytes, decoding: media.Decoding) -> None:
    """Use some bytes as whatever they may be."""
    media.gates(data)
    choice = data[-1] if data else 0
    if media_type(data) is not None:
        decoding.image(data, media.LOOKS[choice % len(media.LOOKS)])
        decoding.sound(data, media.FORMS[choice % len(media.FORMS)])
        return
    job_text(data)
    stream(data, 1 + choice % 16)
    if len(data) < MAX_TEXT:
        text = data.decode(errors="replace")
        texts.address(int.from_bytes(data[:4], "big"))
        texts.host(text)
        texts.secret(text + texts.CORE)


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
    try:
        value = body(data)
    except (ValueError, RecursionError):
        return
    job(value)


def body(data: bytes) -> Any:
    """Check the shape of a body and parse it. It is accepted if it is within the limits, and only then.

    Return the parsed value. Raise what the parser raises.
    """
    start = process_time()
    accepted = is_accepted(data)
    if process_time() - start > CPU_SECONDS:
        raise AssertionError("checking the shape takes long")
    counts = Counts()
    try:
        value = json.loads(data, object_pairs_hook=counts.count_pairs)
    finally:
        if accepted and process_time() - start > CPU_SECONDS:
            raise AssertionError("parsing an accepted body takes long")
    counts.count(value)
    is_utf8 = json.detect_encoding(data).startswith("utf-8")
    # The parser reads halves of surrogate pairs that are written as UTF-8, which is not UTF-8.
    if is_utf8 and is_decodable(data) and accepted != counts.are_within_limits():
        raise AssertionError(f"the check of the shape says {accepted}, the parser has found {vars(counts)}")
    if accepted and not is_decodable(data):
        raise AssertionError("a body that is not UTF-8 is accepted")
    return Pairs.as_dictionaries(value)


class Pairs(list[tuple[str, Any]]):
    """An object of a JSON text, with keys that occur twice."""

    @classmethod
    def as_dictionaries(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return {key: cls.as_dictionaries(item) for key, item in value}
        return [cls.as_dictionaries(item) for item in value] if isinstance(value, list) else value


class Counts:
    """The structure of a parsed body."""

    def __init__(self) -> None:
        self.depth = self.containers = self.strings = self.commas = 0

    @staticmethod
    def count_pairs(pairs: list[tuple[str, Any]]) -> Pairs:
        return Pairs(pairs)

    def count(self, value: Any) -> None:
        """Count the parts of a value, level by level, because it may be nested deeply."""
        level = [value]
        while level:
            self.strings += sum(isinstance(item, str) for item in level)
            containers = [item for item in level if isinstance(item, list)]
            self.depth += bool(containers)
            self.containers += len(containers)
            self.commas += sum(len(item) - 1 for item in containers if item)
            self.strings += sum(len(item) for item in containers if isinstance(item, Pairs))
            level = [inner[1] if isinstance(item, Pairs) else inner for item in containers for inner in item]

    def are_within_limits(self) -> bool:
        return (
            self.depth <= shape.MAX_DEPTH
            and self.containers <= shape.MAX_CONTAINERS
            and self.strings <= shape.MAX_STRINGS
            and self.commas <= shape.MAX_COMMAS
        )


def is_decodable(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_accepted(data: bytes) -> bool:
    """Return whether the check of the shape accepts a body."""
    try:
        shape.check_shape(data)
    except JobError:
        return False
    return True


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
