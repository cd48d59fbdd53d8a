"""The routes that tell of the worker itself: `/ping`, `/health`, `/info`, `/metrics`. No model is needed for them."""

from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel

from worker import __version__
from worker.lifecycle import State, Status
from worker.request.asgi import App, Message, Receive, Send
from worker.request.routes import OWN_ROUTES
from worker.settings.settings import Settings
from worker.telemetry import gpu
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import Ledger

PING: dict[State, int] = {"loading": 204, "ready": 200, "draining": 503, "dead": 503, "failed": 503}
"""As RunPod's load balancer wants it: 204 while initializing, 200 when healthy."""

ENGINE_GAUGES = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}


class Health(BaseModel):
    """The body of `/health`."""

    status: State
    model: str
    uptime_seconds: float
    jobs: int
    """Jobs that run or wait."""
    requests_running: float | None
    """In the engine; None until it is there, and with `DISABLE_LOG_STATS`."""
    requests_waiting: float | None
    kv_cache_usage: float | None
    """Between 0 and 1."""
    last_error: dict[str, Any] | None
    """Which job failed last for a reason that was not its caller's, and when."""


class Info(BaseModel):
    """The body of `/info`."""

    version: str
    model: str
    revision: str | None
    engine: dict[str, Any] | None
    """What the engine tells of itself; None until it is there."""
    gpus: list[dict[str, Any]]
    """Name and memory in bytes of each."""
    settings: dict[str, Any]
    """The worker's own, secrets left out."""
    startup_seconds: dict[str, float]


class Monitor:
    """An ASGI app for the worker's own routes."""

    def __init__(self, status: Status, telemetry: Telemetry, settings: Settings, ledger: Ledger) -> None:
        self._status = status
        self._telemetry = telemetry
        self._settings = settings
        self._ledger = ledger
        ready = Gauge("worker_ready", "1 while the worker answers jobs.", registry=telemetry.registry)
        ready.set_function(lambda: status.state == "ready")
        self.app = FastAPI(title="RunPod vLLM worker", version=__version__, docs_url=None, redoc_url=None)
        unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": Health}}
        self.app.get("/ping", responses={204: {}, 503: {}}, response_class=Response)(self.ping)
        self.app.get("/health", responses=unhealthy)(self.health)
        self.app.get("/info")(self.info)
        self.app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)(
            self.metrics
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def over(self, engine: App) -> App:
        """Return an app that answers the worker's own routes itself and leaves all others to the engine's."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await (self.app if scope["path"] in OWN_ROUTES else engine)(scope, receive, send)

        return app

    async def ping(self) -> Response:
        """Answer with a status and nothing else: 204 while the model is loaded, 200, or 503."""
        return Response(status_code=PING[self._status.state])

    async def health(self, response: Response) -> Health:
        """Tell how the worker is; 503 unless it is ready."""
        state = self._status.state
        response.status_code = 200 if state == "ready" else 503
        load = _gauges(self._telemetry.registry)
        return Health(
            status=state,
            model=self._settings.model_name,
            uptime_seconds=round(self._status.uptime, 1),
            jobs=self._telemetry.running,
            last_error=self._telemetry.last_error,
            **load,
        )

    async def info(self) -> Info:
        """Tell what the worker is: versions, model, limits, settings."""
        return Info(
            version=__version__,
            model=self._settings.model_name,
            revision=self._settings.model_revision,
            engine=self._status.engine,
            gpus=gpu.installed(),
            settings=self._settings.public(),
            startup_seconds=self._ledger.seconds,
        )

    async def metrics(self) -> Response:
        """Give vLLM's metrics and the worker's in Prometheus' text format."""
        return Response(generate_latest(self._telemetry.registry), media_type=CONTENT_TYPE_LATEST)


def _gauges(registry: CollectorRegistry) -> dict[str, float | None]:
    """Read vLLM's gauges; with data parallelism there is one of each for every engine."""
    found: dict[str, list[float]] = {}
    for family in registry.restricted_registry(list(ENGINE_GAUGES.values())).collect():
        found[family.name] = [sample.value for sample in family.samples]
    values = {name: found.get(metric) for name, metric in ENGINE_GAUGES.items()}
    return {
        name: None if not value else max(value) if name == "kv_cache_usage" else sum(value)
        for name, value in values.items()
    }
