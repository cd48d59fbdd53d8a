"""The one form of log lines, as the handlers of `logging` write them."""

import io
import json
import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.telemetry import logs


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """Catch what the configured handler writes, and put `logging` back afterwards."""
    root = logging.getLogger()
    names = ("worker", "vllm", "runpod", logs.PROMPT_LOGGER, logs.LINK_LOGGER)
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names})
    yield io.StringIO()
    root.handlers[:], root.level = before[0], before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def configured(output: io.StringIO, form: logs.Format = "json", level: str = "INFO", log_prompts: bool = False) -> None:
    lines = logs.configuration(form, level, "INFO", log_prompts)
    json.dumps(lines)
    logging.config.dictConfig(lines)
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(output)


def parsed(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_line_is_one_object_with_its_fields(output: io.StringIO) -> None:
    configured(output)
    logging.getLogger("worker.test").info("Hello %s\nthere", "世界", extra={"tokens": 3})
    (line,) = parsed(output)
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "worker.test", "Hello 世界\nthere")
    assert line["tokens"] == 3
    assert line["timestamp"].endswith("+00:00")


def test_a_traceback_is_a_field(output: io.StringIO) -> None:
    configured(output)
    try:
        raise LookupError("what")
    except LookupError:
        logging.getLogger("worker.test").exception("It broke")
    (line,) = parsed(output)
    assert line["message"] == "It broke"
    assert line["traceback"].endswith("LookupError: what")


def test_text(output: io.StringIO) -> None:
    configured(output, "text")
    logging.getLogger("worker.test").warning("Hello")
    assert output.getvalue().startswith("WARNING ")
    assert output.getvalue().endswith(" worker.test: Hello\n")


def test_the_sdks_lines_have_the_form_and_their_jobs_id(output: io.StringIO) -> None:
    configured(output)
    logs.log_for_sdk(None, "Started.", "INFO", "job-1")
    logs.log_for_sdk(None, "100 % odd", "WARN")
    first, second = parsed(output)
    assert (first["logger"], first["message"], first["request_id"]) == ("runpod", "Started.", "job-1")
    assert (second["level"], second["message"]) == ("WARNING", "100 % odd")


@pytest.mark.parametrize("log_prompts", [True, False])
def test_only_log_prompts_lets_prompts_through(output: io.StringIO, log_prompts: bool) -> None:
    configured(output, level="DEBUG", log_prompts=log_prompts)
    logs.log_for_sdk(None, "a job's input", "DEBUG")
    logging.getLogger(logs.PROMPT_LOGGER).debug("a prompt")
    assert len(parsed(output)) == (2 if log_prompts else 0)


def test_a_link_to_media_is_not_told(output: io.StringIO) -> None:
    configured(output)
    logging.getLogger(logs.LINK_LOGGER).warning("HTTP fetch failed for https://host/image.png?key=secret")
    assert output.getvalue() == ""


def test_an_error_that_is_the_callers_own_is_answered_and_not_told(output: io.StringIO) -> None:
    class VLLMClientError(Exception):
        """What vLLM calls the base of such errors."""

    configured(output)
    for error in (VLLMClientError("a prompt"), RuntimeError("a fault")):
        try:
            raise error
        except (VLLMClientError, RuntimeError):
            logging.getLogger("vllm.test").exception("Error")
    (line,) = parsed(output)
    assert "a fault" in line["traceback"]


@pytest.mark.usefixtures("output")
def test_the_first_exception_of_any_process_is_written_down(tmp_path: Path) -> None:
    cause = tmp_path / "cause.txt"
    logging.config.dictConfig(logs.configuration("json", "INFO", "INFO", False, cause))
    logging.getLogger("vllm").error("No exception")
    for message in ("first\nline", "second"):
        try:
            raise ValueError(message)
        except ValueError:
            logging.getLogger("vllm.v1").exception("It broke")
    assert cause.read_text() == "ValueError: first line"
