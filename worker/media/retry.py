"""Further attempts at a transfer whose server is away or has failed."""

import asyncio
from collections.abc import Awaitable, Callable

from worker.backoff import Backoff
from worker.errors import UnreachableError

ATTEMPTS = 3


async def retried(transfer: Callable[[], Awaitable[None]]) -> None:
    """Call `transfer`; try again after an `UnreachableError`, and raise the last one. The caller limits the time."""
    backoff = Backoff(first=0.5, most=4.0)
    for left in reversed(range(ATTEMPTS)):
        try:
            await transfer()
            return
        except UnreachableError:
            if not left:
                raise
        await asyncio.sleep(backoff.next())
