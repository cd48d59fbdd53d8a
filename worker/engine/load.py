"""vLLM's engine in this process, and its API over it as an ASGI app.

`load()` runs before any event loop, so that the platform hears of a worker only once the model is there. `attach()`
runs in the loop that serves, once.
"""

import argparse
import asyncio
import base64
import io
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

import torch
import vllm
from PIL import Image
from starlette.applications import Starlette
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM

from worker.engine import connector as media
from worker.engine.arguments import REFUSALS, changed, sentence
from worker.engine.client import Client, Silence
from worker.engine.startup_errors import failure, refusal
from worker.engine.versions import propagate_flash_late_interaction
from worker.errors import Json, StartupError
from worker.request.asgi import App, Request, exchange
from worker.settings.settings import MAX_CONCURRENCY, Settings

log = logging.getLogger(__name__)

DEATH_CHECK_SECONDS = 0.5
CHILD_CHECK_SECONDS = 0.02
SHUTDOWN_SECONDS = 1.0
"""For the engine's process to end by itself, which then leaves no shared memory behind."""
START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


class _Liveness:
    """What vLLM's error handlers take for their server: they set `should_exit` when the engine is dead."""

    should_exit = False


class Engine:
    """A loaded model and, once attached, vLLM's API over it."""

    def __init__(
        self, client: AsyncLLM, args: argparse.Namespace, guard: media.Guard, stall_seconds: float = float("inf")
    ) -> None:
        self.client = client
        self._silence = Silence(client)
        self._stall_seconds = stall_seconds
        self._guard = guard
        self.args = args
        self._app: App | None = None
        self._liveness = _Liveness()
        self._attaching = asyncio.Lock()
        self._lifespan: asyncio.Task[None] | None = None

    @classmethod
    def load(
        cls,
        args: argparse.Namespace,
        settings: Settings,
        meanwhile: Callable[[], object],
        cause: Callable[[], str | None] = lambda: None,
    ) -> "Engine":
        """Load the model: minutes for a large one. Call it outside of any event loop.

        `meanwhile` is done while the engine's process loads, in a thread. `cause` tells what went wrong first in the
        engine's processes.

        Raises:
            ConfigurationError: vLLM refuses the combination of model and settings, or the model does not fit.
            StartupError: the engine did not start for a reason that may pass.
        """
        if current_platform.is_unspecified():
            raise StartupError("vLLM sees no GPU. Give the container one (--gpus all), or use the image for CPUs.")
        set_ulimit()
        engine_args = AsyncEngineArgs.from_cli_args(args)
        propagate_flash_late_interaction(args, engine_args)
        method = os.environ.get(START_METHOD)
        try:
            vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except REFUSALS as error:
            raise refusal(error, sentence(error)) from error
        _fork_the_engine(method)
        ended = threading.Event()
        if vllm_config.parallel_config.data_parallel_size == 1:
            threading.Thread(target=_after_the_fork, args=(meanwhile, ended), daemon=True).start()
        try:
            client = Client.from_vllm_config(
                vllm_config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
                aggregate_engine_logging=args.aggregate_engine_logging,
            )
        except REFUSALS as error:
            raise failure(sentence(error), cause()) from error
        finally:
            ended.set()
        guard = media.guard(settings, args.allowed_media_domains)
        media.install(guard)
        # Without statistics a long prompt is read without a word.
        stall = float("inf") if args.disable_log_stats else settings.engine_stall_timeout
        return cls(client, args, guard, stall)

    @property
    def concurrency(self) -> int:
        """Jobs to take at once: twice what the engine runs, so that it always has a next one waiting."""
        settings = self.client.vllm_config
        at_once = settings.scheduler_config.max_num_seqs * settings.parallel_config.data_parallel_size
        return min(2 * at_once, MAX_CONCURRENCY)

    @property
    def is_dead(self) -> bool:
        """Whether the engine can answer no more."""
        return self._liveness.should_exit or self.client.errored or self._silence.seconds > self._stall_seconds

    async def died(self) -> None:
        """Return once the engine is dead, or has been silent for too long with requests before it."""
        while not self.is_dead:
            await asyncio.sleep(DEATH_CHECK_SECONDS)
            self._silence.pass_by(DEATH_CHECK_SECONDS)
        # An engine that speaks again now has lost its requests all the same.
        self._liveness.should_exit = True
        if self._silence.seconds > self._stall_seconds:
            log.error("The engine has been silent for %.0f s while requests wait", self._silence.seconds)

    async def attach(self) -> App:
        """Return vLLM's API as an ASGI app, built at the first call, in the loop that serves."""
        async with self._attaching:
            if self._app is None:
                app = media.watched(await self._build_app())
                await self._unless_dead(self._warm_up(app))
                self._app = app
            return self._app

    async def _unless_dead(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for the end of some work.

        Raises:
            StartupError: the engine has died before that.
        """
        working, dying = asyncio.create_task(work), asyncio.create_task(self.died())
        try:
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise StartupError("The engine died, or fell silent, in its first generation.")
            working.result()
        finally:
            working.cancel()
            dying.cancel()

    async def _build_app(self) -> App:
        await self.client.reset_mm_cache()
        tasks = await self.client.get_supported_tasks()
        app = build_app(self.args, tasks, self.client.model_config)
        app.state.server = self._liveness
        media.explain(app)
        media.Connector.loop = asyncio.get_running_loop()
        try:
            await init_app_state(self.client, app.state, self.args, tasks)
        except REFUSALS as error:
            raise refusal(error, sentence(error)) from error
        entered = asyncio.Event()
        self._lifespan = asyncio.create_task(_live(app, entered, self._guard))
        self._lifespan.add_done_callback(lambda _: entered.set())
        await entered.wait()
        if self._lifespan.done():
            self._lifespan.result()
        return app

    async def _warm_up(self, app: App) -> None:
        """Generate through the whole path, from text and from an image, so that no job meets it for the first time.

        Raises:
            StartupError: the engine fails.
        """
        calls: list[tuple[str, Json]] = [("/v1/completions", {"prompt": "Hello"})]
        if self._takes("video"):
            self._guard.decoders.prepare()
        if self._takes("image"):
            calls.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": [_image_part()]}]}))
        for path, body in calls:
            request = Request("POST", path, "", {"content-type": "application/json"}, _json({**body, "max_tokens": 2}))
            async with exchange(app, request) as response:
                answer = await response.read_all()
            if response.status >= 500:
                raise StartupError(f"The first generation failed: {answer.decode(errors='replace')[:1000]}")
            if response.status >= 400:
                # A model that does not generate, or has no chat template, is none the worse for it.
                log.info("No warm-up through %s: HTTP %d", path, response.status)

    def _takes(self, kind: str) -> bool:
        processor = self.client.renderer.mm_processor
        return processor is not None and processor.info.allowed_mm_limits.get(kind, 0) > 0

    def describe(self) -> Json:
        """Return what is worth knowing about the model and how it runs."""
        settings = self.client.vllm_config
        model, parallel = settings.model_config, settings.parallel_config
        processor = self.client.renderer.mm_processor
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
            "served_names": self.args.served_model_name,
            "max_model_len": model.max_model_len,
            "max_num_seqs": settings.scheduler_config.max_num_seqs,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "media_limits": dict(processor.info.allowed_mm_limits) if processor else {},
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "arguments": changed(self.args),
        }

    def shutdown(self) -> None:
        """End the engine's processes."""
        self.client.shutdown(timeout=SHUTDOWN_SECONDS)


def _fork_the_engine(method: str | None) -> None:
    """Have the engine's process forked, which saves it from importing everything again, unless the user says otherwise.

    vLLM itself spawns where a fork is not possible: where CUDA is in use already, on Ray, with NUMA binding. The CPU
    platform wants its own allocator and thread binding in the processes that compute, which only a fresh one can have.
    """
    if method:
        os.environ[START_METHOD] = method
        return
    os.environ[START_METHOD] = "fork"
    if current_platform.is_cpu():
        os.register_at_fork(after_in_child=lambda: os.environ.update({START_METHOD: "spawn"}))


def _after_the_fork(work: Callable[[], object], ended: threading.Event) -> None:
    """Work once the engine's process is there: a module that is being imported during a fork would be so for ever."""
    while not multiprocessing.active_children():
        if ended.wait(CHILD_CHECK_SECONDS):
            return
    work()


async def _live(app: Starlette, entered: asyncio.Event, guard: media.Guard) -> None:
    """Stay within the app's lifespan, which logs the engine's statistics, until the loop ends and cancels this."""
    async with app.router.lifespan_context(app), aclosing(guard):
        entered.set()
        await asyncio.Event().wait()


def _image_part() -> Json:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _json(body: Json) -> bytes:
    return json.dumps(body).encode()
