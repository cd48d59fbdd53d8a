"""The ways to run a worker. Each loads and serves, or refuses every caller with the reason why it cannot."""

import asyncio
import gc
import json
import logging
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any

import uvloop

from worker import processes, race, redaction
from worker.batch.job import Shared
from worker.batch.share import Share, without_lines
from worker.cluster.cluster import FINISHED
from worker.errors import ConfigurationError, StartupError
from worker.http.server import HttpServer
from worker.queue import local
from worker.queue.batch_jobs import BatchJobs
from worker.queue.delivery import StoreResult, store_nothing
from worker.queue.handler import Handler, Job, JobHandler
from worker.queue.loop import Context
from worker.queue.places import Places
from worker.queue.results import Results
from worker.request.asgi import App, Message, Receive, Send
from worker.request.links import LinkedInputs
from worker.telemetry.usage import EngineLoad
from worker.worker import Worker

log = logging.getLogger(__name__)

Died = Callable[[], Coroutine[Any, Any, object]]

STOP_AGAIN_SECONDS = 0.2
BATCH_SECONDS = 2.0
"""How long a batch that is left gets to write what its last lines were answered."""
REFUSED_AT_ONCE = 16
"""Jobs that a worker takes at once when it refuses all of them."""
REFUSE_JOBS = 100
REFUSE_SECONDS = 600.0
"""A worker that cannot start ends after it has refused so many jobs, or for so long: more would only cost money."""


def run(mode: "Mode", problem: ConfigurationError | None) -> int:
    """Load and serve, or refuse every caller if the settings are wrong. Return the exit code.

    Raises:
        StartupError: the worker cannot start or go on.
    """
    worker = mode.worker
    with ExitStack() as stack:
        stack.callback(worker.shutdown)
        try:
            mode.listen(stack)
            if problem is None:
                with worker.cluster_first():
                    mode.load()
                    code = mode.serve()
                if mode.ends_by_itself and mode.stopped_by is None:
                    worker.cluster.leave(FINISHED)
                return code
        except StartupError as error:
            mode.exit_if_stopped()
            if not isinstance(worker.cluster.problem, ConfigurationError):
                worker.cluster.leave("has failed")
            if not isinstance(error, ConfigurationError):
                worker.lifecycle.fail(str(error))
                raise
            problem = problem or error
        except Exception:
            mode.exit_if_stopped()
            worker.cluster.leave("has failed")
            raise
        if worker.settings.startup_failure == "exit":
            raise problem
        # A head that refuses its callers goes on to refuse other nodes, too.
        worker.end_engine()
        # handler.py has disabled it, and there is no engine whose start has enabled it again.
        gc.enable()
        mode.refuse(problem)
    return 0


class Mode(ABC):
    """One way to run a worker."""

    ends_by_itself = False
    """Whether the worker's end is the end of its work."""
    stops_with_0 = True
    """Whether a worker that is stopped by a signal ends with exit code 0."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.server: HttpServer | None = None
        self.stopped_by: int | None = None
        """The signal that stopped the worker while it was loading."""

    @property
    def exit_code(self) -> int:
        """The exit code of a worker that a signal stopped while it was loading."""
        return 0 if self.stops_with_0 else 128 + (self.stopped_by or 0)

    def listen(self, stack: ExitStack) -> None:
        """Open the ports for as long as the stack is open, or raise `ConfigurationError`."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            # Until the mode serves and handles them itself.
            signal.signal(number, self._stop)
        settings = self.worker.settings
        log.info("Mode %s, ports %s, volume %s", settings.mode, list(settings.ports) or "none", settings.volume)
        if ports := settings.ports:
            self.server = stack.enter_context(HttpServer(self.worker.gate, ports, settings.host))
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)

    def _stop(self, number: int, _frame: object) -> None:
        """End the process, from a signal handler.

        Python drops the exception if the handler happens to run within a finalizer. So a timer raises it again.
        """
        self.stopped_by = self.stopped_by or number
        if self.worker.is_importing:
            processes.exit_now(self.exit_code)
        signal.setitimer(signal.ITIMER_REAL, STOP_AGAIN_SECONDS)
        sys.exit(self.exit_code)

    def exit_if_stopped(self) -> None:
        """End the process if a signal has stopped the worker: its exception became another one in a library."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.stopped_by is not None and self.worker.cluster.problem is None:
            sys.exit(self.exit_code)

    def load(self) -> None:
        """Load the engine."""
        self.worker.load()

    @abstractmethod
    def serve(self) -> int:
        """Answer requests until the worker is stopped; return the exit code."""

    def refuse(self, error: ConfigurationError) -> None:
        """Tell callers why the worker cannot start, until it is stopped. After some time, or without callers, raise."""
        raise error

    def _begin_refusal(self, error: ConfigurationError) -> None:
        # vLLM's errors repeat its arguments.
        self.worker.lifecycle.refuse(redaction.remover(self.worker.settings.variables.secrets)(str(error)))
        log.error("The worker cannot start, and reports the reason to its callers: %s", error)

    async def _end_refusal(self, error: ConfigurationError) -> None:
        """Wait until enough jobs were refused, or for long enough, and raise the error."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REFUSE_SECONDS):
                while self.worker.telemetry.ended < REFUSE_JOBS:  # noqa: ASYNC110 - seldom, and for minutes at most
                    await asyncio.sleep(0.2)
        raise error


class QueueMode(Mode):
    """Jobs from RunPod's queue."""

    def load(self) -> None:
        """Load the engine, and import the SDK meanwhile."""
        self.worker.load(meanwhile=lambda: import_module("worker.queue.sdk"))

    def serve(self) -> int:
        """Answer jobs until the worker is stopped."""
        worker = self.worker
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            # Attached before the first ping and the first request for jobs, in the loop that serves.
            handler = job_handler(worker, runner.run(worker.attach()))
            results = Results(worker.settings, worker.engine.link_policy)
            with processes.exit_soon_after(), worker.cluster_first():
                engine, room = worker.engine, worker.pipeline.memory.room

                def load() -> EngineLoad:
                    return without_lines(engine.current_load(), worker.telemetry.lines_in_engine)

                places = Places(worker.concurrency, worker.settings.job_batch_size, load, room, engine.reported)
                self._serve(runner, handler.handle, places, engine.died, results.store)
        return 0

    def refuse(self, error: ConfigurationError) -> None:
        """Fail every job with the reason."""
        self._begin_refusal(error)
        handler = JobHandler(self.worker.own_routes.app, self.worker.pipeline, self.worker.settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            places = Places(REFUSED_AT_ONCE, REFUSED_AT_ONCE)
            self._serve(runner, handler.handle, places, lambda: self._end_refusal(error))

    def _serve(
        self, runner: asyncio.Runner, handler: Handler, places: Places, died: Died, store: StoreResult = store_nothing
    ) -> None:
        from worker.queue import sdk

        worker = self.worker
        context = Context(worker.lifecycle, worker.settings, died, places, worker.telemetry.stream_posts.inc, store)
        sdk.serve_queue(handler, context, runner)


class HttpMode(Mode):
    """Requests over HTTP: for load-balancing endpoints, pods and other machines."""

    def load(self) -> None:
        """Check the folder for batches, which takes no time, and load the engine."""
        if self.worker.batches is not None:
            self.worker.batches.store.prepare()
        self.worker.load()

    def serve(self) -> int:
        """Answer requests until the worker is stopped."""
        with processes.exit_soon_after(), self.worker.cluster_first():
            self._run(self._serve())
        return 0

    async def _serve(self) -> None:
        worker, lifecycle = self.worker, self.worker.lifecycle
        attaching = asyncio.create_task(worker.attach())
        if await race.first(attaching, lifecycle.stopping.wait()) is attaching:
            batches = asyncio.create_task(self._run_batches(attaching.result()))
            try:
                with lifecycle.resumes.watched():
                    await lifecycle.serve(worker.engine.died(), worker.gate.drained, worker.settings.grace)
            finally:
                await race.end(batches, grace=BATCH_SECONDS)
        else:
            attaching.cancel()

    async def _run_batches(self, app: App) -> None:
        if self.worker.batches is not None:
            await self.worker.batches.run(shared_by_batches(self.worker, app))

    def refuse(self, error: ConfigurationError) -> None:
        """Answer every request with the reason."""
        if self.server is None:
            raise error
        self._begin_refusal(error)
        self._run(self.worker.lifecycle.serve(self._end_refusal(error), self.worker.gate.drained, grace=0))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in the server's loop."""
        server, stopping = self.server, self.worker.lifecycle.stopping
        assert server is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.notify(stopping))
        server.run(work)


class LocalMode(Mode):
    """One job, whose result is printed."""

    ends_by_itself = True
    stops_with_0 = False

    def __init__(self, worker: Worker, test_input: str | None) -> None:
        super().__init__(worker)
        self._test_input = test_input
        self._job: Job = {}

    def load(self) -> None:
        """Read the job, which takes no time, and load the engine."""
        self._job = local.read_job(self._test_input)
        self.worker.load()

    def serve(self) -> int:
        """Run the job and print its result; the exit code is 1 if it failed."""
        result = asyncio.run(self._answer())
        sys.stdout.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        return 0 if result["status"] == "COMPLETED" else 1

    async def _answer(self) -> dict[str, Any]:
        worker = self.worker
        handler = job_handler(worker, await worker.attach())
        return await local.run(handler.handle, self._job)


class DevelopmentMode(Mode):
    """The SDK's test server (`--rp_serve_api`)."""

    stops_with_0 = False

    def serve(self) -> int:
        """Run the SDK's server. Its loop attaches the engine at the first job."""
        from worker.queue import sdk

        worker = self.worker
        sdk.serve_development_api(job_handler(worker, attached_later(worker)).handle)
        return 0


def job_handler(worker: Worker, app: App) -> JobHandler:
    """Return the handler for jobs, which answers them with `app`, and fetches inputs that are behind links."""
    links = LinkedInputs(worker.engine.link_policy, worker.settings)
    return JobHandler(app, worker.pipeline, worker.settings, links, BatchJobs(shared_by_batches(worker, app)))


def shared_by_batches(worker: Worker, app: App) -> Shared:
    """Return what batches need of the worker. They are answered with `app`."""
    engine, settings, pipeline = worker.engine, worker.settings, worker.pipeline
    most = settings.max_concurrency
    share = Share(worker.telemetry, pipeline.memory, engine.current_load, most)
    return Shared(app, pipeline, settings, engine.link_policy, share, engine.has_priorities)


def attached_later(worker: Worker) -> App:
    """Return the worker's app; the first request attaches the engine in its own loop."""
    attaching: asyncio.Task[App] | None = None

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal attaching
        attaching = attaching or asyncio.create_task(worker.attach())
        # A request that ends early must not take the attachment with it.
        await (await asyncio.shield(attaching))(scope, receive, send)

    return app
