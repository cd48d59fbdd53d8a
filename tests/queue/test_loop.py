"""Single cases of the job loop, with a scripted platform, on a virtual clock. The simulation covers the others."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from tests.support.clock import run_on_virtual_clock
from tests.support.urls import URLS
from worker.lifecycle import Lifecycle
from worker.queue.handler import Job
from worker.queue.loop import AGAIN_SECONDS, Context, JobLoop
from worker.queue.outputs import Output
from worker.queue.places import Places
from worker.queue.platform import Platform
from worker.queue.transport import Answer
from worker.settings import Settings

JOB: Job = {"id": "job", "input": {}}


class Script:
    """Gives jobs and stops out at planned times, and accepts every post."""

    def __init__(self, jobs: Mapping[float, Job], stops: Mapping[float, str]) -> None:
        self._jobs = dict(jobs)
        self._stops = dict(stops)
        self.results: list[Any] = []

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:  # noqa: ARG002
        planned: dict[float, Any] = self._jobs if url.startswith("take") else self._stops
        if not planned:
            await asyncio.Event().wait()
        at = min(planned)
        await asyncio.sleep(max(at - asyncio.get_running_loop().time(), 0))
        value = planned.pop(at)
        return Answer(200, json.dumps(value if url.startswith("take") else {"jobsToStop": [value]}).encode())

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:  # noqa: ARG002
        if url.startswith("done"):
            self.results.append(json.loads(body))
        return 200


class Worker:
    """A job loop with a scripted handler and a scripted platform."""

    def __init__(self, jobs: Mapping[float, Job], stops: Mapping[float, str] | None = None, **settings: Any) -> None:
        self.lifecycle = Lifecycle()
        self.lifecycle.ready(lambda: False)
        self.script = Script(jobs, stops or {})
        self.settings = Settings.model_validate({"worker_mode": "queue", **settings})
        self.ids: set[str] = set()
        self.began: list[float] = []

    async def handle(self, job: Job) -> AsyncGenerator[Output, None]:
        """Answer with the input, after as many seconds as it says, or when the worker's life is over."""
        clock = asyncio.get_running_loop().time
        self.began.append(clock())
        try:
            async with asyncio.timeout(job["input"].get("seconds", 0)):
                await self.lifecycle.over.wait()
            yield {"error": str(self.lifecycle.error())}
        except TimeoutError:
            yield job["input"].get("output", "done")

    def run(self, stop_at: float) -> list[Any]:
        """Run until all is done after a stop, and return the results that were posted."""

        async def died() -> None:
            await asyncio.Event().wait()

        async def run() -> None:
            stopping = self.lifecycle.stopping
            asyncio.get_running_loop().call_later(stop_at, stopping.set)
            platform = Platform(self.script, URLS, stopping, 900.0)
            context = Context(self.lifecycle, self.settings, died, Places(4, 4), lambda: None)
            await JobLoop(self.handle, platform, self.ids, context).run()

        run_on_virtual_clock(run())
        assert self.ids == set()
        return self.script.results


def job(**job_input: Any) -> Job:
    return {"id": "job", "input": job_input}


def test_a_worker_that_refuses_its_jobs_says_why_whatever_happens_to_unfinished_ones() -> None:
    worker = Worker({0.0: job(seconds=5)}, unfinished_jobs="leave")
    worker.lifecycle.refuse("the model is too large")
    (result,) = worker.run(stop_at=10)
    assert "the model is too large" in result["error"]


@pytest.mark.parametrize(("unfinished_jobs", "count"), [("leave", 0), ("fail", 1)])
def test_a_job_without_output_is_left_or_fails_after_the_grace(unfinished_jobs: str, count: int) -> None:
    assert len(Worker({0.0: job(seconds=60)}, unfinished_jobs=unfinished_jobs).run(stop_at=1)) == count


def test_a_job_fails_if_its_output_cannot_be_posted() -> None:
    class Unknown:
        """Something that JSON does not have."""

    worker = Worker({0.0: job()})
    worker.handle = _yields(Unknown())  # type: ignore[method-assign]
    (result,) = worker.run(stop_at=1)
    assert json.loads(result["error"])["message"].startswith("The worker failed while it handled request job")


def _yields(output: Any) -> Any:
    async def handle(_: Job) -> AsyncGenerator[Output, None]:
        yield output

    return handle


@pytest.mark.parametrize(
    ("given", "stopped", "runs"),
    [
        pytest.param(5.0, 4.0, 2, id="given after the stop"),
        pytest.param(4.0, 5.0, 2, id="given shortly before the stop"),
        pytest.param(4.0, 5.0 + AGAIN_SECONDS, 1, id="given long before the stop"),
        pytest.param(4.0, None, 1, id="given twice"),
    ],
)
def test_a_job_that_is_given_twice_runs_twice_only_if_it_was_stopped(
    given: float, stopped: float | None, runs: int
) -> None:
    stops = {} if stopped is None else {stopped: "job"}
    worker = Worker({0.0: job(seconds=40), given: job(seconds=40)}, stops)
    results = worker.run(stop_at=200)
    assert (len(worker.began), len(results)) == (runs, 0 if runs == 1 and stopped else 1)


def test_a_job_that_runs_again_while_the_worker_is_stopped_gets_the_grace_too() -> None:
    worker = Worker({0.0: job(seconds=9), 1.0: job(seconds=9, output="again")}, {3.0: "job"}, drain_seconds=20)
    assert worker.run(stop_at=2) == [{"output": ["again"]}]
