"""The worker's parts, put together: everything that all modes need."""

import logging
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from worker import joining
from worker.batch.service import BatchService
from worker.cluster.cluster import Cluster, SingleMachine
from worker.cluster.link import PATIENCE_SECONDS
from worker.errors import Json, StartupError
from worker.http import batch_routes
from worker.http.gate import Gate
from worker.http.own_routes import OwnRoutes
from worker.lifecycle import Lifecycle
from worker.model import fit, preflight
from worker.model.compile_cache import CompileCache, key_of
from worker.model.load_format import LoadFormat
from worker.model.weights import Weights
from worker.request.asgi import App
from worker.request.pipeline import Pipeline
from worker.settings import Settings, environment
from worker.telemetry import gpu, logs
from worker.telemetry.jobs import Telemetry
from worker.telemetry.startup_phases import StartupPhases

if TYPE_CHECKING:
    from worker.engine import Engine, Headless

log = logging.getLogger(__name__)


class Worker:
    """One engine and everything around it. Load it outside of any event loop; attach it in the loop that serves."""

    def __init__(self, settings: Settings, cause_file: Path) -> None:
        self.settings = settings
        self._cause_file = cause_file
        self.is_importing = False
        """Whether vLLM is being imported. An exception of a signal's handler could then abort the process."""
        self.lifecycle = Lifecycle()
        self.telemetry = Telemetry(settings.model_name, resumes=self.lifecycle.resumes)
        self.startup_phases = StartupPhases()
        self.pipeline = Pipeline(settings, self.lifecycle, self.telemetry)
        self.cluster: Cluster = SingleMachine()
        """The other machines, from the beginning of `load` on."""
        self.own_routes = OwnRoutes(
            self.lifecycle,
            self.telemetry,
            settings,
            self.startup_phases,
            self.pipeline.memory,
            lambda: self.cluster.describe(),
        )
        self.batches = BatchService.of(settings, self.lifecycle)
        """The batches of HTTP callers; None without `BATCH_FOLDER`."""
        routes = batch_routes.routes(self.batches, settings)
        self.gate = Gate(self.own_routes, self.lifecycle, self.telemetry, settings, self.pipeline, batches=routes)
        self._engine: Engine | None = None
        self._headless: Headless | None = None
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
    def headless(self) -> "Headless":
        """A follower's part of the engine, once it is loaded."""
        if self._headless is None:
            raise RuntimeError("the follower's part of the engine is not loaded")
        return self._headless

    @property
    def concurrency(self) -> int:
        """The most requests at once."""
        return self.settings.concurrency(self.engine.current_load().capacity)

    def load(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Find the weights and load the engine. `meanwhile` runs in a thread while the engine's process loads.

        On several machines, all find each other first, and compare what they are about to load.

        Raises:
            StartupError: the engine cannot be loaded.
        """
        settings, phase = self.settings, self.startup_phases.phase
        self.cluster = joining.join(settings, self.lifecycle.stopping.is_set)
        with ExitStack() as stack:
            with phase("weights"):
                weights = Weights(settings)
                # Its process may read weights into the page cache until the engine has loaded them.
                stack.callback(weights.close)
                if weights.need_no_hub:
                    environment.go_offline()
            with phase("imports"):
                self.is_importing = True
                try:
                    from worker import engine
                finally:
                    self.is_importing = False
                args = engine.parse_arguments(settings)
            with phase("download"):
                folders = weights.folders()
                folder = next(iter(folders.values()))
            if settings.role is not None:
                with phase("other nodes"):
                    self.cluster.wait()
            with phase("configuration"):
                if (loader := self._place(args, folders)).may_fall_back:
                    # It reads the files itself.
                    weights.close()
            if settings.role is not None:
                with phase("other nodes"):
                    self.cluster.agree(engine.terms_of(args, folders, settings.role))
            with phase("compile cache"):
                self._compile_cache = self._open_compile_cache(partial(engine.compile_inputs, args, settings))
                restored = self._compile_cache is not None and self._compile_cache.restore()
            with phase("engine"):
                cause = partial(logs.first_cause, self._cause_file)
                if settings.is_follower:
                    self._headless = engine.Headless.load(args, settings, cause)
                else:
                    load = partial(engine.Engine.load, args, settings, meanwhile, cause)
                    self._engine, loader = engine.start_engine(loader, args, load, self._cause_file)
        gpu.register(self.telemetry.registry)
        source = "on disk" if weights.are_local else "downloaded"
        self._details = {"weights": f"{source}: {folder}", "load_format": str(loader), "compile_cache": restored}

    def _place(self, args: Namespace, folders: dict[str, Path]) -> LoadFormat:
        """Fit the arguments to the model in its folder and to the machines; return the loader of the weights."""
        from worker import engine

        settings, folder = self.settings, next(iter(folders.values()))
        gpus = gpu.visible(settings.libraries.visible_gpus)
        sizes = engine.place(args, settings, folders, gpus, self.cluster.addresses)
        if not settings.skip_fit_check and (planned := engine.plan(args)) is not None:
            fit.check(folder, planned, gpus)
        warnings = [*engine.remarks(settings)]
        warnings += preflight.warnings(settings.libraries.vllm_cache, args.tensor_parallel_size)
        if sizes is not None:
            log.info("This is %s. %s", settings.role, sizes.why)
            warnings += sizes.warnings
        for warning in warnings:
            log.warning(warning)
        return self._choose_loader(args, gpus)

    def _choose_loader(self, args: Namespace, gpus: list[Json]) -> LoadFormat:
        from worker import engine

        return engine.choose_loader(args, gpus)

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
        self.own_routes.engine = {**self.engine.describe(), "load_format": self._details.get("load_format")}
        self.gate.open(app, self.concurrency)
        self.lifecycle.ready(lambda: self.engine.is_dead)
        self.cluster.announce_ready()
        if self._compile_cache is not None:
            threading.Thread(target=self._compile_cache.save, name="compile cache", daemon=True).start()
        return app

    @contextmanager
    def cluster_first(self) -> Iterator[None]:
        """If the cluster is over, raise its problem instead of whatever ended the block: the end of it caused that.

        Raises:
            StartupError: the cluster is over.
        """
        try:
            yield
        except StartupError:
            self.cluster.check(PATIENCE_SECONDS)
            raise
        finally:
            self.cluster.check()

    def shutdown(self) -> None:
        """Announce that this node leaves, and end the engine's processes."""
        self.cluster.leave()
        self.end_engine()

    def end_engine(self) -> None:
        """End the engine's processes, if there are any."""
        for part in (self._engine, self._headless):
            if part is not None:
                part.shutdown()
