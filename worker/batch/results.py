"""The lines of a batch's output, exactly OpenAI's. Pure: no I/O.

Each is compact JSON that begins with `id`, so that a file of them tells which lines ended without being parsed.
"""

import json
import re
from dataclasses import dataclass

from worker.batch.lines import Line, LineError
from worker.errors import Json

ID = re.compile(rb'\{"id":"batch_req_([A-Za-z0-9_-]+)_(\d{1,9})"')
"""The beginning of a result: the key of its batch, and the number of its line."""

_HEAD = re.compile(ID.pattern + rb',"custom_id":(null|"(?:[^"\\]|\\.)*"),"response":(?:null|\{"status_code":(\d+)),')
_ENDS = (b',"error":null}\n', b'"}}\n')
"""The ends of a result. A line that was cut, because its worker was killed, has another one."""
_USAGE = b'"usage":{'
_TOKENS_IN = re.compile(rb'"(?:prompt|input)_tokens":(\d+)')
_TOKENS_OUT = re.compile(rb'"(?:completion|output)_tokens":(\d+)')
_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


@dataclass(frozen=True, slots=True)
class Summary:
    """What a journal needs of a result."""

    number: int
    custom_id: str | None
    is_ok: bool
    tokens_in: int
    tokens_out: int


def result_id(key: str, number: int) -> str:
    """Return the id of a line's result, which is the id of its request too."""
    return f"batch_req_{key}_{number}"


def prefix(key: str) -> bytes:
    """Return the bytes with which every result of a batch begins."""
    return f'{{"id":"batch_req_{key}_'.encode()


def answered(key: str, line: Line, status: int, body: Json | None) -> bytes:
    """Return the result of a line that was asked, with its newline. The answer may be an error."""
    response = {"status_code": status, "request_id": result_id(key, line.number), "body": body}
    return _result(key, line.number, line.custom_id, response, None)


def refused(key: str, error: LineError) -> bytes:
    """Return the result of a line that cannot be asked, with its newline."""
    return _result(key, error.number, error.custom_id, None, {"code": error.code, "message": error.message})


def _result(key: str, number: int, custom_id: str | None, response: Json | None, error: Json | None) -> bytes:
    result = {"id": result_id(key, number), "custom_id": custom_id, "response": response, "error": error}
    # Many programs split text at Unicode's line breaks too. JSON has them only within strings.
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":")).translate(_LINE_BREAKS)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        # A lone surrogate, which JSON can escape but UTF-8 cannot encode.
        return f"{json.dumps(result, separators=(',', ':'))}\n".encode()


def summary(key: str, line: bytes) -> Summary | None:
    """Return the summary of a whole result line; None if it is no result of the batch with this key."""
    head = _HEAD.match(line)
    if head is None or head[1] != key.encode() or not line.endswith(_ENDS):
        return None
    usage = line.rfind(_USAGE)
    tokens_in, tokens_out = (_number(pattern, line, usage) for pattern in (_TOKENS_IN, _TOKENS_OUT))
    return Summary(int(head[2]), json.loads(head[3]), (head[4] or b"")[:1] == b"2", tokens_in, tokens_out)


def _number(pattern: re.Pattern[bytes], line: bytes, start: int) -> int:
    """Return the first number behind `start`; 0 without one. A body's own texts cannot match: JSON escapes quotes."""
    found = pattern.search(line, start) if start >= 0 else None
    return int(found[1]) if found else 0
