"""The loaded engine, and vLLM's API over it as an ASGI app."""

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from types import SimpleNamespace

from starlette.applications import Starlette
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.v1.engine.async_llm import AsyncLLM

from worker import race
from worker.engine import description, media_errors, patches, pooling, speech, validation
from worker.engine.adapters import Adapters
from worker.engine.client import Monitor
from worker.engine.connector import OPENCV, Guard
from worker.engine.documents import rewriting_documents
from worker.engine.load import FirstCause, Work, load
from worker.engine.startup_errors import translated
from worker.errors import Json, NotOfThisModelError, StartupError
from worker.media.fetch import Policy
from worker.memory import Budget
from worker.request.asgi import App, Message, Receive, Request, Send, exchange
from worker.request.links import LinkedInputs
from worker.request.pipeline import send_error
from worker.request.rewrite import Rewrite, rewriting
from worker.settings import Settings
from worker.telemetry.usage import EngineLoad

log = logging.getLogger(__name__)

DEATH_CHECK_SECONDS = 0.5
SHUTDOWN_SECONDS = 1.0
"""The time for the engine process to end by itself. Only then does it leave no shared memory behind."""
DECODERS = {"video": "cv2", "audio": "av"}
"""The library that decodes each kind of media; Pillow decodes images."""
WARM_UPS: dict[str, tuple[str, Json]] = {
    "generate": ("/v1/completions", {"prompt": "Hello", "max_tokens": 2}),
    "embed": ("/v1/embeddings", {"input": "Hello"}),
    "classify": ("/classify", {"input": "Hello"}),
}
"""The route and the body of a first request for each of vLLM's tasks."""
BLACK_IMAGE = "data:image/webp;base64,UklGRiAAAABXRUJQVlA4TBQAAAAvP8APAAcQEf0PAAnh/3stov+pHw=="


class Engine:
    """A loaded model and, once attached, vLLM's API over it."""

    def __init__(self, client: AsyncLLM, args: Namespace, settings: Settings) -> None:
        self._client = client
        self._args = args
        self._settings = settings
        self._monitor = Monitor(client)
        # With DISABLE_LOG_STATS the engine sends nothing while it reads a long prompt.
        self._stall_seconds = float("inf") if args.disable_log_stats else settings.engine_stall_timeout
        # Takes the place of uvicorn's server: vLLM's error handlers set `should_exit` when the engine is dead.
        self._liveness = SimpleNamespace(should_exit=False)
        self._lifespan: asyncio.Task[None] | None = None
        self._adapters: Adapters | None = None
        self._later: asyncio.Task[None] | None = None
        """Warm-up that jobs need not wait for."""

    @classmethod
    def load(cls, args: Namespace, settings: Settings, meanwhile: Work, first_cause: FirstCause) -> "Engine":
        """Load the model. Call it outside any event loop: the platform sees the worker only once the model is loaded.

        `meanwhile` is called in a thread while the engine process loads.

        Raises:
            ConfigurationError: the model and the settings do not match, or the model does not fit into memory.
            StartupError: the engine did not start, but another attempt may succeed.
        """
        return cls(load(args, settings, meanwhile, first_cause), args, settings)

    @property
    def reported(self) -> asyncio.Event:
        """Set at every output of the engine. Whoever waits for it clears it."""
        return self._monitor.reported

    def current_load(self) -> EngineLoad:
        """Return how many requests the engine has, how many of them wait, and how full its KV cache is."""
        return self._monitor.load()

    @property
    def has_priorities(self) -> bool:
        """Whether requests are scheduled by their priority (`SCHEDULING_POLICY=priority`)."""
        return bool(self._client.vllm_config.scheduler_config.policy == "priority")

    @property
    def is_dead(self) -> bool:
        """Whether the engine cannot answer any more."""
        return self._liveness.should_exit or self._client.errored or self._stalled_engine is not None

    @property
    def _stalled_engine(self) -> str | None:
        """The engine that counts as dead because of its silence, in words; None: there is none."""
        engine, seconds = self._monitor.longest_silence()
        if seconds <= self._stall_seconds:
            return None
        parallel = self._client.vllm_config.parallel_config
        node = engine // parallel.data_parallel_size_local * parallel.nnodes_within_dp
        place = f" on node {node}" if parallel.nnodes > 1 else ""
        return f"engine {engine}{place}" if parallel.data_parallel_size > 1 else "the engine"

    async def died(self) -> None:
        """Wait until the engine is dead, or has been silent for ENGINE_STALL_TIMEOUT although requests wait."""
        while not self.is_dead:
            await asyncio.sleep(DEATH_CHECK_SECONDS)
            self._monitor.add(DEATH_CHECK_SECONDS)
        # An engine that resumes after its silence stays dead: its requests have failed.
        self._liveness.should_exit = True
        if (stalled := self._stalled_engine) is not None:
            log.error(
                "ENGINE_STALL_TIMEOUT: %s has been silent for %.0f s while requests wait", stalled, self._stall_seconds
            )

    @property
    def link_policy(self) -> Policy:
        """Which links requests may name."""
        return Policy.of(self._settings, self._args.allowed_media_domains)

    async def attach(self, memory: Budget) -> App:
        """Build vLLM's API as an ASGI app and test it. Call it once, in the loop that serves.

        Requests take the memory for their media from `memory`.

        Raises:
            ConfigurationError: vLLM's API does not support the settings.
            StartupError: the engine failed at its first generation.
        """
        guard = self._guard(memory)
        patches.install(guard)
        app = await self._build_app(guard)
        tasks = await self._client.get_supported_tasks()
        for rewrite in self._rewrites(guard, tasks):
            app = rewriting(app, rewrite)
        # Outside of it, so that errors name the parts of the input behind a link.
        app = rewriting(media_errors.keep_bodies(app), LinkedInputs(self.link_policy, self._settings).rewrite)
        if self._media_limits:
            await guard.decoders.pool.prepare()
        (await race.first(self._warm_up(app, tasks), self._fail_when_dead())).result()
        if "generate" in tasks:
            self._later = asyncio.create_task(_generate_structured(app))
        return app

    def _rewrites(self, guard: Guard, tasks: Iterable[str]) -> list[Rewrite]:
        """Return what changes requests before vLLM parses them. The last one sees a request first."""
        rewrites = [rewriting_documents(guard, self._media_limits.get("image", 0))]
        if "transcription" in tasks:
            rewrites.append(speech.rewriting_json(guard))
        return rewrites

    def _guard(self, memory: Budget) -> Guard:
        """Return the guard for this model's media. Its processes import only the libraries that the model needs."""
        modules = [library for kind, library in DECODERS.items() if self._media_limits.get(kind)]
        video = (self._args.media_io_kwargs or {}).get("video", {})
        backend, folder = video.get("backend", OPENCV), self._args.allowed_local_media_path
        return Guard(self._settings, memory, self.link_policy, backend, modules, Path(folder) if folder else None)

    async def _build_app(self, guard: Guard) -> App:
        await self._client.reset_mm_cache()
        tasks = await self._client.get_supported_tasks()
        app = build_app(self._args, tasks, self._client.model_config)
        app.state.server = self._liveness
        app.router.default = _answer_not_of_this_model
        media_errors.add_handlers(app)
        validation.fail_fast(app)
        with translated():
            await init_app_state(self._client, app.state, self._args, tasks)
        speech.replace_decoding(app.state, guard)
        pooling.prepare_in_threads(app.state)
        entered = asyncio.Event()
        self._lifespan = asyncio.create_task(_run_lifespan(app, entered, guard))
        if (winner := await race.first(self._lifespan, entered.wait())) is self._lifespan:
            winner.result()
        if self._args.enable_lora and self._settings.lora_allow:
            self._adapters = Adapters(self._client, app, Path(self._args.model), self._settings)
            return self._adapters.over(app)
        return app

    async def _warm_up(self, app: App, tasks: Iterable[str]) -> None:
        """Answer a text and an image, so that no job has to wait for work that is done only once."""
        for task, request in WARM_UPS.items():
            if task in tasks:
                await _answer(app, *request)
        if "generate" in tasks and self._media_limits.get("image"):
            content = [{"type": "image_url", "image_url": {"url": BLACK_IMAGE}}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            await _answer(app, "/v1/chat/completions", body)

    async def _fail_when_dead(self) -> None:
        await self.died()
        raise StartupError("The engine died, or stopped answering, during its first generation.")

    @property
    def _media_limits(self) -> dict[str, int]:
        """How many parts of each kind a request may have; empty for a text model."""
        processor = self._client.renderer.mm_processor
        return dict(processor.info.allowed_mm_limits) if processor else {}

    def describe(self) -> Json:
        """Return facts about the model and how it runs, for `/info`."""
        return {**description.of_engine(self._client.vllm_config, self._args), "media_limits": self._media_limits}

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._client.shutdown(timeout=SHUTDOWN_SECONDS)
        if self._adapters is not None:
            self._adapters.close()


async def _answer_not_of_this_model(scope: Message, _receive: Receive, send: Send) -> None:
    """Answer a request for a route that vLLM has for other models only."""
    await send_error(send, NotOfThisModelError(scope["path"]))


async def _run_lifespan(app: Starlette, entered: asyncio.Event, guard: Guard) -> None:
    """Keep the app's lifespan, which logs the engine's statistics, and `guard` open until this task is cancelled."""
    async with app.router.lifespan_context(app), aclosing(guard):
        entered.set()
        await asyncio.Event().wait()


async def _answer(app: App, path: str, body: Json) -> None:
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    async with exchange(app, Request("POST", path, headers=headers, body=data)) as response:
        answer = await response.read_all()
    if response.status >= 500:
        raise StartupError(f"The first generation failed: {answer.decode(errors='replace')[:1000]}")
    if response.status >= 400:
        # Some models have no chat template.
        log.info("No warm-up through %s: HTTP %d", path, response.status)


async def _generate_structured(app: App) -> None:
    """Have vLLM create xgrammar's compiler, which takes about a second for a large vocabulary.

    vLLM keeps the library that its first request with structured output needs. A caller's rare schema could make that
    another library, which then refuses most grammars of all later requests.
    """
    with suppress(StartupError):
        body = {"prompt": "Hello", "max_tokens": 2, "structured_outputs": {"choice": ["a"]}}
        await _answer(app, "/v1/completions", body)
