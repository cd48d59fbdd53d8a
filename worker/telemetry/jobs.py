"""What is told of each job at its end: one log line, and metrics.

The metrics stand in the same Prometheus registry as vLLM's, so that one exposition holds both.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from worker import __version__
from worker.request.routes import CONTROL, OWN_ROUTES, route_of
from worker.telemetry.usage import Meter, metered

Outcome = Literal["ok", "client_error", "engine_error", "cancelled", "timeout"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TIMEOUTS = (408, 504)

_PROPAGATOR = TraceContextTextMapPropagator()

log = logging.getLogger(__name__)


def outcome_of(status: int) -> Outcome:
    """Return what an HTTP status says of a job."""
    if status in TIMEOUTS:
        return "timeout"
    return "ok" if status < 400 else "client_error" if status < 500 else "engine_error"


@dataclass(slots=True)
class Record:
    """One job while it runs; whoever answers it fills in what came of it. One that nobody fills in was cancelled."""

    request_id: str
    path: str = ""
    stream: bool = False
    status: int | None = None
    outcome: Outcome = "cancelled"
    trace_headers: dict[str, str] = field(default_factory=dict)
    """By which the engine's spans become children of the job's; empty where nothing is traced."""
    meter: Meter = field(default_factory=Meter)
    began: float = field(default_factory=time.time)
    """Seconds since the epoch, as the engine counts."""
    _clock: float = field(default_factory=time.monotonic)

    def ended_with(self, status: int) -> None:
        """Note the HTTP status, or what would be one, with which the job has ended."""
        self.status = status
        self.outcome = outcome_of(status)

    @property
    def route(self) -> str:
        """The route of the path, from a bounded set."""
        return route_of(self.path) or (self.path if self.path in OWN_ROUTES else CONTROL)

    @property
    def modality(self) -> str:
        """`text`, or what comes with it, such as `image` or `image+video`."""
        return "+".join(sorted(self.meter.media)) or "text"

    def summary(self) -> dict[str, Any]:
        """Return the fields of the log line; times are in seconds."""
        total = time.monotonic() - self._clock
        first, tokens = self.meter.first_token_at, self.meter.completion_tokens
        to_first = None if first is None else max(first - self.began, 0.0)
        decoding = None if to_first is None else total - to_first
        return {
            "request_id": self.request_id,
            "route": self.route,
            "adapter": self.meter.adapter,
            "stream": self.stream,
            "modalities": {"text": 1, **self.meter.media},
            "input_tokens": self.meter.prompt_tokens,
            "output_tokens": tokens,
            "total_seconds": round(total, 4),
            "queue_seconds": _rounded(self.meter.queue_seconds),
            "ttft_seconds": _rounded(to_first),
            "tokens_per_second": round((tokens - 1) / decoding, 3)
            if decoding and decoding > 0 and tokens > 1
            else None,
            "finish_reason": self.meter.finish_reason,
            "outcome": self.outcome,
            "status": self.status,
        }


class Telemetry:
    """The metrics, and the records of the jobs that run."""

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model = model
        self.registry = registry
        # Does nothing until vLLM, told where traces go, has provided for spans.
        self._tracer = trace.get_tracer("worker")
        build = Gauge("worker_build_info", "What runs; always 1.", ["version", "model"], registry=registry)
        build.labels(__version__, model).set(1)
        labels = ["route", "outcome", "modality"]
        self._jobs = Counter("worker_jobs", "Jobs that have ended.", labels, registry=registry)
        self.running = 0
        """Jobs that run or wait in the engine."""
        self.last_error: dict[str, Any] | None = None
        """Which job failed last for a reason that was not its caller's."""
        running = Gauge("worker_jobs_running", "Jobs that run or wait in the engine.", registry=registry)
        running.set_function(lambda: self.running)
        self._tokens = Counter("worker_tokens", "Tokens of jobs.", ["direction"], registry=registry)
        self._total = _histogram("worker_job_seconds", "From a job's arrival to its end.", registry)
        self._first = _histogram(
            "worker_time_to_first_token_seconds", "From a job's arrival to its first token.", registry
        )
        self._queued = _histogram("worker_queue_delay_seconds", "A job's wait in the engine's queue.", registry)
        self._each = Histogram(
            "worker_time_per_output_token_seconds",
            "Time of each token of a job after its first.",
            registry=registry,
            buckets=TOKEN_SECONDS,
        )
        self._fetched = _histogram("worker_media_fetch_seconds", "Fetching a link to media.", registry)
        self._fetched_bytes = Counter("worker_media_fetched_bytes", "Media fetched by link.", registry=registry)
        self._rejected = Counter("worker_media_rejected", "Media not taken.", ["reason"], registry=registry)
        self._media = Counter("worker_media", "Images, videos and so on in prompts.", ["modality"], registry=registry)
        self.refused = Counter("worker_refused", "HTTP requests refused by the gate.", ["status"], registry=registry)
        self.stream_posts = Counter(
            "worker_stream_posts", "Parts of streams sent to RunPod's queue.", registry=registry
        )

    @contextmanager
    def job(self, request_id: str, path: str = "", headers: Mapping[str, str] | None = None) -> Iterator[Record]:
        """Keep the record of one job; the engine counts in its meter what is asked of it from here on.

        `headers` may name the caller's span, whose child the job's then is.
        """
        span = self._tracer.start_span("job", _PROPAGATOR.extract(headers or {}), SpanKind.SERVER)
        record = Record(request_id, path)
        _PROPAGATOR.inject(record.trace_headers, trace.set_span_in_context(span))
        metered.set(record.meter)
        self.running += 1
        try:
            yield record
        finally:
            self.running -= 1
            span.set_attributes({"request_id": request_id, "route": record.route, "outcome": record.outcome})
            span.end()
            self._tell(record)

    def _tell(self, record: Record) -> None:
        summary = record.summary()
        self._jobs.labels(record.route, record.outcome, record.modality).inc()
        self._tokens.labels("input").inc(summary["input_tokens"])
        self._tokens.labels("output").inc(summary["output_tokens"])
        self._total.observe(summary["total_seconds"])
        for histogram, name in ((self._first, "ttft_seconds"), (self._queued, "queue_seconds")):
            if (seconds := summary[name]) is not None:
                histogram.observe(seconds)
        if rate := summary["tokens_per_second"]:
            self._each.observe(1 / rate)
        for modality, count in record.meter.media.items():
            self._media.labels(modality).inc(count)
        for fetch in record.meter.fetches:
            self._fetched.observe(fetch.seconds)
            self._fetched_bytes.inc(fetch.size)
        for reason in record.meter.rejections:
            self._rejected.labels(reason).inc()
        if record.outcome == "engine_error":
            self.last_error = {"request_id": record.request_id, "at": round(time.time()), "status": record.status}
        log.info(
            "Job %s %s after %.3f s, %d tokens in, %d out",
            record.request_id,
            record.outcome,
            summary["total_seconds"],
            summary["input_tokens"],
            summary["output_tokens"],
            extra={"model": self._model, **summary},
        )


def _histogram(name: str, documentation: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, documentation, registry=registry, buckets=SECONDS)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
