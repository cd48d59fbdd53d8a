"""A script: a queue worker with the real SDK, whose engine is an app that streams an event every 20 ms without end.

All other parts are the real ones. The input `{"die": true}` kills the engine after half a second.
"""

import asyncio
import os
from typing import Any

from worker.lifecycle import Lifecycle
from worker.queue import sdk
from worker.queue.handler import JobHandler
from worker.queue.loop import Context
from worker.queue.places import Places
from worker.request import sse
from worker.request.asgi import Receive, Send
from worker.request.pipeline import Pipeline
from worker.settings import read
from worker.telemetry.jobs import Telemetry


def main() -> None:
    """Answer jobs until the worker is stopped or its engine dies."""
    lifecycle, settings, dead = Lifecycle(), read(os.environ), asyncio.Event()
    telemetry = Telemetry(settings.model_name)
    pipeline = Pipeline(settings, lifecycle, telemetry)

    async def engine(_scope: Any, receive: Receive, send: Send) -> None:
        if b'"die"' in (await receive())["body"]:
            asyncio.get_running_loop().call_later(0.5, dead.set)
        disconnect = asyncio.ensure_future(receive())
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        number = 0
        while not disconnect.done():
            await send({"type": "http.response.body", "body": sse.event({"n": number}), "more_body": True})
            await asyncio.sleep(0.02)
            number += 1

    async def died() -> None:
        await dead.wait()

    lifecycle.ready(dead.is_set)
    handler = JobHandler(engine, pipeline, settings)
    places = Places(4, 4, room=pipeline.memory.room)
    context = Context(lifecycle, settings, died, places, telemetry.stream_posts.inc)
    sdk.serve_queue(handler.handle, context, asyncio.Runner())


if __name__ == "__main__":
    main()
