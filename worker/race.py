"""Waits for whichever ends first: some work, or an event that ends it early."""

import asyncio
from collections.abc import Awaitable
from typing import Any


async def first(*works: Awaitable[Any]) -> "asyncio.Future[Any]":
    """Wait until one of `works` ends and return it; of several that have ended, the earliest argument.

    Coroutines that have not ended are cancelled and waited for. Futures and tasks go on: their owner ends them.
    """
    futures = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return next(future for future in futures if future.done())
    finally:
        await end(*(future for future, work in zip(futures, works, strict=True) if future is not work))


async def end(*tasks: "asyncio.Future[Any]", grace: float = 0.0) -> None:
    """Wait up to `grace` seconds for the end of tasks, then cancel them and wait. What they raise is dropped."""
    if not tasks:
        return
    try:
        if grace:
            await asyncio.wait(tasks, timeout=grace)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()
