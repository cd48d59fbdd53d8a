"""An engine that follows a plan, behind the routes that vLLM's app has."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.simulation.lines import Lines
from tests.simulation.plan import Plan, RequestPlan, job_of
from worker import race
from worker.request import sse
from worker.request.asgi import Message, Receive, Send, header
from worker.request.pipeline import IS_LINE
from worker.telemetry.usage import EngineLoad, EngineUsage, current_usage

ERROR = {"error": {"message": "planned", "type": "server_error", "code": 500}}
NOTICED_SECONDS = 0.3
"""How long after the engine's death the worker notices it, unless a request does."""


class Engine:
    """Runs up to `capacity` requests at once; the others wait, first come, first served."""

    def __init__(self, plan: Plan, lines: Lines) -> None:
        self._plans = {request.name: request for request in plan.requests}
        self.lines = lines
        self._capacity = plan.capacity
        self._kv_cache = plan.kv_cache
        self._dead = asyncio.Event()
        self.died_at = float("inf")
        self.running: list[str] = []
        self.waiting: dict[asyncio.Future[None], str] = {}
        self.reported = asyncio.Event()
        self.collisions = 0
        """Requests that began while the same job, or the same line, had another one. vLLM refuses them."""

    @property
    def requests(self) -> list[str]:
        """The names of the requests that are here: ids of jobs, or of lines."""
        return [*self.running, *self.waiting.values()]

    def has_requests_of(self, job_id: str) -> bool:
        """Return whether a job has any request here, or a line of it."""
        return any(job_of(name) == job_id for name in self.requests)

    @property
    def lines_running_or_waiting(self) -> int:
        """How many lines of batches have a request here."""
        return len({name for name in self.requests if "/" in name})

    def callers_load(self) -> EngineLoad:
        """Return the load without the lines of batches, which make room for other requests."""
        load, requests = self.load(), self.requests
        if callers := sum("/" not in name for name in requests):
            kv_cache = load.kv_cache * callers / len(requests)
            running = min(callers, self._capacity)
            return EngineLoad(self._capacity, callers, running, callers - running, kv_cache)
        return EngineLoad(self._capacity)

    def load(self) -> EngineLoad:
        running, waiting = len(self.running), len(self.waiting)
        kv_cache = min(running * self._kv_cache, 1.0)
        return EngineLoad(self._capacity, running + waiting, running, waiting, kv_cache)

    def die(self) -> None:
        self.died_at = asyncio.get_running_loop().time()
        self._dead.set()

    @property
    def is_dead(self) -> bool:
        return self._dead.is_set()

    async def died(self) -> None:
        await self._dead.wait()
        await asyncio.sleep(NOTICED_SECONDS)

    async def app(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request as its plan says. A disconnect of the client ends it."""
        name, body = header(scope, b"x-request-id").decode(), (await receive())["body"]
        name = json.loads(body)["prompt"] if scope["state"].get(IS_LINE) else name
        plan = self._plans[name]
        gone = asyncio.Event().wait() if plan.is_deaf else receive()
        with self.lines.request(name):
            (await race.first(self._answer(plan, send), self._death(), gone)).result()

    async def _death(self) -> None:
        await self._dead.wait()
        raise RuntimeError("the engine has died")

    async def _answer(self, plan: RequestPlan, send: Send) -> None:
        await asyncio.sleep(plan.prepare)
        self.collisions += plan.name in self.requests
        if usage := current_usage.get():
            usage.add(EngineUsage)
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.requests - 1):
                group.create_task(self._run(plan))
            async with self._place(plan.name):
                await (self._send_value(plan, send) if plan.form == "value" else self._send_events(plan, send))

    async def _run(self, plan: RequestPlan) -> None:
        """Run a further request, whose output is not sent."""
        async with self._place(plan.name):
            await asyncio.sleep(plan.gap * plan.events)

    async def _send_value(self, plan: RequestPlan, send: Send) -> None:
        await self._generate(plan, plan.events)
        body, status = (ERROR, 500) if plan.ending == "error" else ({"n": plan.events}, 200)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})
        self.lines.answered(plan.name)

    async def _send_events(self, plan: RequestPlan, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(plan.events):
            await asyncio.sleep(plan.gap)
            await send({"type": "http.response.body", "body": sse.event({"n": number}), "more_body": True})
        await self._generate(plan, 0)
        last = sse.event(ERROR) if plan.ending == "error" else sse.DONE
        await send({"type": "http.response.body", "body": last})

    async def _generate(self, plan: RequestPlan, tokens: int) -> None:
        await asyncio.sleep(plan.gap * tokens)
        if plan.ending == "silent":
            await asyncio.Event().wait()
        if plan.ending == "exception":
            raise RuntimeError("planned")

    @asynccontextmanager
    async def _place(self, name: str) -> AsyncIterator[None]:
        if len(self.running) >= self._capacity:
            turn = asyncio.get_running_loop().create_future()
            self.waiting[turn] = name
            self.reported.set()
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self.waiting:
                    del self.waiting[turn]
                else:
                    self._leave(name)
                raise
        else:
            self.running.append(name)
        self.reported.set()
        try:
            yield
        finally:
            self._leave(name)

    def _leave(self, name: str) -> None:
        self.running.remove(name)
        if turn := next(iter(self.waiting), None):
            self.running.append(self.waiting.pop(turn))
            turn.set_result(None)
        self.reported.set()
