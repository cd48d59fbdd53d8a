"""The routes that clients of an endpoint call, except for the `/openai` proxy."""

from .jobs import Job, Status
from .platform import Platform
from .wire import RefusedError, Reply, Request, json_reply


async def run(platform: Platform, request: Request) -> Reply:
    job = platform.submit(await request.json(limit=platform.behaviour.run_limit))
    # Documented as the answer even where a waiting worker has the job already.
    return json_reply({"id": job.id, "status": Status.IN_QUEUE})


async def runsync(platform: Platform, request: Request) -> Reply:
    """Answers with the result, or with the state of the moment once `wait` (milliseconds) has passed."""
    wait = request.query.get("wait")
    if wait is not None and not wait.isdigit():
        raise RefusedError(400, f"wait={wait} is not a number of milliseconds")
    job = platform.submit(await request.json(limit=platform.behaviour.runsync_limit), sync=True)
    seconds = platform.behaviour.sync_wait if wait is None else int(wait) / 1000
    await job.changed.within(seconds, lambda: job.ended)
    return json_reply(job.report() if job.ended else _summary(job))


async def status(platform: Platform, request: Request) -> Reply:
    return json_reply(platform.find(request.path).report())


async def stream(platform: Platform, request: Request) -> Reply:
    """The chunks since the last call; reading removes them."""
    job = platform.find(request.path)
    if job.status is Status.IN_PROGRESS:
        await job.changed.within(platform.behaviour.stream_hold, lambda: job.has_undrained or job.ended)
    return json_reply({"status": job.status, "stream": [{"output": chunk} for chunk in job.drain()]})


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
    """Not RunPod's: how many results the worker has sent, for benchmarks in another process."""
    seen = platform.records
    return json_reply(
        {
            "stream_posts": seen.stream_posts,
            "done_posts": seen.done_posts,
            "duplicate_dones": len(seen.duplicate_dones),
            "late_streams": len(seen.late_streams),
        }
    )
