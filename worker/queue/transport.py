"""HTTP to the platform: one request at a time, answers that are read within limits, connections that are kept."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from worker import race

POLL_SECONDS = 90.0
"""How long a long poll waits for the beginning of its answer. The SDK waits as long."""
BODY_SECONDS = 120.0
"""How long the jobs in an answer may take to arrive."""
POST_SECONDS = 60.0
"""How long a post may take."""
ANSWER_SECONDS = 5.0
ANSWER_BYTES = 1_000_000
"""How long, and how far, the body of a post's answer is read. After it the connection can be used again."""


class NoAnswerError(Exception):
    """No complete answer arrived. The message is the cause, without the URL, which contains the worker's key."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a long poll."""

    status: int
    body: bytes = b""


class Transport(Protocol):
    """What the platform's client needs of HTTP."""

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:
        """Return the answer to a long poll; None if none begins in time, or before `stopping` is set.

        Raises:
            NoAnswerError: the connection failed, or the answer is incomplete.
        """

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """Return the status of the answer to a post.

        Raises:
            NoAnswerError: no answer arrived; the platform may have handled the post all the same.
        """


class HttpTransport:
    """A transport over an open session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._post_timeout = aiohttp.ClientTimeout(total=POST_SECONDS)

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:
        """See `Transport`."""
        opening = asyncio.ensure_future(self._open(url))
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await (race.first(opening, stopping.wait()) if stopping else asyncio.wait([opening]))
        except TimeoutError:
            pass
        finally:
            if not opening.done():
                await race.end(opening)
        if opening.cancelled():
            return None
        try:
            answer = opening.result()
            async with answer, asyncio.timeout(BODY_SECONDS):
                return Answer(answer.status, await answer.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswerError(type(error).__name__) from None

    async def _open(self, url: str) -> aiohttp.ClientResponse:
        return await self._session.get(url, timeout=aiohttp.ClientTimeout(total=None))

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """See `Transport`."""
        status = read = 0
        try:
            async with self._session.post(
                url, data=body, headers=headers, timeout=self._post_timeout, allow_redirects=False
            ) as answer:
                status = answer.status
                async with asyncio.timeout(ANSWER_SECONDS):
                    while read < ANSWER_BYTES and (data := await answer.content.readany()):
                        read += len(data)
        except (aiohttp.ClientError, TimeoutError) as error:
            # A connection that breaks after the status must not cause another post.
            if not status:
                raise NoAnswerError(type(error).__name__) from None
        return status
