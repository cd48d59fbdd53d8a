"""Known bugs, each of which the simulation must find. They are patched into the product here, for tests only."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import pytest

from worker.batch.journal import Journal
from worker.errors import ResultRefusedError
from worker.queue.delivery import Delivery
from worker.queue.places import Places
from worker.queue.platform import Platform

Patch = pytest.MonkeyPatch


def _hole(patch: Patch) -> None:
    """A part that the platform does not accept within five seconds is given up."""
    stream = Platform.stream

    async def impatient(self: Platform, job_id: str, output: Any) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await stream(self, job_id, output)

    patch.setattr(Platform, "stream", impatient)


def _double_end(patch: Patch) -> None:
    """A job whose result was accepted late ends with an error too."""
    done = Platform.done

    async def twice(self: Platform, job_id: str, result: bytes) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        await done(self, job_id, result)
        if clock() - began > 1:
            await done(self, job_id, b'{"error": "it took too long"}')

    patch.setattr(Platform, "done", twice)


def _lost_refusal(patch: Patch) -> None:
    """A refused result is not followed by an error."""
    done = Platform.done

    async def dropped(self: Platform, job_id: str, result: bytes) -> None:
        with suppress(ResultRefusedError):
            await done(self, job_id, result)

    patch.setattr(Platform, "done", dropped)


def _hoarding(patch: Patch) -> None:
    """All free places are asked for, whatever the engine can run."""
    patch.setattr(Places, "free", lambda self, jobs, _generating: min(max(self.most - jobs, 0), self.batch))


def _leaked_task(patch: Patch) -> None:
    """A post goes on after its job was stopped."""
    part = Delivery.part

    async def unstoppable(self: Delivery, output: Any) -> None:
        await asyncio.shield(asyncio.ensure_future(part(self, output)))

    patch.setattr(Delivery, "part", unstoppable)


def _forgotten_journal(patch: Patch) -> None:
    """A batch that goes on does not read what an earlier run has written."""
    patch.setattr(Journal, "_catch_up", lambda _: None)


PLANTS: Mapping[str, Callable[[Patch], None]] = MappingProxyType(
    {
        "hole": _hole,
        "double end": _double_end,
        "lost refusal": _lost_refusal,
        "hoarding": _hoarding,
        "leaked task": _leaked_task,
        "forgotten journal": _forgotten_journal,
    }
)


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Have one of the bugs in the product while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        PLANTS[name](patch)
        yield
