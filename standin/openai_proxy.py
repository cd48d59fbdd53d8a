"""The `/openai` proxy: an HTTP request becomes a job, and the job's output becomes the HTTP response.

The worker cannot choose the HTTP status: output is sent with status 200, a failed job as status 500 without a body.
"""

import json
from collections.abc import AsyncIterator
from functools import partial

from .behaviour import Behaviour
from .jobs import Job, Json, Status
from .platform import Platform
from .wire import EventStream, PlainReply, Reply, Request, json_reply


async def openai(platform: Platform, request: Request) -> Reply:
    job_input = await _job_input(platform.behaviour, request)
    job = platform.submit({"input": job_input})
    if platform.behaviour.proxy_cancels:
        request.on_disconnect(partial(_cancel_unfinished, platform, job))
    body = job_input.get("openai_input")
    streaming = isinstance(body, dict) and body.get("stream") is True
    await job.changed.until(lambda: job.ended or (streaming and bool(job.chunks)))
    if streaming and (job.chunks or job.status is Status.COMPLETED):
        return EventStream(_stream(job))
    if job.status is not Status.COMPLETED:
        return PlainReply(platform.behaviour.proxy_failed_status)
    return _complete_reply(job.output)


async def _job_input(behaviour: Behaviour, request: Request) -> dict[str, Json]:
    job_input: dict[str, Json] = {"openai_route": f"/{request.path}"}
    body = await request.json_if_any(limit=behaviour.runsync_limit)
    if body is not None:
        job_input["openai_input"] = body
    elif behaviour.get_input != "absent":
        job_input["openai_input"] = None if behaviour.get_input == "null" else {}
    return job_input


def _cancel_unfinished(platform: Platform, job: Job) -> None:
    """Cancel the job of a client that has disconnected, unless the client already has the last event."""
    if not job.chunks or not _text(job.chunks[-1]).endswith("data: [DONE]\n\n"):
        platform.cancel(job)


async def _stream(job: Job) -> AsyncIterator[bytes]:
    async for chunk in job.follow():
        yield _text(chunk).encode()


def _text(chunk: Json) -> str:
    return chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)


def _complete_reply(output: Json) -> PlainReply:
    """The response to a request that does not stream. A generator handler's output is the list of its yields."""
    if isinstance(output, list) and len(output) == 1:
        output = output[0]
    if isinstance(output, str):
        return PlainReply(200, output.encode(), b"text/plain; charset=utf-8")
    return json_reply(output)
