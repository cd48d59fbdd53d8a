"""The worker's parts, put together: everything that all modes need."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from worker.errors import Json
from worker.http.gate import Gate
from worker.http.own_routes import OwnRoutes
from worker.lifecycle import Lifecycle
from worker.model import fit, preflight
from worker.model.compile_cache import CompileCache, key_of
from worker.model.weights import Weights
from worker.request.asgi import App
from worker.request.pipeline import Pipeline
from worker.settings import Settings, environment
from worker.telemetry import gpu
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import StartupPhases

if TYPE_CHECKING:
    from worker.engine import Engine

log = logging.getLogger(__name__)


class Worker:
    """One engine and everything around it. Load it outside of any event loop; attach it in the loop that serves."""

    def __init__(self, settings: Settings, cause_file: Path) -> None:
        self.settings = settings
        self._cause_file = cause_file
        self.lifecycle = Lifecycle()
        self.telemetry = Telemetry(settings.model_name)
        self.startup_phases = StartupPhases()
        self.pipeline = Pipeline(settings, self.lifecycle, self.telemetry)
        self.own_routes = OwnRoutes(self.lifecycle, self.telemetry, settings, self.startup_phases, self.pipeline.memory)
        self.gate = Gate(self.own_routes, self.lifecycle, self.telemetry, settings, self.pipeline)
        self._engine: Engine | None = None
        self._compile_cache: CompileCache | None = None
        self._details: Json = {}
        self.startup_phases.add("python", time.time() - psutil.Process().create_time())

    @property
    def engine(self) -> "Engine":
        """The engine, once it is loaded."""
        if self._engine is None:
            raise RuntimeError("the engine is not loaded")
        return self._engine

    @property
    def concurrency(self) -> int:
        """The most requests at once."""
        return self.settings.concurrency(self.engine.current_load().capacity)

    def load(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Find the weights and load the engine. `meanwhile` runs in a thread while the engine's process loads.

        Raises:
            StartupError: the engine cannot be loaded.
        """
        settings, phase = self.settings, self.startup_phases.phase
        with ExitStack() as stack:
            with phase("weights"):
                weights = Weights(settings)
                # Its process may read weights into the page cache until the engine has loaded them.
                stack.callback(weights.close)
                if weights.need_no_hub:
                    environment.go_offline()
            with phase("imports"):
                from worker.engine import Engine, compile_inputs, parse_arguments, place, plan, remarks

                args = parse_arguments(settings)
            with phase("download"):
                folders = weights.folders()
                folder = next(iter(folders.values()))
            with phase("configuration"):
                place(args, settings, folders)
                if not settings.skip_fit_check and (planned := plan(args)) is not None:
                    fit.check(folder, planned, gpu.visible(settings.libraries.visible_gpus))
                cache = settings.libraries.vllm_cache
                for warning in (*remarks(settings), *preflight.warnings(cache, args.tensor_parallel_size)):
                    log.warning(warning)
            with phase("compile cache"):
                self._compile_cache = self._open_compile_cache(partial(compile_inputs, args))
                restored = self._compile_cache is not None and self._compile_cache.restore()
            with phase("engine"):
                self._engine = Engine.load(args, settings, meanwhile, self._first_cause)
        gpu.register(self.telemetry.registry)
        source = "on disk" if weights.are_local else "downloaded"
        self._details = {"weights": f"{source}: {folder}", "compile_cache": restored}

    def _first_cause(self) -> str | None:
        """Return the first exception that one of the engine's processes has logged."""
        return self._cause_file.read_text() if self._cause_file.is_file() else None

    def _open_compile_cache(self, describe: Callable[[], Json]) -> CompileCache | None:
        """Return the compile cache on the network volume, or None if it is not used."""
        settings, volume = self.settings, self.settings.volume
        if settings.compile_cache == "off" or not volume.is_dir() or not (gpus := gpu.installed()):
            return None
        key = key_of({**describe(), "gpus": [device["name"] for device in gpus], "driver": gpu.driver()})
        folder, size = volume / "vllm-compile-cache", int(settings.compile_cache_gb * 1e9)
        return CompileCache(folder, key, settings.libraries.vllm_cache, size)

    async def attach(self) -> App:
        """Build the engine's routes and the worker's own as one ASGI app, and become ready. Call it once."""
        with self.startup_phases.phase("attach"):
            app = self.own_routes.over(await self.engine.attach(self.pipeline.memory))
        self.startup_phases.add("total", self.lifecycle.uptime + self.startup_phases.seconds["python"])
        self.startup_phases.report(**self._details)
        self.own_routes.engine = self.engine.describe()
        self.gate.open(app, self.concurrency)
        self.lifecycle.ready(lambda: self.engine.is_dead)
        if self._compile_cache is not None:
            threading.Thread(target=self._compile_cache.save, name="compile cache", daemon=True).start()
        return app

    def shutdown(self) -> None:
        """End the engine's processes, if there are any."""
        if self._engine is not None:
            self._engine.shutdown()
