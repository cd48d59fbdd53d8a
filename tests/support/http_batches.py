"""A worker with a scripted engine and a folder for batches, behind its HTTP server, and OpenAI's client for it."""

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from tests.http.serving import ServedWorker, serving, wait_until
from tests.support.batches import answer, item, jsonl
from worker.batch.job import Shared
from worker.batch.share import Share
from worker.media.fetch import Policy
from worker.request.asgi import App, Receive, Send
from worker.telemetry.usage import EngineLoad

LOAD = EngineLoad(capacity=8)


class Chats:
    """Answers chats. One whose text is "wrong" fails; one whose text is "wait" waits for `release`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        """The texts of all requests."""
        self.release = asyncio.Event()

    async def __call__(self, _scope: Any, receive: Receive, send: Send) -> None:
        text = json.loads((await receive())["body"])["messages"][0]["content"]
        self.texts.append(text)
        if text == "wait":
            waiting, leaving = asyncio.ensure_future(self.release.wait()), asyncio.ensure_future(receive())
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            for each in (waiting, leaving):
                each.cancel()
        status, body = (400, {"error": {"message": "wrong", "code": 400}}) if text == "wrong" else (200, answer(1))
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        )
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def serving_batches(folder: Path, engine: App, **settings: Any) -> Iterator[ServedWorker]:
    """Serve a worker that runs batches. At the end it stops as on SIGTERM."""
    with serving(engine, batch_folder=str(folder), **settings) as worker:
        assert worker.batches is not None
        worker.batches.store.prepare()
        share = Share(worker.telemetry, worker.memory, lambda: LOAD)
        shared = Shared(engine, worker.pipeline, worker.settings, Policy(), share)
        running = asyncio.run_coroutine_threadsafe(worker.batches.run(shared), worker.server._loop)
        yield worker
        worker.end_requests()
        running.result(timeout=10)


def client(worker: ServedWorker, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=key, max_retries=0, timeout=20)


def upload(api: openai.OpenAI, *texts: str) -> str:
    """Upload a file with a chat for each text, and return its id."""
    items = [item(f"id-{number}", text) for number, text in enumerate(texts)]
    return api.files.create(file=("requests.jsonl", jsonl(items)), purpose="batch").id


def create(api: openai.OpenAI, file_id: str, **fields: Any) -> str:
    """Create a batch and return its id."""
    return api.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", **fields
    ).id


def ended(api: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    """Wait for the end of a batch, and return it."""
    statuses = ("completed", "failed", "cancelled", "expired")
    wait_until(f"the batch {batch_id} has ended", lambda: api.batches.retrieve(batch_id).status in statuses)
    return api.batches.retrieve(batch_id)


def names_in(folder: Path) -> set[str]:
    """Return the names of all files in a folder."""
    return {name for _, _, names in os.walk(folder) for name in names}
