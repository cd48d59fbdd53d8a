"""Posts what a job yields, and its end, to the platform: in order, tried again when the platform does not answer.

A result whose answer is lost with its connection is posted again, so the platform may see it twice.

The SDK's own posting gives up after three 5xx and at once after a 429 or a refused connection, and it tells the job's
id in a header that all jobs of the worker share.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from worker.backoff import Backoff
from worker.errors import ResultTooLargeError

HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""As the SDK sends them; the body is JSON all the same."""

YIELD_BYTES = 1_000_000
RESULT_BYTES = 20_000_000
"""What the platform takes at most."""
TOO_LARGE = 413

ATTEMPT_SECONDS = 60.0
DEADLINE_SECONDS = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The two places of the platform where a worker's results go; `$ID` in their URLs stands for the job's id."""

    session: aiohttp.ClientSession
    stream_url: str
    done_url: str
    posted: Callable[[], None]
    """Is told of every part of a stream that is posted."""

    async def stream(self, job_id: str, output: Any) -> None:
        """Post one yield."""
        body = _encoded({"output": output})
        if len(body) > YIELD_BYTES:
            log.info("Job %s: a yield of %.1f MB is told with the job's end only", job_id, len(body) / 1e6)
            return
        await self._post(f"{self.stream_url.replace('$ID', job_id)}&isStream=false", job_id, body)
        self.posted()

    async def done(self, job_id: str, result: dict[str, Any]) -> None:
        """Post a job's end: `{"output": [every yield]}` or `{"error": text}`; one that is too large, as an error."""
        url, body = f"{self.done_url.replace('$ID', job_id)}&isStream=true", _encoded(result)
        if len(body) > RESULT_BYTES or await self._post(url, job_id, body) == TOO_LARGE:
            log.warning("Job %s: a result of %.1f MB is more than the platform takes", job_id, len(body) / 1e6)
            await self._post(url, job_id, _encoded({"error": json.dumps(ResultTooLargeError(len(body)).error())}))

    async def _post(self, url: str, job_id: str, body: bytes) -> int | None:
        """Post until the platform takes it, refuses it for good, or the deadline has passed; return its refusal."""
        headers = {**HEADERS, "X-Request-ID": job_id}
        backoff = Backoff(first=0.2, most=10.0)
        left, asked = DEADLINE_SECONDS, time.monotonic()
        while isinstance(answer := await self._attempt(url, headers, body), str):
            log.warning("Job %s: the platform took no result (%s); trying again", job_id, answer)
            await asyncio.sleep(backoff.next())
            # A worker that was frozen meanwhile has not tried all the time.
            left -= min(time.monotonic() - asked, ATTEMPT_SECONDS)
            if left <= 0:
                log.error("Job %s: a result could not be delivered within %.0f s", job_id, DEADLINE_SECONDS)
                return None
            asked = time.monotonic()
        if answer < 400:
            return None
        log.error("Job %s: the platform refused a result with HTTP %d", job_id, answer)
        return answer

    async def _attempt(self, url: str, headers: dict[str, str], body: bytes) -> int | str:
        """Post once; return the status, or what went wrong if another try may mend it."""
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_SECONDS)
        try:
            async with self.session.post(url, data=body, headers=headers, timeout=timeout) as answer:
                # Once it is taken, a connection that breaks must not make it be posted again.
                status = answer.status
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__
        return f"HTTP {status}" if status == 429 or status >= 500 else status


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")
