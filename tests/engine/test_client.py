"""The collector of outputs, which keeps a job's pace, and the engine's load. The running engine tests the client."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.stats import SchedulerStats

from worker.engine.client import Aborts, Monitor, PacedCollector
from worker.request.pace import Pace
from worker.telemetry.usage import EngineLoad


def output(text: str, finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(0, text, [ord(letter) for letter in text], None, None)
    return RequestOutput("request", "prompt", [1], None, [completion], finished)


def collector(pace: Pace, *early: RequestOutput) -> PacedCollector:
    """Return a collector that replaces one with outputs already."""
    replaced = RequestOutputCollector(RequestOutputKind.DELTA, "request")
    for each in early:
        replaced.put(each)
    return PacedCollector(replaced, pace)


async def next_text(paced: PacedCollector) -> str:
    async with asyncio.timeout(10):
        result = await paced.get()
    assert isinstance(result, RequestOutput)
    return result.outputs[0].text


def test_the_first_output_is_returned_at_once_and_the_rest_together_at_the_end() -> None:
    async def run() -> list[str]:
        paced = collector(Pace(60.0), output("a"))
        texts = [await next_text(paced)]
        paced.put(output("b"))
        waiting = asyncio.create_task(next_text(paced))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        paced.put(output("c"))
        paced.put(output("d", finished=True))
        return [*texts, await waiting]

    assert asyncio.run(run()) == ["a", "bcd"]


def test_an_output_after_the_window_is_returned_at_once() -> None:
    async def run() -> list[str]:
        paced = collector(Pace(0.001))
        texts = []
        for letter in "abc":
            paced.put(output(letter))
            texts.append(await next_text(paced))
        return texts

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_an_error_of_the_engine_is_raised_at_once() -> None:
    async def run() -> None:
        paced = collector(Pace(60.0), output("a"))
        await next_text(paced)
        paced.put(output("b"))
        paced.put(RuntimeError("dead"))
        await next_text(paced)

    with pytest.raises(RuntimeError, match="dead"):
        asyncio.run(run())


def load(unfinished: int, *outputs: EngineCoreOutputs) -> EngineLoad:
    """Return the load after these outputs of two engines that run four requests each."""
    remaining = iter(outputs)

    async def get() -> EngineCoreOutputs:
        return next(remaining)

    client: Any = SimpleNamespace(
        engine_core=SimpleNamespace(get_output_async=get),
        output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: unfinished),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=4), parallel_config=SimpleNamespace(data_parallel_size=2)
        ),
    )
    monitor = Monitor(client)

    async def run() -> None:
        for _ in outputs:
            await client.engine_core.get_output_async()

    asyncio.run(run())
    assert monitor.reported.is_set() == bool(outputs)
    return monitor.load()


def report(running: int, waiting: int, kv_cache: float, engine: int = 0) -> EngineCoreOutputs:
    stats = SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=kv_cache)
    return EngineCoreOutputs(engine_index=engine, scheduler_stats=stats)


def test_the_load_is_the_sum_of_the_last_reports() -> None:
    assert load(9, report(1, 0, 0.1), report(4, 2, 0.5), report(3, 0, 0.25, engine=1)) == EngineLoad(8, 9, 7, 2, 0.375)


def test_requests_that_have_ended_since_the_last_report_do_not_count() -> None:
    assert load(0, report(4, 2, 0.5)) == EngineLoad(8, 0, 0, 0, 0.0)
    assert load(1, report(4, 2, 0.5)) == EngineLoad(8, 1, 1, 0, 0.5)


@pytest.mark.parametrize(("unfinished", "running", "waiting"), [(0, 0, 0), (5, 5, 0), (11, 8, 3)])
def test_without_statistics_the_requests_beyond_the_capacity_wait(unfinished: int, running: int, waiting: int) -> None:
    assert load(unfinished) == EngineLoad(8, unfinished, running, waiting, 0.0)


class Engines:
    """Two engines, one of which may be silent."""

    def __init__(self) -> None:
        self.unfinished = 2
        self.core = SimpleNamespace(
            get_output_async=self.get, core_engines=[b"0", b"1"], engine_inflight=Counter({b"0": 1, b"1": 1})
        )
        client: Any = SimpleNamespace(
            engine_core=self.core, output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: self.unfinished)
        )
        self.monitor = Monitor(client)

    async def get(self) -> EngineCoreOutputs:
        return report(1, 0, 0.1, engine=0)

    def wait(self, seconds: int) -> tuple[int, float]:
        """Let engine 0 report something each second; return the longest silence."""
        for _ in range(seconds):
            asyncio.run(self.core.get_output_async())
            self.monitor.add(1.0)
        return self.monitor.longest_silence()


def test_an_engine_that_answers_does_not_hide_one_that_is_silent() -> None:
    engines = Engines()
    assert engines.wait(5) == (1, 5.0)
    engines.core.engine_inflight[b"1"] = 0
    assert engines.wait(1)[1] == 1.0


def test_an_engine_whose_requests_were_aborted_is_not_waited_for() -> None:
    engines = Engines()
    engines.unfinished = 0
    assert engines.wait(5)[1] == 0.0


def test_requests_that_are_aborted_in_the_same_moment_share_a_message() -> None:
    sent: list[list[str]] = []

    async def send(ids: list[str]) -> None:
        await asyncio.sleep(0)
        sent.append(ids)

    async def run() -> None:
        aborts = Aborts(send)
        tasks = [asyncio.create_task(aborts.send([str(number)])) for number in range(200)]
        await asyncio.sleep(0)
        # A caller that goes on does not take the others' message along.
        tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await aborts.send(["last"])

    asyncio.run(run())
    assert sent == [[str(number) for number in range(200)], ["last"]]
