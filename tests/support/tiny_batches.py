"""Batches for the embedded model: their lines, the right answers, the command, and the state of a worker with one."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import psutil

from tests.support.batches import custom_ids, jsonl
from tests.support.media import COLOURS, image_url
from worker.errors import Json

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GREETING = "Hello! How can I help you?"
LONG = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
"""The body of a completion that takes several seconds."""
WAIT_SECONDS = 180
IDLE_SECONDS = 0.1


def line(custom_id: str, body: Any, url: str = CHAT) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(text: str, *urls: str) -> Json:
    """Return the body of a chat about the images behind these URLs."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 40}


def pictures(count: int) -> list[Json]:
    """Return lines of which every second one is about an image."""
    bodies = [chat("What is this?", image_url(COLOURS[n % 10])) if n % 2 else chat("Hello") for n in range(count)]
    return [line(f"id-{number}", body) for number, body in enumerate(bodies)]


def check_pictures(path: Path, count: int) -> None:
    """Check that the output of `pictures` has each line once, in order, with the right answer."""
    assert custom_ids(path) == [f"id-{number}" for number in range(count)]
    for number, result in enumerate(map(json.loads, path.read_text().splitlines())):
        assert text_of(result) == (f"The image is {COLOURS[number % 10]}." if number % 2 else GREETING)


def text_of(result: Any) -> str:
    """Return the text of a chat's result."""
    text: str = result["response"]["body"]["choices"][0]["message"]["content"]
    return text


def command(source: Path, target: Path) -> list[str]:
    """Return the command that answers a file on one's own machine."""
    return [sys.executable, "handler.py", "--batch", str(source), "--out", str(target)]


# ---- A batch that runs


def journals(folder: Path) -> bytes:
    """Return the results of batches that have not ended, up to the last complete line.

    The folder is that of the output, or a `BATCH_FOLDER`.
    """
    content = b""
    for path in (*folder.glob("*.part"), *folder.glob("*/files/*.part")):
        # The batch may end meanwhile.
        with suppress(FileNotFoundError):
            content += path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def results(folder: Path) -> int:
    """Return how many lines of a batch have ended that has not."""
    return journals(folder).count(b"\n")


def wait_for_results(folder: Path, count: int) -> None:
    """Wait until so many lines of a batch have ended."""
    deadline = time.monotonic() + WAIT_SECONDS
    while results(folder) < count:
        assert time.monotonic() < deadline, f"fewer than {count} lines have ended in {WAIT_SECONDS} s"
        time.sleep(0.005)


def seconds_until_idle(began: float, url: str, engine: psutil.Process) -> float:
    """Return how long after `began` the worker at `url` has no request, and its engine uses almost no CPU time."""
    while True:
        has_requests = httpx.get(f"{url}/health").json()["jobs"] > 0
        seconds, used = time.monotonic() - began, _cpu_seconds(engine)
        assert seconds < WAIT_SECONDS
        time.sleep(IDLE_SECONDS)
        if not has_requests and _cpu_seconds(engine) - used < IDLE_SECONDS / 4:
            return seconds


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


# ---- OpenAI's client


def create_batch(api: openai.OpenAI, items: Iterable[object]) -> str:
    """Upload lines, create a batch, and return its id."""
    file = api.files.create(file=("requests.jsonl", jsonl(items)), purpose="batch")
    return api.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def ended_batch(api: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    """Wait for the end of a batch, and return it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (batch := api.batches.retrieve(batch_id)).status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch
