"""A worker without an engine. The job's input selects what the handler does. Run as a script, with the real SDK."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from typing import Any

import runpod  # type: ignore[import-untyped, unused-ignore]

CONCURRENCY = 4


class EchoHandler:
    """The handler. It records the ids of stopped jobs, so that a later job can ask for them."""

    def __init__(self) -> None:
        self.stopped: list[str] = []
        self.died = asyncio.Event()
        self.over = asyncio.Event()
        """Set when jobs with `hang` have to end, with `error()`."""
        self.error: Callable[[], object] = str

    async def handle(self, job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Do what the key of the input selects. `hang` runs until the job is stopped; `die` reports a dead engine."""
        match job.get("input"):
            case {"openai_route": str(route), **rest}:
                for part in _openai(route, rest.get("openai_input", "absent")):
                    yield part
            case {"count": int(count)}:
                for number in range(count):
                    yield f"part {number}"
                    await asyncio.sleep(job["input"].get("pause", 0))
            case {"size": int(size)}:
                yield "x" * size
            case {"sleep": float(seconds)}:
                await asyncio.sleep(seconds)
                yield "slept"
            case {"error": str(message)}:
                yield {"error": message}
            case {"raise": str(message)}:
                raise ValueError(message)
            case {"hang": True, **rest}:
                try:
                    if not rest.get("silent"):
                        yield "hanging"
                    await self.over.wait()
                    yield {"error": str(self.error())}
                except (asyncio.CancelledError, GeneratorExit):
                    self.stopped.append(job["id"])
                    raise
            case {"die": True}:
                yield "dying"
                self.died.set()
                yield {"error": "dead"}
            case {"stopped": True}:
                yield self.stopped
            case other:
                yield {"input": other}


def _openai(route: str, body: Any) -> list[Any]:
    if route == "/v1/metrics":
        return ["requests_total 1\n"]
    if isinstance(body, dict) and "fail" in body:
        return [{"error": body["fail"]}]
    if isinstance(body, dict) and body.get("stream"):
        return ['data: {"n": 1}\n\n', 'data: {"n": 2}\n\ndata: [DONE]\n\n']
    return [{"route": route, "body": body}]


def main(loop: str) -> None:
    """Run under the SDK's own job loop ("sdk") or under the worker's ("event")."""
    handler = EchoHandler()
    if loop == "event":
        from worker.lifecycle import Lifecycle
        from worker.queue import sdk
        from worker.queue.loop import Context
        from worker.queue.places import Places
        from worker.settings import read

        lifecycle, settings = Lifecycle(), read({"DRAIN_SECONDS": "5", **os.environ})
        lifecycle.ready(handler.died.is_set)
        handler.over, handler.error = lifecycle.over, lifecycle.error
        context = Context(lifecycle, settings, handler.died.wait, Places(CONCURRENCY, CONCURRENCY), lambda: None)
        sdk.serve_queue(handler.handle, context, asyncio.Runner())
        return

    # The SDK looks for a generator function, which a bound method of one is.
    runpod.serverless.start(
        {
            "handler": handler.handle,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _current: CONCURRENCY,
        }
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["sdk"])
