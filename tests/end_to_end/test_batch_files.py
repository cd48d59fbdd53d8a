"""OpenAI's client for files and batches against a worker in HTTP mode with the real engine."""

import json
from pathlib import Path

import openai
import pytest

from tests.conftest import API_KEY, TEAM_KEY, HttpWorker
from tests.support.batches import custom_ids
from tests.support.tiny_batches import (
    COMPLETIONS,
    LONG,
    chat,
    check_pictures,
    create_batch,
    ended_batch,
    line,
    pictures,
    wait_for_results,
)

COUNT = 20


@pytest.fixture
def api(http_worker: HttpWorker) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http_worker.url}/v1", api_key=API_KEY, timeout=60)


@pytest.fixture
def other(http_worker: HttpWorker) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http_worker.url}/v1", api_key=TEAM_KEY, timeout=60)


def test_openais_client_uploads_a_file_and_gets_its_results(
    api: openai.OpenAI, other: openai.OpenAI, tmp_path: Path, http_worker: HttpWorker
) -> None:
    batch_id = create_batch(api, [*pictures(COUNT), line("wrong", {"messages": "wrong"})])
    batch = ended_batch(api, batch_id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": COUNT + 1, "completed": COUNT, "failed": 1}
    output = tmp_path / "output.jsonl"
    api.files.content(batch.output_file_id or "").write_to_file(output)
    check_pictures(output, COUNT)
    (failed,) = map(json.loads, api.files.content(batch.error_file_id or "").text.splitlines())
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("wrong", 400)
    assert batch_id in [each.id for each in api.batches.list()]
    assert {batch.input_file_id, batch.output_file_id, batch.error_file_id} <= {each.id for each in api.files.list()}
    with pytest.raises(openai.NotFoundError):
        other.batches.retrieve(batch_id)
    with pytest.raises(openai.NotFoundError):
        other.files.content(batch.output_file_id or "")
    assert (list(other.files.list()), list(other.batches.list())) == ([], [])
    log = http_worker.log.read_text()
    assert f"Batch {batch_id} is completed." in log
    assert not [key for key in (API_KEY, TEAM_KEY) if key in log]


def test_a_batch_that_openais_client_cancels_has_the_lines_that_ended(
    api: openai.OpenAI, tmp_path: Path, http_worker: HttpWorker
) -> None:
    long = [line(f"long {number}", LONG, COMPLETIONS) for number in range(20)]
    batch_id = create_batch(api, [line("short", chat("Hello")), *long])
    wait_for_results(http_worker.log.parent / "batches", 1)
    assert api.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    batch = ended_batch(api, batch_id)
    assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("cancelled", 1)
    output = tmp_path / "output.jsonl"
    api.files.content(batch.output_file_id or "").write_to_file(output)
    assert custom_ids(output) == ["short"]
