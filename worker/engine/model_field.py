"""Reads the field `model` of a request's body as vLLM does."""

import json
from contextlib import suppress
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from worker.request.asgi import Message, header
from worker.request.rewrite import is_json


async def model_of(scope: Message, body: bytes) -> Any:
    """Return `model` in a JSON object or a form, whatever its type; None if there is none."""
    if is_json(scope):
        with suppress(ValueError, RecursionError):
            return _in_json(body)
    elif header(scope, b"content-type").lower().startswith(b"multipart/form-data"):
        with suppress(MultiPartException):
            form = await _FormWithoutFiles(Headers(scope=scope), _only(body)).parse()
            await form.close()
            # Of several fields, vLLM uses the last one, too.
            return form.get("model")
    return None


class _Body(msgspec.Struct):
    """The only field that is read of a JSON body."""

    model: Any = None


def _in_json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body, type=_Body).model
    except ValueError:
        # Python's parser, which vLLM uses, also accepts NaN, a byte order mark and half of a surrogate pair.
        value = json.loads(body)
    return value.get("model") if isinstance(value, dict) else None


class _FormWithoutFiles(MultiPartParser):
    """Starlette's parser of forms, but the content of files is dropped."""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            super().on_part_data(data, start, end)


async def _only(body: bytes) -> Any:
    """Yield the whole body."""
    yield body
