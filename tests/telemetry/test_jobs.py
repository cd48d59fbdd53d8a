"""The log line and the metrics of a job. The metrics are read with Prometheus' own parser."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from worker.resume import Resumes
from worker.telemetry.jobs import MAX_ADAPTERS, Telemetry, outcome_of
from worker.telemetry.usage import EngineUsage, Fetch, Usage, current_usage

Request = Callable[[], EngineUsage]


def request(**usage: Any) -> Request:
    """Return a request to the engine with a fixed usage."""
    return lambda: EngineUsage(**{"prompt_tokens": 7, "completion_tokens": 3, "finish_reason": "stop", **usage})


def logged(
    caplog: pytest.LogCaptureFixture, telemetry: Telemetry, *requests: Request, route: str = "/tokenize"
) -> dict[str, Any]:
    """Run a job with these requests to the engine, and return the fields of its log line."""
    with caplog.at_level(logging.INFO), telemetry.job("job-1", route, {}) as record:
        for each in requests:
            record.usage.add(each)
        record.ended_with(200)
    return vars(caplog.records[-1])


def samples(telemetry: Telemetry) -> dict[str, float]:
    """Return the values of all metrics by `NAME[LABELS]`."""
    families = text_string_to_metric_families(generate_latest(telemetry.registry).decode())
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_a_job_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    first = request(first_token_at=time.time() + 1, queue_seconds=0.25, media={"image": 2}, adapter="poet")
    line = logged(caplog, Telemetry("org/model", CollectorRegistry()), first, route="/v1/chat/completions")
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


def test_the_requests_of_a_job_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    requests = [request(media={"image": 1}, finish_reason=None), request(media={"video": 1}, finish_reason="length")]
    line = logged(caplog, Telemetry("m", CollectorRegistry()), *requests)
    assert (line["input_tokens"], line["output_tokens"], line["finish_reason"]) == (14, 6, "length")
    assert line["modalities"] == {"text": 1, "image": 1, "video": 1}


def test_tokens_are_counted_for_each_adapter_and_each_named_key(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    for key, adapter, tokens in (("ann", "poet", 1), ("ann", "poet", 2), ("ann", None, 4), ("", "poet", 8)):
        with caplog.at_level(logging.INFO), telemetry.job("job-1", "/tokenize", {}, key) as record:
            record.usage.add(request(adapter=adapter, completion_tokens=tokens))
        assert vars(caplog.records[-1])["key"] == (key or None)
    counted = {name: value for name, value in samples(telemetry).items() if "'output'" in name}
    assert counted == {
        "worker_tokens_total['ann', 'output', 'poet']": 3,
        "worker_tokens_total['', 'ann', 'output']": 4,
        "worker_tokens_total['', 'output', 'poet']": 8,
    }


def test_metrics_name_a_limited_number_of_adapters() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    for number in range(MAX_ADAPTERS + 10):
        with telemetry.job("job-1", "/tokenize", {}) as record:
            record.usage.add(request(adapter=f"org/adapter-{number}", completion_tokens=1))
    counted = {name: value for name, value in samples(telemetry).items() if "'output'" in name}
    assert len(counted) == MAX_ADAPTERS + 1
    assert counted["worker_tokens_total['', 'other', 'output']"] == 10


def test_a_job_without_a_status_was_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    with caplog.at_level(logging.INFO), telemetry.job("job-1", "/tokenize", {}):
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
    logged(caplog, telemetry, request(), route="/v1/responses/{id}/cancel")
    logged(caplog, telemetry, request(media={"video": 1, "image": 1}), route="/v1/chat/completions")
    logged(caplog, telemetry, route="control")
    metrics = samples(telemetry)
    assert metrics["worker_jobs_total['/v1/responses/{id}/cancel', 'ok', 'text']"] == 1
    assert metrics["worker_jobs_total['/v1/chat/completions', 'image+video', 'ok']"] == 1
    assert metrics["worker_jobs_total['control', 'ok', 'text']"] == 1
    assert metrics["worker_tokens_total['', '', 'input']"] == 14
    assert metrics["worker_tokens_total['', '', 'output']"] == 6
    assert metrics["worker_job_seconds_count[]"] == 3
    assert metrics["worker_jobs_running[]"] == 0


def test_the_last_error_is_kept_but_not_a_mistake_of_the_caller() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    for request_id, status in (("one", 500), ("two", 400)):
        with telemetry.job(request_id, "/tokenize", {}) as record:
            record.ended_with(status)
    assert telemetry.last_error is not None
    assert (telemetry.last_error["request_id"], telemetry.last_error["status"]) == ("one", 500)


def test_the_usage_of_a_job_without_requests_is_empty() -> None:
    assert Usage().total() == EngineUsage()


def test_downloads_and_rejected_media_are_counted() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    with telemetry.job("job-1", "/v1/chat/completions", {}) as record:
        record.usage.fetches += [Fetch(0.5, 100), Fetch(1.5, 200)]
        record.usage.rejections.append("too_large")
    metrics = samples(telemetry)
    assert (metrics["worker_media_fetch_seconds_count[]"], metrics["worker_media_fetch_seconds_sum[]"]) == (2, 2.0)
    assert metrics["worker_media_fetched_bytes_total[]"] == 300
    assert metrics["worker_media_rejected_total['too_large']"] == 1


def test_the_engine_finds_the_usage_of_the_job_in_its_context() -> None:
    with Telemetry("m", CollectorRegistry()).job("job-1", "/tokenize", {}) as record:
        assert current_usage.get() is record.usage


def test_a_line_of_a_batch_is_counted_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    with caplog.at_level(logging.INFO), telemetry.job("batch_req_a_1", "/tokenize", {}, is_line=True) as record:
        assert (telemetry.running, telemetry.lines, telemetry.lines_in_engine) == (1, 1, 0)
        record.usage.add(EngineUsage)
        assert telemetry.lines_in_engine == 1
        assert telemetry.quiet_seconds == float("inf")
        record.ended_with(200)
    assert not caplog.records
    assert samples(telemetry)["worker_jobs_total['/tokenize', 'ok', 'text']"] == 1


def test_other_jobs_end_the_quiet_time_for_batches() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    with telemetry.job("job-1", "/tokenize", {}):
        assert telemetry.quiet_seconds == 0
    assert 0 <= telemetry.quiet_seconds < 60


def test_the_metrics_of_the_batch_that_runs() -> None:
    telemetry = Telemetry("m", CollectorRegistry())
    telemetry.batches.current = {"total": None, "status": "starting"}
    telemetry.batches.ended(completed=3, failed=1)
    values = samples(telemetry)
    assert (values["worker_batch_total[]"], values["worker_batch_lines_total['failed']"]) == (0, 1)
    telemetry.batches.current = {"total": 10, "done": 4, "seconds_left": 60}
    values = samples(telemetry)
    names = ("total", "done", "seconds_left")
    assert [values[f"worker_batch_{name}[]"] for name in names] == [10, 4, 60]


def test_the_time_in_which_the_worker_was_frozen_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        # The freeze begins now.
        resumes = Resumes(lambda: time.time() + 60)
        telemetry = Telemetry("m", CollectorRegistry(), resumes=resumes)
        with caplog.at_level(logging.INFO), telemetry.job("job-1", "/tokenize", {}) as record:
            await asyncio.sleep(0.3)
            resumes.resumed(60)
            resumes.frozen_seconds -= 60  # The clock of this test has not jumped.
            record.usage.add(request(first_token_at=time.time() + 60, completion_tokens=2))
        line = vars(caplog.records[-1])
        assert 0.29 <= line["ttft_seconds"] < 60
        assert 0.29 <= line["total_seconds"] < 60
        assert samples(telemetry)["worker_resumes_total[]"] == 1

    asyncio.run(run())
