"""What is told of a job, and that the exposition is one that Prometheus takes."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from worker.telemetry.jobs import Telemetry, outcome_of
from worker.telemetry.usage import Meter


@dataclass(frozen=True)
class Request:
    """An engine's request with figures of the test's own."""

    prompt_tokens: int = 7
    completion_tokens: int = 3
    media: Mapping[str, int] = field(default_factory=dict)
    adapter: str | None = None
    queue_seconds: float | None = None
    first_token_at: float | None = None
    finish_reason: str | None = "stop"


def told(caplog: pytest.LogCaptureFixture, telemetry: Telemetry, *requests: Request, path: str = "/tokenize") -> Any:
    with caplog.at_level(logging.INFO), telemetry.job("job-1", path) as record:
        for request in requests:
            record.meter.add(request)
        record.ended_with(200)
    return vars(caplog.records[-1])


def values(telemetry: Telemetry) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(telemetry.registry).decode())
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_a_job_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    first = Request(first_token_at=time.time() + 1, queue_seconds=0.25, media={"image": 2}, adapter="poet")
    line = told(caplog, Telemetry("org/model", CollectorRegistry()), first, path="/v1/chat/completions")
    assert line["message"].startswith("Job job-1 ok after 0.0")
    assert line["total_seconds"] < line["ttft_seconds"] <= 1
    expected = {
        "request_id": "job-1",
        "route": "/v1/chat/completions",
        "model": "org/model",
        "adapter": "poet",
        "modalities": {"text": 1, "image": 2},
        "input_tokens": 7,
        "output_tokens": 3,
        "queue_seconds": 0.25,
        "finish_reason": "stop",
        "outcome": "ok",
        "status": 200,
    }
    assert expected.items() <= line.items()


def test_several_requests_of_a_job_are_added_up(caplog: pytest.LogCaptureFixture) -> None:
    requests = [Request(media={"image": 1}, finish_reason=None), Request(media={"video": 1}, finish_reason="length")]
    line = told(caplog, Telemetry("m", CollectorRegistry()), *requests)
    assert (line["input_tokens"], line["output_tokens"], line["finish_reason"]) == (14, 6, "length")
    assert line["modalities"] == {"text": 1, "image": 1, "video": 1}


def test_a_job_that_nobody_ended_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    with caplog.at_level(logging.INFO), telemetry.job("job-1"):
        assert telemetry.running == 1
    assert telemetry.running == 0
    line = vars(caplog.records[-1])
    assert (line["outcome"], line["status"]) == ("cancelled", None)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "ok"), (400, "client_error"), (404, "client_error"), (504, "timeout"), (500, "engine_error")],
)
def test_outcomes(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome


def test_jobs_are_counted_by_route_outcome_and_modality(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    told(caplog, telemetry, Request(), path="/v1/responses/resp_1/cancel")
    told(caplog, telemetry, Request(media={"video": 1, "image": 1}), path="/v1/chat/completions")
    told(caplog, telemetry, path="/../etc/passwd")
    seen = values(telemetry)
    assert seen["worker_jobs_total['/v1/responses/{id}/cancel', 'ok', 'text']"] == 1
    assert seen["worker_jobs_total['/v1/chat/completions', 'image+video', 'ok']"] == 1
    assert seen["worker_jobs_total['control', 'ok', 'text']"] == 1
    assert seen["worker_tokens_total['input']"] == 14
    assert seen["worker_tokens_total['output']"] == 6
    assert seen["worker_job_seconds_count[]"] == 3
    assert seen["worker_jobs_running[]"] == 0


def test_the_last_failure_is_remembered_and_no_callers_mistake() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    for request_id, status in (("one", 500), ("two", 400)):
        with telemetry.job(request_id) as record:
            record.ended_with(status)
    assert telemetry.last_error is not None
    assert (telemetry.last_error["request_id"], telemetry.last_error["status"]) == ("one", 500)


def test_a_meter_without_requests_has_nothing_to_tell() -> None:
    meter = Meter()
    assert (meter.prompt_tokens, meter.completion_tokens, meter.media) == (0, 0, {})
    assert (meter.first_token_at, meter.queue_seconds, meter.finish_reason, meter.adapter) == (None,) * 4
