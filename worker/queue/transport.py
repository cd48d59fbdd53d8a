"""HTTP to the platform: one request at a time, answers that are read within limits, connections that are kept."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from worker import race
from worker.resume import Resumes

POLL_SECONDS = 90.0
"""How long a long poll waits for the beginning of its answer. The SDK waits as long."""
BODY_SECONDS = 120.0
"""How long the jobs in an answer may take to arrive."""
POST_SECONDS = 60.0
"""How long a post may take."""
RESUMED_POLL_SECONDS = 0.02
"""How long a poll still waits for the beginning of its answer after the worker was frozen. An answer that this machine
has already received begins at once, and is read to its end. Without one, the connection may be dead."""
RESUMED_POST_SECONDS = 5.0
"""How long a post, and the rest of a poll's answer, may still take then. If a post has no answer by then, it is
repeated."""
ANSWER_SECONDS = 5.0
ANSWER_BYTES = 1_000_000
"""How long, and how far, the body of a post's answer is read. After it the connection can be used again."""

NO_LIMIT = aiohttp.ClientTimeout(total=None)
"""aiohttp's own limits would count the time while the worker is frozen."""


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


class Connections(aiohttp.TCPConnector):
    """The connections of a session, without a limit of their number."""

    def __init__(self) -> None:
        super().__init__(limit=0)

    def close_idle(self) -> None:
        """Close the connections that no request uses."""
        for connections in self._conns.values():
            for connection, _ in connections:
                connection.close()
        self._conns.clear()


class HttpTransport:
    """A transport over an open session."""

    def __init__(self, session: aiohttp.ClientSession, resumes: Resumes | None = None) -> None:
        self._session = session
        self._resumes = resumes or Resumes()

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:
        """See `Transport`."""
        opening = asyncio.ensure_future(self._open(url))
        try:
            async with self._resumes.timeout(POLL_SECONDS, after_resume=RESUMED_POLL_SECONDS):
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
            async with answer, self._resumes.timeout(BODY_SECONDS, after_resume=RESUMED_POST_SECONDS):
                return Answer(answer.status, await answer.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswerError(type(error).__name__) from None

    async def _open(self, url: str) -> aiohttp.ClientResponse:
        return await self._session.get(url, timeout=NO_LIMIT)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """See `Transport`."""
        status = read = 0
        try:
            async with (
                self._resumes.timeout(POST_SECONDS, after_resume=RESUMED_POST_SECONDS),
                self._session.post(url, data=body, headers=headers, timeout=NO_LIMIT, allow_redirects=False) as answer,
            ):
                status = answer.status
                async with asyncio.timeout(ANSWER_SECONDS):
                    while read < ANSWER_BYTES and (data := await answer.content.readany()):
                        read += len(data)
        except (aiohttp.ClientError, TimeoutError) as error:
            # A connection that breaks after the status must not cause another post.
            if not status:
                raise NoAnswerError(type(error).__name__) from None
        return status
