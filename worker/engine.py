"""The one module that knows vLLM: the engine in this process, as an ASGI app.

`load()` runs before any event loop, so that the platform hears of a worker only once the model is there. `attach()`
runs in the loop that serves, once. Checked against vLLM 0.32.0; tests/test_drift.py names what this module leans on.
"""

import argparse
import asyncio
import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import vllm
from PIL import Image
from starlette.applications import Starlette
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import (
    BaseFrontendArgs,
    FrontendArgs,
    make_arg_parser,
    propagate_flash_late_interaction,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMError
from vllm.logger import configure_logging_from_args
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import RequestOutputKind
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
from vllm.v1.metrics.stats import RequestStateStats

from worker import config
from worker.asgi import App, Request, exchange
from worker.errors import ConfigurationError, Json, StartupError
from worker.meter import metered
from worker.pace import Pace, paced

log = logging.getLogger(__name__)

SERVER_FLAGS = frozenset(set(FrontendArgs.__dataclass_fields__) - set(BaseFrontendArgs.__dataclass_fields__))
"""Flags of vLLM's own HTTP server, which does not run here: host, port, API keys, TLS, CORS, …"""

DEATH_CHECK_SECONDS = 0.5
REFUSALS = (VLLMError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What vLLM raises when it cannot do what it is told."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, but a mistake is an exception and not the end of the process."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


class _Client(AsyncLLM):
    """vLLM's client, which also tells the calling job's meter of its requests and keeps its pace."""

    async def add_request(self, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> RequestOutputCollector:
        collector = await super().add_request(request_id, prompt, *args, **kwargs)
        meter, pace = metered.get(), paced.get()
        if meter is None:
            return collector
        paces = pace is not None and collector.aggregate
        collector = _PacedCollector(collector, pace) if paces and pace else _Collector(collector)
        states = self._states(collector.request_id)
        for state in states:
            state.queue = collector
        media = prompt.get("mm_placeholders", {}) if isinstance(prompt, dict) else {}
        meter.add(_Request(states, collector, {modality: len(items) for modality, items in media.items()}))
        return collector

    def _states(self, request_id: str) -> list[RequestState]:
        """Return the state of a request, or those of the n that answer one prompt."""
        parent = self.output_processor.parent_requests.get(request_id)
        states = map(self.output_processor.request_states.get, parent.child_requests if parent else [request_id])
        return [state for state in states if state is not None]


class _Collector(RequestOutputCollector):
    """Collects a request's outputs in the place of vLLM's own collector, and remembers why the request ended."""

    def __init__(self, taken_over: RequestOutputCollector) -> None:
        kind = RequestOutputKind.DELTA if taken_over.aggregate else RequestOutputKind.CUMULATIVE
        super().__init__(kind, taken_over.request_id)
        self.finish_reason: str | None = None
        if taken_over.output is not None:
            self.put(taken_over.output)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        super().put(output)
        if isinstance(output, RequestOutput) and output.finished and output.outputs:
            self.finish_reason = output.outputs[-1].finish_reason


class _PacedCollector(_Collector):
    """Gives a request's outputs at a job's pace: vLLM merges what comes in between. The last is given at once."""

    def __init__(self, taken_over: RequestOutputCollector, pace: Pace) -> None:
        self._pace = pace
        self._ended = asyncio.Event()
        super().__init__(taken_over)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        super().put(output)
        if isinstance(output, Exception) or output.finished:
            self._ended.set()

    def get_nowait(self) -> None:
        """Leave it to `get`, which keeps the pace."""

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        clock = asyncio.get_running_loop().time
        if not self._ended.is_set() and (seconds := self._pace.wait(clock())) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ended.wait()
        output = await super().get()
        self._pace.went(clock())
        return output


@dataclass(frozen=True, slots=True)
class _Request:
    """What vLLM knows of a request and, with n > 1, of its siblings; an `EngineRequest`.

    Times are there unless `DISABLE_LOG_STATS` is set; vLLM tells those of the queue by a clock of its own.
    """

    states: Sequence[RequestState]
    collector: _Collector
    media: Mapping[str, int]

    @property
    def prompt_tokens(self) -> int:
        return self.states[0].prompt_len if self.states else 0

    @property
    def completion_tokens(self) -> int:
        return sum(state.detokenizer.num_output_tokens() for state in self.states if state.detokenizer)

    @property
    def adapter(self) -> str | None:
        return self.states[0].lora_name if self.states else None

    @property
    def queue_seconds(self) -> float | None:
        waits = [stats.scheduled_ts - stats.queued_ts for stats in self._stats if stats.scheduled_ts]
        return max(waits, default=None)

    @property
    def first_token_at(self) -> float | None:
        times = [stats.arrival_time + stats.first_token_latency for stats in self._stats if stats.first_token_latency]
        return min(times, default=None)

    @property
    def finish_reason(self) -> str | None:
        return self.collector.finish_reason

    @property
    def _stats(self) -> list[RequestStateStats]:
        return [state.stats for state in self.states if state.stats]


class _Liveness:
    """What vLLM's error handlers take for their server: they set `should_exit` when the engine is dead."""

    should_exit = False


def parse_arguments(environ: Mapping[str, str], settings: config.Settings, model: Path) -> argparse.Namespace:
    """Return vLLM's arguments as the environment means them, for the snapshot in `model`.

    Raises:
        ConfigurationError: a value is refused by vLLM's parser or its checks.
    """
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
    arguments = config.engine_arguments(environ, settings, parser, SERVER_FLAGS)
    try:
        args: argparse.Namespace = parser.parse_args([f"--model={model}", *arguments])
        args.served_model_name = args.served_model_name or [settings.model_name]
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
    except (argparse.ArgumentError, *REFUSALS) as error:
        raise ConfigurationError(_sentence(error)) from error
    if (args.enable_log_requests or args.enable_log_outputs) and not settings.log_prompts:
        raise ConfigurationError(
            "ENABLE_LOG_REQUESTS and ENABLE_LOG_OUTPUTS write what users say to the log. "
            "Set LOG_PROMPTS=true if that is wanted; it implies both."
        )
    args.enable_log_requests = args.enable_log_outputs = settings.log_prompts
    args.otlp_traces_endpoint = settings.otlp_traces_endpoint
    # Keys are checked before a request comes here. None would have vLLM look for one in the environment.
    args.api_key = [""]
    # vLLM itself looks at this one only after the model has been loaded.
    reasoning_parsers = ReasoningParserManager.list_registered()
    if args.reasoning_parser and args.reasoning_parser not in reasoning_parsers:
        choice = ", ".join(reasoning_parsers)
        raise ConfigurationError(
            f"REASONING_PARSER={args.reasoning_parser!r}: no such parser; expected one of {choice}"
        )
    return args


class Engine:
    """A loaded model and, once attached, vLLM's API over it."""

    def __init__(self, client: AsyncLLM, args: argparse.Namespace) -> None:
        self.client = client
        self.args = args
        self._app: App | None = None
        self._liveness = _Liveness()
        self._attaching = asyncio.Lock()
        self._lifespan: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Engine":
        """Load the model: minutes for a large one. Call it outside of any event loop.

        Raises:
            ConfigurationError: vLLM refuses the combination of model and settings.
            StartupError: the engine did not start.
        """
        set_ulimit()
        engine_args = AsyncEngineArgs.from_cli_args(args)
        propagate_flash_late_interaction(args, engine_args)
        try:
            vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except REFUSALS as error:
            raise ConfigurationError(_sentence(error)) from error
        try:
            client = _Client.from_vllm_config(
                vllm_config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
                aggregate_engine_logging=args.aggregate_engine_logging,
            )
        except REFUSALS as error:
            raise StartupError(f"The engine did not start: {_sentence(error)}") from error
        return cls(client, args)

    @property
    def concurrency(self) -> int:
        """Jobs to take at once: twice what the engine runs, so that it always has a next one waiting."""
        return min(2 * self.client.vllm_config.scheduler_config.max_num_seqs, config.MAX_CONCURRENCY)

    @property
    def is_dead(self) -> bool:
        """Whether the engine can answer no more."""
        return self._liveness.should_exit or self.client.errored

    async def died(self) -> None:
        """Return once the engine is dead."""
        while not self.is_dead:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(DEATH_CHECK_SECONDS)

    async def attach(self) -> App:
        """Return vLLM's API as an ASGI app, built at the first call, in the loop that serves."""
        async with self._attaching:
            if self._app is None:
                app = await self._build_app()
                await self._warm_up(app)
                self._app = app
            return self._app

    async def _build_app(self) -> App:
        await self.client.reset_mm_cache()
        tasks = await self.client.get_supported_tasks()
        app = build_app(self.args, tasks, self.client.model_config)
        app.state.server = self._liveness
        try:
            await init_app_state(self.client, app.state, self.args, tasks)
        except REFUSALS as error:
            raise ConfigurationError(_sentence(error)) from error
        entered = asyncio.Event()
        self._lifespan = asyncio.create_task(_live(app, entered))
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
        if self._takes_images():
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

    def _takes_images(self) -> bool:
        processor = self.client.renderer.mm_processor
        return processor is not None and processor.info.allowed_mm_limits.get("image", 0) > 0

    def describe(self) -> Json:
        """Return what is worth knowing about the model and how it runs."""
        config_ = self.client.vllm_config
        model, parallel = config_.model_config, config_.parallel_config
        processor = self.client.renderer.mm_processor
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": torch.version.cuda},
            "served_names": self.args.served_model_name,
            "max_model_len": model.max_model_len,
            "max_num_seqs": config_.scheduler_config.max_num_seqs,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "media_limits": dict(processor.info.allowed_mm_limits) if processor else {},
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "pipeline_parallel_size": parallel.pipeline_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
        }

    def shutdown(self) -> None:
        """End the engine's processes."""
        self.client.shutdown(timeout=0)


async def _live(app: Starlette, entered: asyncio.Event) -> None:
    """Stay within the app's lifespan, which logs the engine's statistics, until the loop ends and cancels this."""
    async with app.router.lifespan_context(app):
        entered.set()
        await asyncio.Event().wait()


def _image_part() -> Json:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _json(body: Json) -> bytes:
    return json.dumps(body).encode()


def _sentence(error: Exception) -> str:
    """Return an exception's message on one line, pydantic's list of errors included."""
    if callable(errors := getattr(error, "errors", None)):
        return "; ".join(str(one["msg"]) for one in errors())
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return " ".join(text.split()) or type(error).__name__
