"""Errors of the file system in words. The files themselves are tested with the journal."""

import errno
import os
from pathlib import Path

import pytest

from worker.batch import output
from worker.errors import BatchOutputError, InvalidRequestError, JobError


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        pytest.param(errno.EROFS, InvalidRequestError, "its disk is read-only. Choose another path.", id="read-only"),
        pytest.param(errno.EACCES, InvalidRequestError, "the worker may not write there", id="no permission"),
        pytest.param(errno.ENOSPC, BatchOutputError, "the disk is full. Free some space", id="full disk"),
        pytest.param(errno.EDQUOT, BatchOutputError, "the disk is full. Free some space", id="used up quota"),
        pytest.param(errno.EIO, BatchOutputError, "Input/output error. Check the disk", id="broken disk"),
        pytest.param(errno.ESTALE, BatchOutputError, "Stale file handle. Check the disk", id="lost network volume"),
    ],
)
def test_errors_of_the_file_system_are_reported_in_words(number: int, kind: type[JobError], message: str) -> None:
    with pytest.raises(JobError) as failed, output.in_words(Path("/volume/OUT.jsonl")):
        raise OSError(number, os.strerror(number), "/volume/OUT.jsonl.part")
    assert type(failed.value) is kind
    assert message in str(failed.value)
    assert "'OUT.jsonl' cannot be written" in str(failed.value)
    assert "/volume" not in str(failed.value)


def test_other_errors_are_passed_on() -> None:
    with pytest.raises(ValueError, match="boom"), output.in_words(Path("OUT.jsonl")):
        raise ValueError("boom")
