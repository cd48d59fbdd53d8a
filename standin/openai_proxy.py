"""The `/openai` proxy: an HTTP request becomes a job, and the job's output becomes the HTTP response.

A worker has no say in the status: what it yields is a 200, and a job that failed is a 500 without detail.
"""

import json
from collections.abc import AsyncIterator
from functools import partial

from .behaviour import Behaviour
from .jobs import Job, Json, Status
from .platform import Platform
from .wire import EventStream, Plain, Reply, Request, json_reply


async def openai(platform: Platform, request: Request) -> Reply:
    job_input = await _job_input(platform.behaviour, request)
    job = platform.submit({"input": job_input})
    if platform.behaviour.proxy_cancels:
        request.when_gone(partial(_client_left, platform, job))
    body = job_input.get("openai_input")
    streaming = isinstance(body, dict) and body.get("stream") is True
    await job.changed.until(lambda: job.ended or (streaming and bool(job.chunks)))
    if streaming and (job.chunks or job.status is Status.COMPLETED):
        return EventStream(_relayed(job))
    if job.status is not Status.COMPLETED:
        return Plain(platform.behaviour.proxy_failed_status)
    return _whole(job.output)


async def _job_input(behaviour: Behaviour, request: Request) -> dict[str, Json]:
    job_input: dict[str, Json] = {"openai_route": f"/{request.path}"}
    body = await request.json_if_any(limit=behaviour.runsync_limit)
    if body is not None:
        job_input["openai_input"] = body
    elif behaviour.get_input != "absent":
        job_input["openai_input"] = None if behaviour.get_input == "null" else {}
    return job_input


def _client_left(platform: Platform, job: Job) -> None:
    """Cancel the job, unless all has been told and the worker has merely yet to post the end."""
    if not job.chunks or not _text(job.chunks[-1]).endswith("data: [DONE]\n\n"):
        platform.cancel(job)


async def _relayed(job: Job) -> AsyncIterator[bytes]:
    async for chunk in job.follow():
        yield _text(chunk).encode()


def _text(chunk: Json) -> str:
    return chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)


def _whole(output: Json) -> Plain:
    """The response to a request that does not stream; a generator's output is the list of what it yielded."""
    if isinstance(output, list) and len(output) == 1:
        output = output[0]
    if isinstance(output, str):
        return Plain(200, output.encode(), b"text/plain; charset=utf-8")
    return json_reply(output)
