"""A worker without an engine: its handler does what the job's input says. Run as a script, under the real SDK."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import runpod  # type: ignore[import-untyped, unused-ignore]

CONCURRENCY = 4


class EchoHandler:
    """Remembers the jobs that were stopped under it, so that a later job can ask for them."""

    def __init__(self) -> None:
        self.stopped: list[str] = []
        self.died = asyncio.Event()
        self.ended = asyncio.Event()
        self.reason = ""

    def end(self, error: Exception) -> None:
        """End the jobs that hang."""
        self.reason = str(error)
        self.ended.set()

    async def handle(self, job: dict[str, Any]) -> AsyncIterator[Any]:
        """`count`: yields so many strings; `error`, `raise`: fails; `hang`: until stopped; `stopped`: tells which."""
        match job.get("input"):
            case {"openai_route": str(route), **rest}:
                for part in _openai(route, rest.get("openai_input", "absent")):
                    yield part
            case {"count": int(count)}:
                for number in range(count):
                    yield f"part {number}"
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
                    await self.ended.wait()
                    yield {"error": self.reason}
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
    runner = asyncio.Runner()
    if loop == "event":
        from worker.queue import loop as queue

        surroundings = queue.Surroundings(
            died=handler.died.wait,
            is_dead=handler.died.is_set,
            end=handler.end,
            draining=lambda: None,
            posted=lambda: None,
            grace=float(os.environ.get("DRAIN_SECONDS", "5")),
            leaves_jobs=os.environ.get("ON_ENGINE_DEATH") == "retry",
        )
        queue.install(runner, surroundings)

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
