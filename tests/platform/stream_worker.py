"""A script: a queue worker with the real SDK and a scripted engine. All other parts are the real ones."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from worker import race
from worker.batch.job import Shared
from worker.batch.share import Share, without_lines
from worker.lifecycle import Lifecycle
from worker.media.fetch import Policy
from worker.queue import sdk
from worker.queue.batch_jobs import BatchJobs
from worker.queue.handler import JobHandler
from worker.queue.loop import Context
from worker.queue.places import Places
from worker.queue.results import Results
from worker.request import sse
from worker.request.asgi import Receive, Send
from worker.request.links import LinkedInputs
from worker.request.pipeline import Pipeline
from worker.settings import read
from worker.telemetry.jobs import Telemetry
from worker.telemetry.usage import EngineLoad, EngineUsage, current_usage

CONCURRENCY = 4
"""The most jobs at once, unless MAX_CONCURRENCY is set."""
EVENT_SECONDS = 0.02
ENDLESS = 1_000_000
"""A number of events that takes longer than any test."""


class ScriptedEngine:
    """An app that generates an event every 20 ms without end. Keys of the request's body change this:

    - `stream`: send each event at once. Without it, the answer at the end is how many requests the engine has.
    - `events`: end after so many events.
    - `delay`: wait for so many seconds before the request runs.
    - `linger`: ignore a disconnect, and take so many seconds to end when the request is cancelled.
    - `binary`: the answer is binary data.
    - `zeros`: each event also has a list of so many zeros.
    - `size`: the answer is a text of so many characters.
    - `die`: the engine dies after half a second.
    """

    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.changed = asyncio.Event()
        """Set when the load has changed."""
        self._requests = Counter({"waiting": 0, "running": 0})

    def load(self) -> EngineLoad:
        """Return the load. The capacity has no limit."""
        return EngineLoad(requests=self._requests.total(), **self._requests)

    async def __call__(self, _scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = json.loads((await receive())["body"])
        if body.get("die"):
            asyncio.get_running_loop().call_later(0.5, self.dead.set)
        linger = body.get("linger", 0)
        answering = asyncio.ensure_future(self._answer(body, send))
        try:
            await (asyncio.wait([answering]) if linger else race.first(answering, receive()))
        finally:
            await race.end(answering)
            if answering.cancelled():
                await asyncio.sleep(linger)

    async def _answer(self, body: dict[str, Any], send: Send) -> None:
        with self._counted("waiting"):
            await asyncio.sleep(body.get("delay", 0))
        if usage := current_usage.get():
            usage.add(EngineUsage)
        with self._counted("running"):
            events = body.get("events", ENDLESS)
            if body.get("stream"):
                await _start(send, b"text/event-stream")
                more = {"zeros": [0] * body["zeros"]} if "zeros" in body else {}
                for number in range(events):
                    event = json.dumps({"n": number, **more}, separators=(",", ":"))
                    data = f"data: {event}\n\n".encode()
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await asyncio.sleep(EVENT_SECONDS)
                await send({"type": "http.response.body", "body": sse.DONE})
            elif body.get("binary"):
                await _start(send, b"application/octet-stream")
                await send({"type": "http.response.body", "body": b"\xff\x00"})
            elif size := body.get("size"):
                await _start(send, b"application/json")
                await send({"type": "http.response.body", "body": json.dumps({"text": "x" * size}).encode()})
            else:
                await asyncio.sleep(events * EVENT_SECONDS)
                await _start(send, b"application/json")
                await send({"type": "http.response.body", "body": json.dumps(self._requests).encode()})

    @contextmanager
    def _counted(self, state: str) -> Iterator[None]:
        self._requests[state] += 1
        self.changed.set()
        try:
            yield
        finally:
            self._requests[state] -= 1
            self.changed.set()


async def _start(send: Send, content_type: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})


def main() -> None:
    """Answer jobs until the worker is stopped or its engine dies."""
    lifecycle, settings, engine = Lifecycle(), read(os.environ), ScriptedEngine()
    telemetry = Telemetry(settings.model_name, resumes=lifecycle.resumes)
    pipeline = Pipeline(settings, lifecycle, telemetry)

    async def died() -> None:
        await engine.dead.wait()

    lifecycle.ready(engine.dead.is_set)
    policy = Policy.of(settings)
    most = settings.max_concurrency or CONCURRENCY
    share = Share(telemetry, pipeline.memory, engine.load, most=most)
    batches = BatchJobs(Shared(engine, pipeline, settings, policy, share))
    handler = JobHandler(engine, pipeline, settings, LinkedInputs(policy, settings), batches)

    def load() -> EngineLoad:
        return without_lines(engine.load(), telemetry.lines_in_engine)

    places = Places(most, settings.job_batch_size, load, pipeline.memory.room, engine.changed)
    context = Context(lifecycle, settings, died, places, telemetry.stream_posts.inc, Results(settings, policy).store)
    sdk.serve_queue(handler.handle, context, asyncio.Runner())


if __name__ == "__main__":
    main()
