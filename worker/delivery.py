"""Posts what a job yields, and its end, to the platform: in order, tried again when the platform does not answer.

A result whose answer is lost with its connection is posted again, so the platform may see it twice.

The SDK's own posting gives up after three 5xx and at once after a 429 or a refused connection, and it tells the job's
id in a header that all jobs of the worker share.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from worker.backoff import Backoff

HEADERS = {"Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
"""As the SDK sends them; the body is JSON all the same."""

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
        await self._post(f"{self.stream_url.replace('$ID', job_id)}&isStream=false", job_id, {"output": output})
        self.posted()

    async def done(self, job_id: str, result: dict[str, Any]) -> None:
        """Post a job's end: `{"output": [every yield]}` or `{"error": text}`."""
        await self._post(f"{self.done_url.replace('$ID', job_id)}&isStream=true", job_id, result)

    async def _post(self, url: str, job_id: str, value: dict[str, Any]) -> None:
        """Post until the platform takes it, refuses it for good, or the deadline has passed."""
        body = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        headers = {**HEADERS, "X-Request-ID": job_id}
        backoff = Backoff(first=0.2, most=10.0)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (trouble := await self._attempt(url, headers, body)) is not None:
                    log.warning("Job %s: the platform took no result (%s); trying again", job_id, trouble)
                    await asyncio.sleep(backoff.next())
        except TimeoutError:
            log.error("Job %s: a result could not be delivered within %.0f s", job_id, DEADLINE_SECONDS)

    async def _attempt(self, url: str, headers: dict[str, str], body: bytes) -> str | None:
        """Post once; return what went wrong if another try may mend it."""
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_SECONDS)
        try:
            async with self.session.post(url, data=body, headers=headers, timeout=timeout) as answer:
                if answer.status < 400:
                    # Taken. A connection that breaks now must not make it be posted again.
                    return None
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__
        if answer.status == 429 or answer.status >= 500:
            return f"HTTP {answer.status}"
        log.error("Job %s: the platform refused a result with HTTP %d", headers["X-Request-ID"], answer.status)
        return None
