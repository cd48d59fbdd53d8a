"""The format of log lines, written by the handlers of `logging`."""

import io
import json
import logging
import logging.config
import struct
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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


def test_secrets_are_removed_from_message_traceback_and_extra_fields(output: io.StringIO) -> None:
    logging.config.dictConfig(logs.configuration("json", "INFO", "INFO", False, secrets=["s3cr3t", "123456"]))
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(output)
    try:
        raise ValueError("not s3cr3t")
    except ValueError:
        logging.getLogger("worker").exception("A %s", {"key": "s3cr3t"}, extra={"detail": "s3cr3t", "tokens": 123456})
    (line,) = parsed(output)
    assert "s3cr3t" not in output.getvalue()
    assert (line["message"], line["detail"], line["tokens"]) == ("A {'key': '***'}", "***", 123456)
    assert line["traceback"].endswith("ValueError: not ***")


def warn(name: str, number: int) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "library.py", number, "Warning %d", (number,), None)


def test_a_library_can_log_few_warnings_from_one_place() -> None:
    now = 0.0
    few = logs.FewWarnings(lambda: now)
    kept = [record for _ in range(65_000) if few.filter(record := warn("py.warnings", 1))]
    assert len(kept) == logs.FewWarnings.PER_MINUTE
    assert kept[-1].getMessage() == "Warning 1 (further ones are dropped for a minute)"
    assert few.filter(warn("py.warnings", 2))
    now = 60.0
    first, second = warn("py.warnings", 1), warn("py.warnings", 1)
    assert few.filter(first)
    assert few.filter(second)
    assert (first.getMessage(), second.getMessage()) == ("Warning 1 (64995 more were dropped)", "Warning 1")


def test_a_long_warning_of_a_library_is_shortened() -> None:
    record = logging.LogRecord("library", logging.WARNING, "library.py", 1, "x" * 1_000_000, None, None)
    assert logs.FewWarnings().filter(record)
    assert len(record.getMessage()) == logs.FewWarnings.CHARACTERS


@pytest.mark.parametrize(("name", "level"), [("worker.http", logging.WARNING), ("vllm", logging.INFO), ("vllm", 40)])
def test_the_workers_own_warnings_and_other_levels_are_not_limited(name: str, level: int) -> None:
    few = logs.FewWarnings()
    records = [logging.LogRecord(name, level, "file.py", 1, "Text", None, None) for _ in range(100)]
    assert all(map(few.filter, records))


def test_an_image_with_tens_of_thousands_of_warnings_writes_a_handful_of_lines(output: io.StringIO) -> None:
    configured(output)
    tags = 65_000
    # A TIFF whose tags each claim 2 GB of data. Pillow warns about every one.
    size = b"".join(struct.pack("<HHII", tag, 4, 1, 8) for tag in (256, 257))
    claims = b"".join(struct.pack("<HHII", tag, 2, 0x7FFFFFFF, 8) for tag in range(300, 300 + tags))
    file = b"II*\0" + struct.pack("<IH", 8, 2 + tags) + size + claims + bytes(4)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        try:
            with suppress(OSError, SyntaxError):
                Image.open(io.BytesIO(file))
        finally:
            logging.captureWarnings(capture=False)
    lines = parsed(output)
    assert len(lines) == logs.FewWarnings.PER_MINUTE
    assert "Skipping tag" in lines[0]["message"]


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
