"""One job from a file or the command line."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.queue import local
from worker.queue.handler import Job
from worker.queue.outputs import Left, Output, Progress


async def yields_two(job: Job) -> AsyncGenerator[Output, None]:
    yield f"one {job['input']}"
    yield {"two": 2, "error": None}


async def fails(_job: Job) -> AsyncGenerator[Output, None]:
    yield "one"
    yield {"error": "no"}


def test_the_output_lists_every_yield() -> None:
    result = asyncio.run(local.run(yields_two, {"id": "a", "input": 1}))
    assert result == {"id": "a", "status": "COMPLETED", "output": ["one 1", {"two": 2, "error": None}]}


def test_a_failed_job_has_its_error_and_no_output() -> None:
    assert asyncio.run(local.run(fails, {"id": "a", "input": 1})) == {"id": "a", "status": "FAILED", "error": "no"}


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "test_input.json"
    file.write_text('{"input": 1, "id": "file-job"}')
    assert local.read_job(None, file) == {"id": "file-job", "input": 1}
    assert local.read_job('{"input": 2}', file) == {"id": "local_test", "input": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{'input': 1}", "--test_input is not valid JSON: Expecting property name", id="single quotes"),
        pytest.param("[]", "--test_input must be a JSON object with the key 'input'", id="list"),
        pytest.param('{"prompt": "a"}', "must be a JSON object with the key 'input'", id="no input"),
        pytest.param("", "--test_input is not valid JSON", id="empty"),
    ],
)
def test_an_invalid_job_is_a_configuration_error(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        local.read_job(text)


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"test_input\.json is not in the current folder"):
        local.read_job(None, tmp_path / "test_input.json")


def test_the_repositorys_test_input_is_a_valid_job() -> None:
    assert local.read_job(None, Path(__file__).parents[2] / "test_input.json")["input"]


async def batch(_job: Job) -> AsyncGenerator[Output, None]:
    yield Progress({"percent": 50.0})
    yield {"completed": 2}


async def left(_job: Job) -> AsyncGenerator[Output, None]:
    yield Progress({"percent": 50.0})
    yield Left("the engine has died")


def test_progress_is_no_output() -> None:
    result = asyncio.run(local.run(batch, {"id": "a", "input": 1}))
    assert result == {"id": "a", "status": "COMPLETED", "output": [{"completed": 2}]}


def test_a_job_that_is_left_has_failed() -> None:
    result = asyncio.run(local.run(left, {"id": "a", "input": 1}))
    assert result == {"id": "a", "status": "FAILED", "error": "the engine has died"}
