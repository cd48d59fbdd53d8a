"""The collector of outputs, which keeps a job's pace. The client is tested with the running engine."""

import asyncio

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from worker.engine.client import PacedCollector
from worker.request.pace import Pace


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
