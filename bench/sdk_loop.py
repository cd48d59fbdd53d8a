"""The worker under the SDK's own job loop, for comparison: `python -m bench.sdk_loop`, with the worker's variables."""

import os
import sys
import tempfile
from pathlib import Path

from worker import modes
from worker.main import configure
from worker.queue.handler import JobHandler
from worker.settings import environment, read
from worker.worker import Worker


class SdkLoopMode(modes.QueueMode):
    """Jobs from the queue, taken by the SDK's loop, which attaches the engine at the first job."""

    def serve(self) -> int:
        """Answer jobs until the worker is stopped."""
        from worker.queue import sdk

        worker = self.worker
        job_handler = JobHandler(modes.attached_later(worker), worker.pipeline, worker.settings)
        sdk.start(job_handler.handle, worker.concurrency)
        return 0


def main() -> int:
    """Run the worker until it is stopped."""
    with tempfile.TemporaryDirectory() as folder:
        settings = read(environment.read())
        configure(settings, Path(folder))
        return modes.run(SdkLoopMode(Worker(settings, Path(folder) / "cause.txt")), None)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
