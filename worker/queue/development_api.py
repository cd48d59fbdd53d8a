"""The SDK's test server (`--rp_serve_api`) with FAILED jobs. The SDK turns a generator's error into a KeyError."""

import threading
import uuid
from typing import Any

from fastapi.encoders import jsonable_encoder
from runpod.serverless.modules import rp_fastapi
from runpod.serverless.modules.rp_fastapi import DefaultRequest, JobOutput, StreamOutput

from worker.errors import Json
from worker.queue import local


class DevelopmentAPI(rp_fastapi.WorkerAPI):  # type: ignore[misc]
    """The SDK's server, with another way to run a job."""

    async def _sim_runsync(self, job_request: DefaultRequest) -> JobOutput:
        return await self._run(f"test-{uuid.uuid4()}", job_request.input, job_request.webhook)

    async def _sim_status(self, job_id: str) -> JobOutput:
        if (stashed := rp_fastapi.job_list.get(job_id)) is None:
            return {"id": job_id, "status": "FAILED", "error": "Job ID not found"}
        rp_fastapi.job_list.remove(job_id)
        return await self._run(job_id, stashed.input, stashed.webhook)

    async def _sim_stream(self, job_id: str) -> StreamOutput:
        result = await self._sim_status(job_id)
        chunks = [{"output": output} for output in result.pop("output", [])]
        return {**result, "stream": chunks}

    async def _run(self, job_id: str, job_input: Any, webhook: str | None) -> Json:
        result = await local.run(self.config["handler"], {"id": job_id, "input": job_input})
        if webhook:
            threading.Thread(target=rp_fastapi._send_webhook, args=(webhook, result), daemon=True).start()
        return jsonable_encoder(result)  # type: ignore[no-any-return]
