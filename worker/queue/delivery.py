"""Posts a job's yields and its result to the platform, in order, and again while the platform does not answer.

If the connection breaks before the response arrives, the platform may get the same post twice.

The SDK's own posting gives up after three 5xx responses, and at once after a 429 or a refused connection. It also sends
the job's id in a header that all jobs of the worker share.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from worker.backoff import Backoff
from worker.errors import ResultRefusedError

HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""The SDK's headers. The body is JSON in spite of them."""

YIELD_BYTES = 1_000_000
RESULT_BYTES = 20_000_000
"""The platform's limits."""
TOO_LARGE = 413

ATTEMPT_SECONDS = 60.0
ANSWER_SECONDS = 5.0
DEADLINE_SECONDS = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The platform's two routes for results. `$ID` in their URLs is the job's id."""

    session: aiohttp.ClientSession
    stream_url: str
    done_url: str
    posted: Callable[[], None]
    """Called for every part of a stream that is posted."""

    async def stream(self, job_id: str, output: Any) -> None:
        """Post one yield."""
        body = _encoded({"output": output})
        if len(body) > YIELD_BYTES:
            log.info("Job %s: a part of %.1f MB is sent with the result, not in the stream", job_id, len(body) / 1e6)
        elif 0 < await self._post(f"{self.stream_url.replace('$ID', job_id)}&isStream=false", job_id, body) < 400:
            self.posted()

    async def done(self, job_id: str, result: dict[str, Any]) -> None:
        """Post a job's result: `{"output": [every yield]}` or `{"error": text}`; an error if the result is refused."""
        url, body = f"{self.done_url.replace('$ID', job_id)}&isStream=true", _encoded(result)
        status = TOO_LARGE if len(body) > RESULT_BYTES else await self._post(url, job_id, body)
        if status >= 400:
            error = ResultRefusedError(len(body), status)
            log.warning("Job %s fails: %s", job_id, error)
            await self._post(url, job_id, _encoded({"error": json.dumps(error.error())}))

    async def _post(self, url: str, job_id: str, body: bytes) -> int:
        """Post until the platform accepts or refuses it, and return the status; 0 if the deadline passes before."""
        clock, backoff = asyncio.get_running_loop().time, Backoff(first=0.2, most=10.0)
        headers = {**HEADERS, "X-Request-ID": job_id}
        left, asked = DEADLINE_SECONDS, clock()
        while isinstance(answer := await self._attempt(url, headers, body), str):
            log.warning("Job %s: the platform did not accept a result (%s); trying again", job_id, answer)
            await asyncio.sleep(backoff.next())
            # Time in which the worker was frozen does not count.
            left -= min(clock() - asked, ATTEMPT_SECONDS)
            if left <= 0:
                log.error("Job %s: a result could not be delivered within %.0f s", job_id, DEADLINE_SECONDS)
                return 0
            asked = clock()
        if answer >= 400:
            log.error("Job %s: the platform refused a result with HTTP %d", job_id, answer)
        return answer

    async def _attempt(self, url: str, headers: dict[str, str], body: bytes) -> int | str:
        """Post once; return the status, or a text that describes a failure for which a retry may help."""
        timeout, status = aiohttp.ClientTimeout(total=ATTEMPT_SECONDS), 0
        try:
            async with self.session.post(url, data=body, headers=headers, timeout=timeout) as answer:
                status = answer.status
                # A connection can be used again once the answer is read to its end.
                async with asyncio.timeout(ANSWER_SECONDS):
                    await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            # A connection that breaks after the status must not cause another post.
            if not status:
                return type(error).__name__
        return f"HTTP {status}" if status == 429 or status >= 500 else status


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
