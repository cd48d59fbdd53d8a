"""vLLM's client, which also adds each request to the usage of its job, and sends its tokens at the job's pace."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
from vllm.v1.metrics.stats import SchedulerStats

from worker.engine.grammars import Grammars
from worker.memory import current_account
from worker.request.pace import Pace, current_pace
from worker.telemetry.usage import EngineLoad, EngineUsage, current_usage

MAX_PROMPTS = 2048
"""How many prompts a request may have. Clients send embeddings in batches of this size."""
MAX_BAD_WORDS = 100_000
"""How many characters all `bad_words` of a request may have together."""


class Client(AsyncLLM):
    """vLLM's client, which checks the grammar of each request, and replaces its collector if it belongs to a job."""

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self)

    @cached_property
    def _aborts(self) -> "Aborts":
        return Aborts(self.engine_core.abort_requests_async)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Abort requests, in one message with all others that are aborted just now."""
        ids = [request_id] if isinstance(request_id, str) else [*request_id]
        await self._aborts.send(self.output_processor.abort_requests(ids, internal))

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        usage, pace = current_usage.get(), current_pace.get()
        if usage is not None and usage.requests >= MAX_PROMPTS:
            raise VLLMValidationError(f"A request may have at most {MAX_PROMPTS} prompts. Send several requests.")
        if isinstance(params, SamplingParams):
            # vLLM tokenizes them in the event loop.
            if sum(map(len, params.bad_words or ())) > MAX_BAD_WORDS:
                raise VLLMValidationError(f"bad_words may have at most {MAX_BAD_WORDS} characters together.")
            if params.structured_outputs is not None:
                await self._grammars.check(params.structured_outputs)
        collector = await super().add_request(request_id, prompt, params, *args, **kwargs)
        if (account := current_account.get()) is not None:
            # The prompt has been processed: vLLM needs the files and their pixels no longer.
            account.give_back_media()
        if usage is None:
            return collector
        collector = PacedCollector(collector, pace) if pace and collector.aggregate else _Collector(collector)
        states = self._states(collector.request_id)
        for state in states:
            state.queue = collector
        usage.add(partial(_usage, states, collector, _media(prompt)))
        return collector

    def _states(self, request_id: str) -> list[RequestState]:
        """Return the state of a request. With `n` > 1 there is one for each answer."""
        parent = self.output_processor.parent_requests.get(request_id)
        states = map(self.output_processor.request_states.get, parent.child_requests if parent else [request_id])
        return [state for state in states if state is not None]


class Monitor:
    """What the engine reports with its outputs: that it is alive, and its load."""

    def __init__(self, client: AsyncLLM) -> None:
        self.reported = asyncio.Event()
        """Set at every output. Whoever waits for it clears it."""
        self._client = client
        self._silence: dict[int, float] = {}
        """How long each data-parallel engine has had requests without sending anything, not even statistics."""
        self._stats: dict[int, SchedulerStats] = {}
        """The last statistics of each data-parallel engine."""
        self._get = client.engine_core.get_output_async
        client.engine_core.get_output_async = self._get_and_note

    async def _get_and_note(self) -> EngineCoreOutputs:
        outputs: EngineCoreOutputs = await self._get()
        self._silence[outputs.engine_index] = 0.0
        if outputs.scheduler_stats:
            self._stats[outputs.engine_index] = outputs.scheduler_stats
        self.reported.set()
        return outputs

    def add(self, seconds: float) -> None:
        """Count the seconds that have passed. A clock would also count the time while the whole worker is frozen."""
        for engine, requests in enumerate(self._requests()):
            self._silence[engine] = self._silence.get(engine, 0.0) + seconds if requests else 0.0

    def longest_silence(self) -> tuple[int, float]:
        """Return the engine that has been silent for longest, and for how many seconds."""
        return max(self._silence.items(), key=itemgetter(1), default=(0, 0.0))

    def _requests(self) -> list[int]:
        """Return how many requests each engine has. Those that were just aborted may be included."""
        core: Any = self._client.engine_core
        unfinished = self._client.output_processor.get_num_unfinished_requests()
        if not hasattr(core, "engine_inflight"):
            return [unfinished]
        return [min(core.engine_inflight[name], unfinished) for name in core.core_engines]

    def load(self) -> EngineLoad:
        """Return the engine's load. With DISABLE_LOG_STATS, requests beyond its capacity count as waiting."""
        config = self._client.vllm_config
        capacity = config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size
        requests = self._client.output_processor.get_num_unfinished_requests()
        stats = self._stats.values()
        # The engine reports nothing after an abort that leaves it without requests.
        running = min(sum(each.num_running_reqs for each in stats) if stats else capacity, requests)
        waiting = min(sum(each.num_waiting_reqs for each in stats) if stats else requests, requests - running)
        kv_cache = sum(each.kv_cache_usage for each in stats) / len(stats) if stats and requests else 0.0
        return EngineLoad(capacity, requests, running, waiting, kv_cache)


class _Collector(RequestOutputCollector):
    """Collects a request's outputs like vLLM's collector, which it replaces, and keeps the finish reason."""

    def __init__(self, replaced: RequestOutputCollector) -> None:
        kind = RequestOutputKind.DELTA if replaced.aggregate else RequestOutputKind.CUMULATIVE
        super().__init__(kind, replaced.request_id)
        self.finish_reason: str | None = None
        if replaced.output is not None:
            self.put(replaced.output)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        super().put(output)
        if isinstance(output, RequestOutput) and output.finished and output.outputs:
            self.finish_reason = output.outputs[-1].finish_reason


class Aborts:
    """Sends the ids of requests that are aborted in the same moment together: the end of a batch aborts hundreds.

    One message for each would keep the engine's process busy for seconds.
    """

    def __init__(self, send: Callable[[list[str]], Awaitable[None]]) -> None:
        self._send = send
        self._ids: list[str] = []
        self._sending: asyncio.Task[None] | None = None

    async def send(self, ids: Iterable[str]) -> None:
        """Return once the ids were sent. They are sent also if this is cancelled."""
        self._ids += ids
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        await asyncio.shield(self._sending)

    async def _send_all(self) -> None:
        # Those that are aborted in the same moment come before this.
        await asyncio.sleep(0)
        ids, self._ids, self._sending = self._ids, [], None
        await self._send(ids)


class PacedCollector(_Collector):
    """Returns outputs at a job's pace; vLLM merges those that arrive in between. The last is returned at once."""

    def __init__(self, replaced: RequestOutputCollector, pace: Pace) -> None:
        self._pace = pace
        self._ended = asyncio.Event()
        super().__init__(replaced)

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        super().put(output)
        if isinstance(output, Exception) or output.finished:
            self._ended.set()

    def get_nowait(self) -> None:
        """Return nothing, so that vLLM calls `get`, which keeps the pace."""

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        clock = asyncio.get_running_loop().time
        if not self._ended.is_set() and (seconds := self._pace.wait(clock())) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._ended.wait()
        output = await super().get()
        self._pace.sent(clock())
        return output


def _media(prompt: Any) -> dict[str, int]:
    """Return how many media of each kind a prompt has. That of an encoder-decoder has them in its decoder's part."""
    if not isinstance(prompt, dict):
        return {}
    part = prompt.get("decoder_prompt", prompt)
    return {kind: len(items) for kind, items in part.get("mm_placeholders", {}).items()}


def _usage(states: Sequence[RequestState], collector: _Collector, media: Mapping[str, int]) -> EngineUsage:
    """Return the usage of a request so far, from vLLM's own objects; with DISABLE_LOG_STATS, without times."""
    stats = [state.stats for state in states if state.stats]
    # Both times of the wait are of a clock of vLLM's own.
    waits = [each.scheduled_ts - each.queued_ts for each in stats if each.scheduled_ts]
    first_tokens = [each.arrival_time + each.first_token_latency for each in stats if each.first_token_latency]
    return EngineUsage(
        prompt_tokens=states[0].prompt_len if states else 0,
        completion_tokens=sum(state.detokenizer.num_output_tokens() for state in states if state.detokenizer),
        media=media,
        adapter=states[0].lora_name if states else None,
        queue_seconds=max(waits, default=None),
        first_token_at=min(first_tokens, default=None),
        finish_reason=collector.finish_reason,
    )
