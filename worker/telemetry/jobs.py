"""One log line, metrics and a span for each job.

The metrics are in the same Prometheus registry as vLLM's, so `/metrics` shows both.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from worker import __version__
from worker.resume import Resumes
from worker.telemetry.batches import BatchTelemetry
from worker.telemetry.usage import Usage, current_usage

Outcome = Literal["ok", "client_error", "engine_error", "cancelled", "timeout"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TIMEOUTS = (408, 504)
MAX_ADAPTERS = 100
"""How many adapters have series of their own in metrics."""
OTHER = "other"
"""The label of all other adapters."""

_PROPAGATOR = TraceContextTextMapPropagator()

log = logging.getLogger(__name__)


def outcome_of(status: int) -> Outcome:
    """Return the outcome of a job that ended with an HTTP status."""
    if status in TIMEOUTS:
        return "timeout"
    return "ok" if status < 400 else "client_error" if status < 500 else "engine_error"


@dataclass(slots=True)
class Record:
    """One job. It counts as cancelled until `ended_with` is called."""

    request_id: str
    route: str = ""
    """The route, out of a bounded set."""
    key: str = ""
    """The name of the caller's API key; "" without one."""
    stream: bool = False
    status: int | None = None
    outcome: Outcome = "cancelled"
    trace_headers: dict[str, str] = field(default_factory=dict)
    """Headers that make the engine's spans children of the job's span; empty without tracing."""
    usage: Usage = field(default_factory=Usage)
    began: float = 0.0
    """Seconds since the epoch, like the engine's times."""
    resumes: Resumes = field(default_factory=Resumes)
    _clock: float = 0.0

    def __post_init__(self) -> None:
        self.arrived()

    def arrived(self) -> None:
        """Start the clock: the request is complete."""
        self.began, self._clock = time.time(), self._waking_time()

    def _waking_time(self) -> float:
        return time.monotonic() - self.resumes.frozen_seconds

    def ended_with(self, status: int) -> None:
        """Note the HTTP status with which the job ended. A queue job has the status that it would have over HTTP."""
        self.status = status
        self.outcome = outcome_of(status)

    def summary(self) -> dict[str, Any]:
        """Return the fields of the log line. Times are in seconds, without those in which the worker was frozen."""
        total, usage = max(self._waking_time() - self._clock, 0.0), self.usage.total()
        tokens, to_first = usage.completion_tokens, self._until(usage.first_token_at)
        decoding = total - to_first if to_first is not None and tokens > 1 else 0.0
        return {
            "request_id": self.request_id,
            "route": self.route,
            "adapter": usage.adapter,
            "key": self.key or None,
            "stream": self.stream,
            "modalities": {"text": 1, **usage.media},
            "input_tokens": usage.prompt_tokens,
            "output_tokens": tokens,
            "total_seconds": round(total, 4),
            "queue_seconds": _rounded(usage.queue_seconds),
            "ttft_seconds": _rounded(to_first),
            "tokens_per_second": round((tokens - 1) / decoding, 3) if decoding > 0 else None,
            "finish_reason": usage.finish_reason,
            "outcome": self.outcome,
            "status": self.status,
        }

    def _until(self, moment: float | None) -> float | None:
        return None if moment is None else max(moment - self.began - self.resumes.frozen(self.began, moment), 0.0)


class Telemetry:
    """The metrics of all jobs, and the records of those that run."""

    def __init__(
        self,
        model: str,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
        resumes: Resumes | None = None,
    ) -> None:
        self._model = model
        self._resumes = resumes or Resumes()
        self._clock = clock
        self.registry = registry
        # Does nothing until vLLM has set up tracing.
        self._tracer = trace.get_tracer("worker")
        self.running = self.ended = 0
        """Jobs that run or wait, and jobs that have ended; the lines of a batch count, too."""
        self._lines: set[Usage] = set()
        """Those of the lines of a batch that run."""
        self._last_caller = -float("inf")
        self.batches = BatchTelemetry(registry)
        self.last_error: dict[str, Any] | None = None
        """The last job that failed through no fault of its caller: its request id, time and status."""
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry, buckets=SECONDS)
        build = gauge("worker_build_info", "The version and the model; always 1.", ["version", "model"])
        build.labels(__version__, model).set(1)
        gauge("worker_jobs_running", "Jobs that run or wait in the engine.").set_function(lambda: self.running)
        self._jobs = counter("worker_jobs", "Jobs that have ended.", ["route", "outcome", "modality"])
        self._tokens = counter("worker_tokens", "Tokens of jobs.", ["direction", "adapter", "key"])
        self._adapters: set[str] = set()
        self._total = histogram("worker_job_seconds", "From a job's arrival to its end.")
        self._first = histogram("worker_time_to_first_token_seconds", "From a job's arrival to its first token.")
        self._queued = histogram("worker_queue_delay_seconds", "A job's wait in the engine's queue.")
        self._each = histogram(
            "worker_time_per_output_token_seconds", "Time of each token after a job's first.", buckets=TOKEN_SECONDS
        )
        self._fetched = histogram("worker_media_fetch_seconds", "Fetching a link to media.")
        self._fetched_bytes = counter("worker_media_fetched_bytes", "Media fetched by link.")
        self._rejected = counter("worker_media_rejected", "Media that were rejected.", ["reason"])
        self._media = counter("worker_media", "Images, videos and so on in prompts.", ["modality"])
        self.refused = counter("worker_refused", "HTTP requests refused before they reached the engine.", ["status"])
        self.stream_posts = counter("worker_stream_posts", "Parts of streams posted to RunPod's queue.")
        self._resumes.listen(counter("worker_resumes", "Times that the worker went on after it was frozen.").inc)

    @contextmanager
    def job(
        self, request_id: str, route: str, headers: Mapping[str, str], key: str = "", is_line: bool = False
    ) -> Iterator[Record]:
        """Keep the record of one job. The engine adds its requests within the block to the job's usage.

        `key` is the name of the caller's API key, out of those in the settings. `is_line`: it is a line of a batch.
        If `headers` name the caller's span, it becomes the parent of the job's span.
        """
        span = self._tracer.start_span("job", _PROPAGATOR.extract(headers), SpanKind.SERVER)
        # The job loop sets the usage of a queue job, to see when the job reaches the engine.
        record = Record(request_id, route, key, usage=current_usage.get() or Usage(), resumes=self._resumes)
        _PROPAGATOR.inject(record.trace_headers, trace.set_span_in_context(span))
        token = current_usage.set(record.usage)
        self.running += 1
        if is_line:
            self._lines.add(record.usage)
        try:
            yield record
        finally:
            self.running -= 1
            self.ended += 1
            if is_line:
                self._lines.remove(record.usage)
            else:
                self._last_caller = self._clock()
            current_usage.reset(token)
            span.set_attributes({"request_id": request_id, "route": record.route, "outcome": record.outcome})
            span.end()
            self._report(record, logging.DEBUG if is_line else logging.INFO)

    @property
    def lines(self) -> int:
        """The lines of a batch among the jobs that run."""
        return len(self._lines)

    @property
    def lines_in_engine(self) -> int:
        """Those of them that have reached the engine: the others are being fetched and decoded."""
        return sum(usage.has_reached_engine for usage in self._lines)

    @property
    def quiet_seconds(self) -> float:
        """Seconds since a job ran that is no line of a batch; 0 while one runs."""
        return 0.0 if self.running > self.lines else self._clock() - self._last_caller

    def _report(self, record: Record, level: int) -> None:
        summary = record.summary()
        media = {kind: count for kind, count in summary["modalities"].items() if kind != "text"}
        self._jobs.labels(record.route, record.outcome, "+".join(sorted(media)) or "text").inc()
        adapter = self._label_of(summary["adapter"] or "")
        for direction in ("input", "output"):
            self._tokens.labels(direction, adapter, record.key).inc(summary[f"{direction}_tokens"])
        self._total.observe(summary["total_seconds"])
        for histogram, name in ((self._first, "ttft_seconds"), (self._queued, "queue_seconds")):
            if (seconds := summary[name]) is not None:
                histogram.observe(seconds)
        if rate := summary["tokens_per_second"]:
            self._each.observe(1 / rate)
        for modality, count in media.items():
            self._media.labels(modality).inc(count)
        for fetch in record.usage.fetches:
            self._fetched.observe(fetch.seconds)
            self._fetched_bytes.inc(fetch.size)
        for reason in record.usage.rejections:
            self._rejected.labels(reason).inc()
        if record.outcome == "engine_error":
            self.last_error = {"request_id": record.request_id, "at": round(time.time()), "status": record.status}
        log.log(
            level,
            "Job %s %s after %.3f s, %d tokens in, %d out",
            record.request_id,
            record.outcome,
            summary["total_seconds"],
            summary["input_tokens"],
            summary["output_tokens"],
            extra={"model": self._model, **summary},
        )

    def _label_of(self, adapter: str) -> str:
        """Return an adapter's name for metrics. Callers may load any number of adapters, one after the other."""
        if len(self._adapters) < MAX_ADAPTERS:
            self._adapters.add(adapter)
        return adapter if adapter in self._adapters else OTHER


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
