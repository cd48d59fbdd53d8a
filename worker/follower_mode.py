"""A follower of a cluster: it computes for the head, and answers the worker's own routes only."""

import asyncio
from contextlib import suppress

from worker import race
from worker.cluster.cluster import Cluster
from worker.errors import EngineDiedError
from worker.modes import HttpMode

CHECK_SECONDS = 0.1


class FollowerMode(HttpMode):
    """A node that takes no requests. It is ready when the head is, and ends with the head."""

    @property
    def _cluster(self) -> Cluster:
        return self.worker.cluster

    async def _serve(self) -> None:
        worker, lifecycle = self.worker, self.worker.lifecycle
        tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._announce_stop())]
        try:
            # The end of the cluster kills the engine, and so ends this.
            await lifecycle.serve(self._engine_has_died(), self._head_has_ended, worker.settings.grace)
        except EngineDiedError:
            if not self._cluster.finished:
                raise
        finally:
            await race.end(*tasks)

    async def _engine_has_died(self) -> None:
        await self.worker.headless.died()
        # At once: requests on the head wait for this engine.
        await asyncio.to_thread(self._cluster.leave, "has failed: its engine has died")

    async def _follow(self) -> None:
        """Become ready when the head is."""
        while not self._cluster.is_serving:  # noqa: ASYNC110 - another thread notices it
            await asyncio.sleep(CHECK_SECONDS)
        self._cluster.announce_ready()
        self.worker.own_routes.engine = self.worker.headless.facts
        self.worker.lifecycle.ready(lambda: self.worker.headless.is_dead)

    async def _announce_stop(self) -> None:
        """Tell the head that this node is being stopped, so that the head's requests can end first."""
        await self.worker.lifecycle.stopping.wait()
        await asyncio.to_thread(self._cluster.leave)

    async def _head_has_ended(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._cluster.finished:  # noqa: ASYNC110 - once, when the worker ends
                    await asyncio.sleep(CHECK_SECONDS)
