"""Starts the RunPod SDK's worker. Importing the SDK takes a second, so import this module only when it is needed.

The SDK provides the URLs, the authorization, the ping process and its list of running jobs. Its job loop is replaced.
tests/project/test_drift.py checks what this module relies on.
"""

import asyncio
import bisect
import itertools
import signal
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import aiohttp
import requests
import runpod
from runpod.http_client import get_auth_header
from runpod.serverless.modules import rp_fastapi, rp_http, rp_job, rp_logger, rp_ping, rp_scale, worker_state

from worker import processes
from worker.queue.development_api import DevelopmentAPI
from worker.queue.handler import Handler
from worker.queue.loop import Context, JobLoop
from worker.queue.platform import Platform, Urls
from worker.queue.transport import Connections, HttpTransport
from worker.telemetry import logs

PING_SECONDS = 5.0
"""How long a ping waits for its answer. The SDK's own 20 s are long for one that was sent when a freeze began."""
PINGED_BYTES = 7000
"""The most bytes of job ids in the URL of a ping. Several proxies accept 8 KB of URL."""


def serve_queue(handler: Handler, context: Context, runner: asyncio.Runner) -> None:
    """Answer jobs from RunPod's queue in the runner's loop, until the worker is stopped or cannot go on."""
    before_serving = ExitStack()

    def serve() -> None:
        before_serving.close()
        runner.run(_serve(handler, context))

    rp_scale.JobScaler = lambda _config: SimpleNamespace(start=serve)
    worker_state.PingJobMirror = PingedJobs
    rp_ping.SyncClientSession = PingSession
    with before_serving:
        # The SDK forks the ping process first. RunPod must not get pings of a worker that was killed.
        before_serving.enter_context(processes.children_end_with_this())
        start(handler, context.places.most)


async def _serve(handler: Handler, context: Context) -> None:
    stopping, resumes = context.lifecycle.stopping, context.lifecycle.resumes
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    connections = Connections()
    resumes.listen(connections.close_idle)
    async with aiohttp.ClientSession(connector=connections, headers=get_auth_header()) as session:
        transport = HttpTransport(session, resumes)
        platform = Platform(transport, _urls(), stopping, context.settings.delivery_timeout, resumes)
        with resumes.watched():
            await JobLoop(handler, platform, worker_state.JobsProgress(), context).run()


def _urls() -> Urls:
    take = rp_job.JOB_GET_URL
    return Urls(
        take=take,
        take_batch=take.replace("/job-take/", "/job-take-batch/"),
        stop=rp_job._job_stop_url(),
        stream=rp_http.JOB_STREAM_URL,
        done=rp_http.JOB_DONE_URL,
    )


class PingedJobs(worker_state.PingJobMirror):  # type: ignore[misc]
    """The ids of running jobs, for the ping process: each time as many as fit into a URL, the others the next times.

    RunPod has been seen to give a job to another worker when it was in no ping for about 40 s.
    """

    _last = ""

    def get(self) -> str | None:
        """Return ids, separated by commas. The ping process calls this once for each ping."""
        ids = sorted(filter(None, (super().get() or "").split(",")))
        start = bisect.bisect(ids, self._last)
        ids = [*ids[start:], *ids[:start]]
        # A comma takes three bytes in a URL.
        sizes = itertools.accumulate(len(job_id) + 3 for job_id in ids)
        chosen = [job_id for job_id, size in zip(ids, sizes, strict=True) if size <= PINGED_BYTES]
        self._last = chosen[-1] if chosen else ""
        return ",".join(chosen) or None


class PingSession(requests.Session):
    """Pings over a new connection each time, because one that died in a freeze gives no answer and no error."""

    def get(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a ping, and close its connection. The SDK sends it again after a failure."""
        try:
            return super().get(*args, **{**kwargs, "timeout": PING_SECONDS})
        finally:
            # The session can still be used.
            self.close()


def serve_development_api(handler: Handler) -> None:
    """Run the SDK's test server on the port that the SDK's own command line options choose."""
    rp_fastapi.WorkerAPI = DevelopmentAPI
    start(handler, 1)


def start(handler: Handler, concurrency: int) -> None:
    """Run the SDK's worker as it is, or as it was changed before, until it ends."""
    rp_logger.RunPodLogger.log = logs.log_for_sdk
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            # A value that changes would make the SDK wait until no job runs.
            "concurrency_modifier": lambda _current: concurrency,
        }
    )
