"""Calls of blocking functions in threads other than the event loop's."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")


async def call(threads: Executor, work: Callable[..., Result], *arguments: object) -> Result:
    """Call `work` in one of these threads, with the caller's context variables, as `asyncio.to_thread` does."""
    in_context = partial(copy_context().run, work, *arguments)
    return await asyncio.get_running_loop().run_in_executor(threads, in_context)
