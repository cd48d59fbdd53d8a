"""The lines of a batch's input, in OpenAI's format. Pure: no I/O.

A line is `{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}`. Other fields are ignored.
"""

import json
from dataclasses import dataclass
from typing import Literal

import msgspec

from worker.errors import InvalidRequestError, Json
from worker.request.routes import ROUTES, method_of
from worker.request.shape import check_shape

Code = Literal[
    "line_too_long",
    "invalid_json_line",
    "missing_required_parameter",
    "duplicate_custom_id",
    "invalid_custom_id",
    "invalid_method",
    "invalid_url",
    "invalid_request",
    "engine_died",
]
"""The codes of lines that are not asked. Not OpenAI's own: `line_too_long`, `invalid_custom_id`, and the last two."""

NOT_OBJECTS: tuple[Code, ...] = ("line_too_long", "invalid_json_line")
"""The codes of lines that are not even JSON objects."""

LONGEST_ID = 512
"""The most characters of a `custom_id`. Each one is kept for a while, and searched in results."""

_POST_ROUTES = ", ".join(route for route, method in ROUTES.items() if method == "POST")
_NAMES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}


@dataclass(frozen=True, slots=True)
class Line:
    """A POST request. `number` is that of its line in the input; the first line is 1. `body` is JSON."""

    number: int
    custom_id: str
    path: str
    query: str
    body: bytes


class _WithBody(msgspec.Struct):
    """A line of which only the body is kept, as it stands there."""

    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class LineError:
    """A line that cannot be asked. `custom_id` is None if the line has none, or has that of an earlier line."""

    number: int
    custom_id: str | None
    code: Code
    message: str


class _LineMistakeError(Exception):
    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


def parse(number: int, text: bytes, limit: int) -> Line | LineError:
    """Return the request in a line of at most `limit` bytes, or what is wrong with the line."""
    custom_id = None
    try:
        value = _object(text, limit)
        custom_id = _custom_id(value)
        return Line(number, custom_id, *_target(value), _body(value, text))
    except _LineMistakeError as mistake:
        return LineError(number, custom_id, mistake.code, str(mistake))


def duplicate(line: Line | LineError) -> LineError:
    """Return the error of a line whose `custom_id` an earlier line has.

    Its own `custom_id` is None, so that the output has each one once.
    """
    message = f"An earlier line has the same 'custom_id', {_shortened(line.custom_id or '')}. Give each line its own."
    return LineError(line.number, None, "duplicate_custom_id", message)


def _object(text: bytes, limit: int) -> Json:
    if len(text) > limit:
        raise _LineMistakeError("line_too_long", f"The line has more than {limit} bytes. Send links or smaller media.")
    try:
        decoded = text.decode()
        check_shape(text)
        value = json.loads(decoded)
    except UnicodeDecodeError:
        raise _LineMistakeError("invalid_json_line", "The line is not UTF-8.") from None
    except InvalidRequestError as error:
        raise _LineMistakeError("invalid_json_line", str(error)) from None
    except ValueError as error:
        # The messages of other errors could quote the line.
        reason = f": {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise _LineMistakeError("invalid_json_line", f"The line is not valid JSON{reason}.") from None
    if not isinstance(value, dict):
        raise _LineMistakeError("invalid_json_line", f"The line must be a JSON object, not {_NAMES[type(value)]}.")
    return value


def _custom_id(value: Json) -> str:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _LineMistakeError("missing_required_parameter", "'custom_id' must be a string that is not empty.")
    if len(custom_id) > LONGEST_ID:
        message = f"'custom_id' has {len(custom_id)} characters. At most {LONGEST_ID} are possible."
        raise _LineMistakeError("invalid_custom_id", message)
    return custom_id


def _target(value: Json) -> tuple[str, str]:
    """Return the path and the query."""
    if value.get("method", "POST") != "POST":
        raise _LineMistakeError("invalid_method", "'method' must be 'POST'.")
    url = value.get("url")
    if not isinstance(url, str):
        raise _LineMistakeError("missing_required_parameter", "'url' must be a string, such as '/v1/chat/completions'.")
    if not url.isascii():
        raise _LineMistakeError("invalid_url", "'url' must have ASCII characters only.")
    path, _, query = f"/{url.lstrip('/')}".partition("?")
    if method_of(path) != "POST":
        raise _LineMistakeError(
            "invalid_url", f"No route {_shortened(path)} for a batch. Available routes: {_POST_ROUTES}."
        )
    return path, query


def _body(value: Json, text: bytes) -> bytes:
    """Return the body as JSON."""
    body = value.get("body")
    if not isinstance(body, dict):
        raise _LineMistakeError("missing_required_parameter", "'body' must be an object: the body of the request.")
    for field in ("stream", "background"):
        if body.get(field) not in (None, False):
            raise _LineMistakeError(
                "invalid_request", f"'body.{field}' must be false or missing. A batch has whole answers."
            )
    try:
        # To encode a photograph again takes longer than all the rest.
        return bytes(msgspec.json.decode(text, type=_WithBody).body)
    except ValueError:
        # It does not accept NaN, for example.
        return json.dumps(body).encode()


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:99]}…")
