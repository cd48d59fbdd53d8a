"""The one module that knows vLLM: the engine in this process, as an ASGI app.

`load()` runs before any event loop, so that the platform hears of a worker only once the model is there. `attach()`
runs in the loop that serves, once. Checked against vLLM 0.32.0; tests/test_drift.py names what this module leans on.
"""

import argparse
import asyncio
import base64
import functools
import io
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

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
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState

from worker import config
from worker.asgi import App, Request, exchange
from worker.errors import ConfigurationError, Json, StartupError
from worker.pace import Pace, paced
from worker.usage import Usage, metered

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
    """vLLM's client, which also counts the tokens of the calling job's requests and keeps its pace."""

    async def add_request(self, *args: Any, **kwargs: Any) -> RequestOutputCollector:
        collector = await super().add_request(*args, **kwargs)
        states = self._states(collector.request_id)
        if (meter := metered.get()) is not None:
            for index, state in enumerate(states):
                meter.add(functools.partial(_usage, 0 if index else state.prompt_len, state.detokenizer))
        if (pace := paced.get()) is not None and collector.aggregate:
            collector = _PacedCollector(collector, pace)
            for state in states:
                state.queue = collector
        return collector

    def _states(self, request_id: str) -> list[RequestState]:
        """Return the state of a request, or those of the n that answer one prompt."""
        parent = self.output_processor.parent_requests.get(request_id)
        states = map(self.output_processor.request_states.get, parent.child_requests if parent else [request_id])
        return [state for state in states if state is not None]


class _PacedCollector(RequestOutputCollector):
    """Gives a request's outputs at a job's pace: vLLM merges what comes in between. The last is given at once."""

    def __init__(self, taken_over: RequestOutputCollector, pace: Pace) -> None:
        super().__init__(RequestOutputKind.DELTA, taken_over.request_id)
        self._pace = pace
        self._ended = asyncio.Event()
        if taken_over.output is not None:
            self.put(taken_over.output)

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


def _usage(prompt_tokens: int, detokenizer: IncrementalDetokenizer | None) -> Usage:
    """Return a request's tokens so far; one that pools has nothing to detokenize."""
    return Usage(prompt_tokens, detokenizer.num_output_tokens() if detokenizer else 0)


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
