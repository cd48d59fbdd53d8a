"""The format of log lines, written by the handlers of `logging`."""

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
    """The output of the configured handler. The configuration of `logging` is restored afterwards."""
    root = logging.getLogger()
    names = ("worker", "vllm", "runpod", logs.PROMPT_LOGGER, logs.LINK_LOGGER)
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names})
    yield io.StringIO()
    root.handlers[:], root.level = before[0], before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def configured(output: io.StringIO, form: logs.Format = "json", level: str = "INFO", log_prompts: bool = False) -> None:
    configuration = logs.configuration(form, level, "INFO", log_prompts)
    # vLLM reads it from a JSON file.
    logging.config.dictConfig(json.loads(json.dumps(configuration)))
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(output)


def parsed(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_line_is_one_json_object(output: io.StringIO) -> None:
    configured(output)
    logging.getLogger("worker.test").info("Hello %s\nthere", "世界", extra={"tokens": 3})
    (line,) = parsed(output)
    assert (line["level"], line["logger"], line["message"]) == ("INFO", "worker.test", "Hello 世界\nthere")
    assert line["tokens"] == 3
    assert line["timestamp"].endswith("+00:00")


def test_a_traceback_is_a_field(output: io.StringIO) -> None:
    configured(output)
    try:
        raise LookupError("missing")
    except LookupError:
        logging.getLogger("worker.test").exception("It broke")
    (line,) = parsed(output)
    assert line["message"] == "It broke"
    assert line["traceback"].endswith("LookupError: missing")


def test_lines_as_text(output: io.StringIO) -> None:
    configured(output, "text")
    logging.getLogger("worker.test").warning("Hello")
    assert output.getvalue().startswith("WARNING ")
    assert output.getvalue().endswith(" worker.test: Hello\n")


def test_lines_of_the_sdk_have_the_same_format_and_the_id_of_the_job(output: io.StringIO) -> None:
    configured(output)
    logs.log_for_sdk(None, "Started.", "INFO", "job-1")
    logs.log_for_sdk(None, "100 % odd", "WARN")
    first, second = parsed(output)
    assert (first["logger"], first["message"], first["request_id"]) == ("runpod", "Started.", "job-1")
    assert (second["level"], second["message"]) == ("WARNING", "100 % odd")


@pytest.mark.parametrize("log_prompts", [True, False])
def test_prompts_are_logged_only_with_log_prompts(output: io.StringIO, log_prompts: bool) -> None:
    configured(output, level="DEBUG", log_prompts=log_prompts)
    logs.log_for_sdk(None, "a job's input", "DEBUG")
    logging.getLogger(logs.PROMPT_LOGGER).debug("a prompt")
    assert len(parsed(output)) == (2 if log_prompts else 0)


def test_links_to_media_are_not_logged(output: io.StringIO) -> None:
    configured(output)
    logging.getLogger(logs.LINK_LOGGER).warning("HTTP fetch failed for https://host/image.png?key=secret")
    assert output.getvalue() == ""


def test_mistakes_of_callers_are_not_logged(output: io.StringIO) -> None:
    class VLLMClientError(Exception):
        """An error with the name of vLLM's base class for mistakes of callers."""

    configured(output)
    for error in (VLLMClientError("a prompt"), RuntimeError("a fault")):
        try:
            raise error
        except (VLLMClientError, RuntimeError):
            logging.getLogger("vllm.test").exception("Error")
    (line,) = parsed(output)
    assert "a fault" in line["traceback"]


@pytest.mark.usefixtures("output")
def test_the_first_exception_is_written_to_the_cause_file(tmp_path: Path) -> None:
    cause = tmp_path / "cause.txt"
    logging.config.dictConfig(logs.configuration("json", "INFO", "INFO", False, cause))
    logging.getLogger("vllm").error("No exception")
    for message in ("first\nline", "second"):
        try:
            raise ValueError(message)
        except ValueError:
            logging.getLogger("vllm.v1").exception("It broke")
    assert cause.read_text() == "ValueError: first line"


def test_the_traceback_of_an_error_has_its_causes_but_no_messages() -> None:
    prompt = "my secret"
    try:
        try:
            raise ValueError(prompt)
        except ValueError as cause:
            raise LookupError(prompt) from cause
    except LookupError as error:
        traceback = logs.frames(error)
    assert prompt not in traceback
    assert {"ValueError", "LookupError"} <= set(traceback.splitlines())
