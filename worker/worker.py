"""The worker's parts, put together: what every mode needs, whichever way jobs arrive."""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from worker.errors import Json
from worker.http.own_routes import Monitor
from worker.lifecycle import Status
from worker.model import fit, preflight
from worker.model.compile_cache import CompileCache, key_of
from worker.model.weights import Weights
from worker.queue.handler import Service
from worker.request.asgi import App
from worker.settings.settings import Settings, cache_root
from worker.settings.sources import Sources
from worker.telemetry import gpu
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import Ledger

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from worker.engine import Engine


class Worker:
    """One engine, and what is told of it. Load it first, outside of any loop; attach it in the loop that serves."""

    def __init__(self, settings: Settings, sources: Sources, cause: Path) -> None:
        self.settings = settings
        self._cause = cause
        self._sources = sources
        self.status = Status()
        self.telemetry = Telemetry(settings.model_name)
        self.ledger = Ledger()
        self.monitor = Monitor(self.status, self.telemetry, settings, self.ledger)
        self._engine: Engine | None = None
        self._compiled: CompileCache | None = None
        self._restored = False
        self._weights = ""
        self._app: App | None = None
        self.ledger.enter("python", time.time() - psutil.Process().create_time())

    @property
    def engine(self) -> "Engine":
        """The engine; there is none before `load`."""
        if self._engine is None:
            raise RuntimeError("the engine is not loaded")
        return self._engine

    @property
    def concurrency(self) -> int:
        """Jobs to run at once."""
        return self.settings.max_concurrency or self.engine.concurrency

    def load(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Find the weights and load the engine; `meanwhile` is done in a thread while its process loads.

        Raises:
            StartupError: that cannot be done.
        """
        with ExitStack() as stack:
            with self.ledger.phase("weights"):
                found = Weights(self.settings, self._sources.values)
                # What still reads weights into the page cache goes on beside the engine, which wants them.
                stack.callback(found.close)
                if found.need_no_hub:
                    # Read once, when the Hub's library is imported.
                    os.environ.setdefault("HF_HUB_OFFLINE", "1")
            with self.ledger.phase("imports"):
                from worker.engine import Engine, compiles_alike, parse_arguments, place, plan, remarks

                args = parse_arguments(self._sources, self.settings)
            for remark in remarks(self._sources):
                log.warning(remark)
            with self.ledger.phase("download"):
                folders = found.folders()
                folder = next(iter(folders.values()))
            self._weights = f"{'on disk' if found.are_local else 'downloaded'}: {folder}"
            with self.ledger.phase("configuration"):
                place(args, self._sources, folders)
                if not self.settings.skip_fit_check and (planned := plan(args)) is not None:
                    fit.check(folder, planned, gpu.visible(self._sources.values))
                for warning in preflight.warnings(cache_root(self._sources.values), args.tensor_parallel_size):
                    log.warning(warning)
            self._compiled = self._compile_cache(partial(compiles_alike, args))
            if self._compiled is not None:
                with self.ledger.phase("compile cache"):
                    self._restored = self._compiled.restore()
            with self.ledger.phase("engine"):
                self._engine = Engine.load(args, self.settings, meanwhile, self._first_cause)
        gpu.register(self.telemetry.registry)

    def _first_cause(self) -> str | None:
        """Return what went wrong first, as the engine's processes have written it down."""
        return self._cause.read_text() if self._cause.is_file() else None

    def _compile_cache(self, about: Callable[[], Json]) -> CompileCache | None:
        volume = Path(self.settings.base_path)
        if self.settings.compile_cache == "off" or not volume.is_dir() or not (gpus := gpu.installed()):
            return None
        key = key_of({**about(), "gpus": [one["name"] for one in gpus], "driver": gpu.driver()})
        local = cache_root(self._sources.values)
        return CompileCache(volume / "vllm-compile-cache", key, local, int(self.settings.compile_cache_gb * 1e9))

    async def attach(self) -> App:
        """Return the worker's API as an ASGI app; it is made at the first call, in the loop that serves."""
        if self._app is None:
            began = time.monotonic()
            app = await self.engine.attach()
            if self._app is None:
                self.ledger.enter("attach", time.monotonic() - began)
                self.ledger.enter("total", self.status.uptime + self.ledger.seconds["python"])
                self.ledger.tell(weights=self._weights, compile_cache=self._restored)
                self.status.ready(self.engine.describe(), lambda: self.engine.is_dead)
                self._app = self.monitor.over(app)
                if self._compiled is not None:
                    threading.Thread(target=self._compiled.save, name="compile cache", daemon=True).start()
        return self._app

    def service(self) -> Service:
        """Return what answers jobs."""
        return Service(self.attach, self.settings, self.telemetry, lambda: self.status.state == "dead")

    def shutdown(self) -> None:
        """End the engine's processes, if there are any."""
        if self._engine is not None:
            self._engine.shutdown()
