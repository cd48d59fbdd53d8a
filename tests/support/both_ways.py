"""A worker that answers jobs from RunPod's queue, and requests over HTTP, with one engine of its own.

python -m tests.support.both_ways PORT
"""

import asyncio
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path


def main(port: int, folder: Path) -> int:
    """Run the worker until it is stopped."""
    import uvicorn

    from worker import modes
    from worker.http.gate import Gate
    from worker.main import configure
    from worker.request.asgi import App
    from worker.settings import environment, read_or_report
    from worker.worker import Worker

    class BothWays(Worker):
        """A worker for the queue that also opens a port."""

        async def attach(self) -> App:
            app = await super().attach()
            settings = self.settings.model_copy(update={"worker_mode": "http"})
            gate = Gate(self.own_routes, self.lifecycle, self.telemetry, settings, self.pipeline)
            gate.open(app, self.concurrency)
            server = uvicorn.Server(uvicorn.Config(gate, port=port, lifespan="off", log_config=None, ws="none"))
            # The queue's loop handles signals.
            setattr(server, "capture_signals", nullcontext)  # noqa: B010 - for mypy
            self.serving = asyncio.create_task(server.serve())
            return app

    settings, problem = read_or_report(environment.read())
    configure(settings, folder)
    return modes.run(modes.QueueMode(BothWays(settings, folder / "cause.txt")), problem)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(int(sys.argv[1]), Path(temporary)))
