"""A follower's part of the engine: processes of vLLM that the head of the cluster directs."""

import asyncio
import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Self

from vllm.config import VllmConfig
from vllm.utils.network_utils import get_tcp_uri
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from worker import processes
from worker.engine import description
from worker.engine.load import FirstCause, configure
from worker.engine.startup_errors import failure, one_line
from worker.errors import Json
from worker.settings import Settings

log = logging.getLogger(__name__)

DEATH_CHECK_SECONDS = 0.1


class Headless:
    """The engine's processes on a follower: those of a part of a copy of the model, or of whole copies."""

    def __init__(self, parts: Sequence[BaseProcess], shutdown: Callable[[], object], facts: Json) -> None:
        self.facts = facts
        """Facts about the model and how it runs, for `/info`."""
        self._parts = parts
        self.shutdown = shutdown
        """End the processes."""

    @classmethod
    def load(cls, args: Namespace, settings: Settings, first_cause: FirstCause) -> Self:
        """Start the processes. This returns once a part of a copy is loaded; whole copies go on to load.

        Raises:
            ConfigurationError: the model and the settings do not match, or the model does not fit into memory.
            StartupError: the processes did not start, but another attempt may succeed.
        """
        config = configure(args, settings, headless=True)
        facts = description.of_engine(config, args)
        try:
            with processes.children_end_with_this():
                if config.parallel_config.node_rank_within_dp > 0:
                    if not config.model_config.is_moe:
                        # Copies of such a model are independent groups, as they are for the engine on their first node.
                        config.parallel_config.reconfigure_for_independent_dp_rank()
                    executor = MultiprocExecutor(config, monitor_workers=False)
                    return cls([worker.proc for worker in executor.workers], executor.shutdown, facts)
                manager = _start_cores(config, log_stats=not args.disable_log_stats)
                return cls(manager.processes, manager.shutdown, facts)
        except Exception as error:
            # vLLM raises a bare Exception if a process fails while it loads.
            raise failure(one_line(error), first_cause()) from error

    @property
    def is_dead(self) -> bool:
        """Whether a process has ended."""
        return not all(part.is_alive() for part in self._parts)

    async def died(self) -> None:
        """Wait until a process has ended."""
        while not self.is_dead:  # noqa: ASYNC110 - processes end at any time
            await asyncio.sleep(DEATH_CHECK_SECONDS)
        codes = {part.name: part.exitcode for part in self._parts if not part.is_alive()}
        log.error("Processes of the engine have ended, with exit codes %s", codes)


def _start_cores(config: VllmConfig, *, log_stats: bool) -> CoreEngineProcManager:
    """Start an engine for each copy of the model on this machine. They connect to the head's client."""
    parallel = config.parallel_config
    return CoreEngineProcManager(
        local_engine_count=parallel.data_parallel_size_local,
        start_index=parallel.data_parallel_rank,
        local_start_index=0,
        vllm_config=config,
        local_client=False,
        handshake_address=get_tcp_uri(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port),
        executor_class=Executor.get_class(config),
        log_stats=log_stats,
    )
