"""Runs one job without RunPod, from `--test_input` or from test_input.json."""

import json
from pathlib import Path
from typing import Any

from worker.errors import ConfigurationError, Json
from worker.queue.handler import Handler, Job
from worker.queue.outputs import Left, Progress

JOB_ID = "local_test"


def read_job(test_input: str | None, file: Path = Path("test_input.json")) -> Job:
    """Return the job in `test_input`, or else in `file`.

    Raises:
        ConfigurationError: it is not a JSON object with an `input`.
    """
    source = "--test_input" if test_input is not None else str(file)
    try:
        job = json.loads(test_input if test_input is not None else file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(
            f"{file} is not in the current folder. Write one, pass --test_input '{{\"input\": …}}', "
            "or set RUNPOD_WEBHOOK_GET_JOB as RunPod does."
        ) from None
    except ValueError as error:
        raise ConfigurationError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(job, dict) or "input" not in job:
        raise ConfigurationError(f"{source} must be a JSON object with the key 'input'.")
    return {"id": JOB_ID, **job}


async def run(handler: Handler, job: Job) -> Json:
    """Run a job to its end and return what RunPod's `/status` would return."""
    outputs: list[Any] = []
    async for output in handler(job):
        if isinstance(output, Progress):
            continue
        if isinstance(output, Left):
            return {"id": job["id"], "status": "FAILED", "error": output.reason}
        if isinstance(output, dict) and output.get("error"):
            return {"id": job["id"], "status": "FAILED", "error": output["error"]}
        outputs.append(output)
    return {"id": job["id"], "status": "COMPLETED", "output": outputs}
