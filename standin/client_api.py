"""The routes that an endpoint's clients call, except for the `/openai` proxy."""

from .jobs import Job, Status
from .platform import Platform
from .wire import HttpError, Reply, Request, json_reply


async def run(platform: Platform, request: Request) -> Reply:
    job = platform.submit(await request.json(limit=platform.behaviour.run_limit))
    # RunPod documents this status for every answer, even if a waiting worker already has the job.
    return json_reply({"id": job.id, "status": Status.IN_QUEUE})


async def runsync(platform: Platform, request: Request) -> Reply:
    """Answer with the result, or with the job's current status after `wait` milliseconds."""
    wait = request.query.get("wait")
    if wait is not None and not wait.isdigit():
        raise HttpError(400, f"wait={wait} is not a number of milliseconds.")
    job = platform.submit(await request.json(limit=platform.behaviour.runsync_limit), sync=True)
    seconds = platform.behaviour.sync_wait if wait is None else int(wait) / 1000
    await job.changed.within(seconds, lambda: job.ended)
    return json_reply(job.report() if job.ended else _summary(job))


async def status(platform: Platform, request: Request) -> Reply:
    return json_reply(platform.find(request.path).report())


async def stream(platform: Platform, request: Request) -> Reply:
    """Answer with the chunks that no earlier call has returned."""
    job = platform.find(request.path)
    if job.status is Status.IN_PROGRESS:
        await job.changed.within(platform.behaviour.stream_hold, lambda: job.has_unread or job.ended)
    return json_reply({"status": job.status, "stream": [{"output": chunk} for chunk in job.read_unread()]})


async def cancel(platform: Platform, request: Request) -> Reply:
    job = platform.find(request.path)
    platform.cancel(job)
    return json_reply(_summary(job))


async def retry(platform: Platform, request: Request) -> Reply:
    job = platform.find(request.path)
    platform.retry(job)
    return json_reply(_summary(job))


async def purge_queue(platform: Platform, _: Request) -> Reply:
    return json_reply({"removed": platform.purge(), "status": "completed"})


async def health(platform: Platform, _: Request) -> Reply:
    return json_reply(platform.health())


def _summary(job: Job) -> dict[str, str]:
    return {"id": job.id, "status": job.status}


async def records(platform: Platform, _: Request) -> Reply:
    """Numbers of posts and connections of the workers, for benchmarks in another process. RunPod has no such route."""
    records = platform.records
    return json_reply(
        {
            "stream_posts": records.stream_posts,
            "done_posts": records.done_posts,
            "post_connections": len(records.post_connections),
            "duplicate_dones": len(records.duplicate_dones),
            "late_streams": len(records.late_streams),
        }
    )
