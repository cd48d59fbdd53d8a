"""Batches for tests: inputs, journals, and an executor without threads for the virtual clock."""

import json
import resource
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.batch import lines, results
from worker.batch.lines import Line
from worker.errors import Json

LIMIT = 10_000
KEY = "job-1"


class InlineExecutor(Executor):
    """Runs each call at once, in the thread of the caller."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - as the executors of the standard library do
            future.set_exception(error)
        return future


def item(custom_id: object, prompt: str = "Hello", **fields: object) -> Json:
    """Return one line of an input as an object."""
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}


def jsonl(items: Iterable[object]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in items)


def line(number: int, custom_id: str | None = None) -> Line:
    parsed = lines.parse(number, json.dumps(item(custom_id or f"id-{number}")).encode(), LIMIT)
    assert isinstance(parsed, Line)
    return parsed


def answer(number: int, tokens: int = 5) -> Json:
    """Return the body of a chat's answer."""
    message = {"role": "assistant", "content": f'Answer {number}, "usage":{{"prompt_tokens":999}}'}
    usage = {"prompt_tokens": 7, "total_tokens": 7 + tokens, "completion_tokens": tokens}
    return {"id": "chatcmpl-1", "choices": [{"index": 0, "message": message}], "usage": usage}


def result(number: int, custom_id: str | None = None, status: int = 200, key: str = KEY) -> bytes:
    """Return one line of an output."""
    body = answer(number) if status == 200 else {"error": {"message": "wrong", "code": status}}
    return results.answered(key, line(number, custom_id), status, body)


def custom_ids(path: Path) -> list[str | None]:
    """Return the `custom_id`s of an output, in its order. Every line must be valid JSON."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(text)["custom_id"] for text in content.splitlines()]


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Limit the size of files, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
