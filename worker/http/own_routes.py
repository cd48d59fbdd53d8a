"""The worker's own routes: `/ping`, `/health`, `/info` and `/metrics`. They work while the model is loading too."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel

from worker import __version__, redaction
from worker.errors import Json
from worker.lifecycle import Lifecycle, State
from worker.memory import Budget
from worker.request.asgi import App, Message, Receive, Send
from worker.request.routes import OWN_ROUTES
from worker.settings.settings import Settings
from worker.telemetry import gpu
from worker.telemetry.cluster import ClusterCollector
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import StartupPhases

PING: dict[State, int] = {"starting": 204, "ready": 200}
"""The statuses that RunPod's load balancer expects: 204 while initializing, 200 when healthy. All others are 503."""

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
    """Requests that run or wait."""
    requests_running: float | None
    """In the engine; None until it is loaded, and with `DISABLE_LOG_STATS`."""
    requests_waiting: float | None
    kv_cache_usage: float | None
    """Between 0 and 1."""
    last_error: dict[str, Any] | None
    """The last job that failed through no fault of its caller."""
    batch: dict[str, Any] | None
    """The progress of the batch that runs."""
    cluster: dict[str, Any] | None
    """Role, rank and nodes of a cluster; None on a single machine."""


class Info(BaseModel):
    """The body of `/info`."""

    version: str
    mode: str
    """`queue`, `http` or `local`."""
    image: str | None
    """The version of the image; None outside of it."""
    model: str
    revision: str | None
    engine: dict[str, Any] | None
    """Versions, limits and arguments of the engine; None until it is loaded."""
    gpus: list[dict[str, Any]]
    """Name, and total and free memory in bytes, of each GPU."""
    settings: dict[str, Any]
    """The worker's own settings without secrets."""
    startup_seconds: dict[str, float]
    request_memory_bytes: dict[str, int]
    """What the bodies and media of all requests hold, and may hold: `held`, `limit`."""


class OwnRoutes:
    """The routes, as the ASGI app `app`. `memory` is the budget of all requests."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        telemetry: Telemetry,
        settings: Settings,
        startup_phases: StartupPhases,
        memory: Budget,
        cluster: Callable[[], Json] = dict,
    ) -> None:
        self._lifecycle = lifecycle
        self._telemetry = telemetry
        self._settings = settings
        self._startup_phases = startup_phases
        self._memory = memory
        self._cluster = cluster
        telemetry.registry.register(ClusterCollector(cluster))
        self.engine: dict[str, Any] | None = None
        """The description of the engine, once it is loaded."""
        ready = Gauge("worker_ready", "1 while the worker answers jobs.", registry=telemetry.registry)
        ready.set_function(lambda: lifecycle.state == "ready")
        name = "worker_request_memory"
        held = Gauge(f"{name}_bytes", "Memory of all requests' bodies and media.", registry=telemetry.registry)
        held.set_function(lambda: memory.held)
        limit = Gauge(f"{name}_limit_bytes", "The limit of this memory.", registry=telemetry.registry)
        limit.set(memory.limit)
        self.app = FastAPI(title="RunPod vLLM worker", version=__version__, docs_url=None, redoc_url=None)
        unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": Health}}
        self.app.get("/ping", responses={204: {}, 503: {}}, response_class=Response)(self.ping)
        self.app.get("/health", responses=unhealthy)(self.health)
        # The HTTP server leaves out the body.
        self.app.head("/ping", include_in_schema=False)(self.ping)
        self.app.head("/health", include_in_schema=False)(self.health)
        self.app.get("/info")(self.info)
        self.app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)(
            self.metrics
        )

    def over(self, engine: App) -> App:
        """Return an app that answers the worker's own routes and leaves all others to `engine`."""

        async def app(scope: Message, receive: Receive, send: Send) -> None:
            await (self.app if scope["path"] in OWN_ROUTES else engine)(scope, receive, send)

        return app

    async def ping(self) -> Response:
        """Return 204 while the model is loading, 200 when the worker is ready, else 503. For load balancers."""
        return Response(status_code=PING.get(self._lifecycle.state, 503))

    async def health(self, response: Response) -> Health:
        """Return the worker's state and load; 503 unless it is ready."""
        state = self._lifecycle.state
        response.status_code = 200 if state == "ready" else 503
        load = _gauges(self._telemetry.registry)
        return Health(
            status=state,
            model=str(redaction.public(self._settings.model_name)),
            uptime_seconds=round(self._lifecycle.uptime, 1),
            jobs=self._telemetry.running,
            last_error=self._telemetry.last_error,
            batch=self._telemetry.batches.current,
            cluster=self._cluster() or None,
            **load,
        )

    async def info(self) -> Info:
        """Return versions, model, limits, GPUs, settings and the duration of each phase of the start."""
        return Info(
            version=__version__,
            mode=self._settings.mode,
            image=self._settings.worker_image,
            model=str(redaction.public(self._settings.model_name)),
            revision=self._settings.model_revision,
            engine=self.engine,
            gpus=gpu.installed(),
            settings=self._settings.public(),
            startup_seconds=self._startup_phases.seconds,
            request_memory_bytes={"held": self._memory.held, "limit": self._memory.limit},
        )

    async def metrics(self) -> Response:
        """Return vLLM's metrics and the worker's in Prometheus' text format."""
        return Response(generate_latest(self._telemetry.registry), media_type=CONTENT_TYPE_LATEST)


def _gauges(registry: CollectorRegistry) -> dict[str, float | None]:
    """Read vLLM's gauges. With data parallelism every engine has its own."""
    samples: dict[str, list[float]] = {}
    for family in registry.restricted_registry(list(ENGINE_GAUGES.values())).collect():
        samples[family.name] = [sample.value for sample in family.samples]
    values = {name: samples.get(metric) for name, metric in ENGINE_GAUGES.items()}
    return {
        name: None if not value else max(value) if name == "kv_cache_usage" else sum(value)
        for name, value in values.items()
    }
