"""Blocking work in threads of an executor."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

from worker import threads

caller: ContextVar[str] = ContextVar("caller", default="nobody")


def test_work_runs_in_a_thread_of_the_executor_with_the_callers_context() -> None:
    def work(greeting: str) -> str:
        return f"{greeting} {caller.get()} in {threading.current_thread().name}"

    async def run() -> str:
        caller.set("Ada")
        with ThreadPoolExecutor(1, "media") as executor:
            return await threads.call(executor, work, "Hello")

    assert asyncio.run(run()) == "Hello Ada in media_0"
