"""The routes that workers call."""

from .jobs import Json
from .platform import Platform
from .records import Ping, Take
from .wire import TOO_LARGE, HttpError, PlainReply, Reply, Request, json_reply

ACCEPTED = PlainReply(200, b"{}")


async def take_one(platform: Platform, request: Request) -> Reply:
    return await _take(platform, request, batch=False)


async def take_batch(platform: Platform, request: Request) -> Reply:
    return await _take(platform, request, batch=True)


async def _take(platform: Platform, request: Request, *, batch: bool) -> Reply:
    query = request.query
    take = Take(
        worker=request.path,
        batch_size=int(query.get("batch_size", "1")) if batch else 1,
        job_in_progress=query.get("job_in_progress") == "1",
        at=platform.now(),
    )
    jobs = await request.unless_disconnected(platform.take(take, duplicate=request.fault.duplicate))
    if not jobs:
        return PlainReply(platform.behaviour.no_job_status)
    payloads = [job.for_worker(drop_empty_input=platform.behaviour.drop_empty_input) for job in jobs]
    return json_reply(payloads if batch else payloads[0])


async def stop(platform: Platform, request: Request) -> Reply:
    job_ids = await request.unless_disconnected(platform.stop_signals(request.path))
    return json_reply({"jobsToStop": job_ids}) if job_ids else PlainReply(204)


async def stream(platform: Platform, request: Request) -> Reply:
    chunk = await _posted(platform, request, platform.behaviour.stream_post_limit)
    platform.post_chunk(_job_id(request), chunk.get("output"))
    return ACCEPTED


async def done(platform: Platform, request: Request) -> Reply:
    behaviour = platform.behaviour
    result = await _posted(platform, request, behaviour.done_post_limit, behaviour.done_refusal_status)
    platform.post_result(_job_id(request), result)
    return ACCEPTED


async def _posted(
    platform: Platform, request: Request, limit: int | None, refusal_status: int = TOO_LARGE
) -> dict[str, Json]:
    """The body of a post. A body over the limit is recorded, and refused with `refusal_status`."""
    try:
        return await request.json(limit)
    except HttpError as error:
        if error.status != TOO_LARGE:
            raise
        platform.records.oversized_posts.append(_job_id(request))
        raise HttpError(refusal_status, error.reason) from error


async def ping(platform: Platform, request: Request) -> Reply:
    query = request.query
    job_ids = tuple(filter(None, query.get("job_id", "").split(",")))
    url_bytes = len(request.scope["raw_path"]) + len(b"?") + len(request.scope["query_string"])
    platform.ping(Ping(request.path, job_ids, query.get("runpod_version", ""), platform.now(), url_bytes))
    return ACCEPTED


def _job_id(request: Request) -> str:
    return request.path.rpartition("/")[2]
