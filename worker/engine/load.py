"""Loads the model into vLLM's engine processes: minutes for a large one."""

import gc
import multiprocessing
import os
import threading
from argparse import Namespace
from collections.abc import Callable, Set
from functools import partial

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils import cpu_resource_utils
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM

from worker import processes
from worker.engine import cores
from worker.engine.client import Client
from worker.engine.grammars import bound_steps
from worker.engine.startup_errors import VLLM_ERRORS, failure, one_line, translated
from worker.engine.versions import propagate_flash_late_interaction
from worker.settings import Settings, environment

POLL_SECONDS = 0.02

Work = Callable[[], object]
FirstCause = Callable[[], str | None]
"""Returns the first exception that any process has logged, as `TYPE: MESSAGE`."""


def load(args: Namespace, settings: Settings, meanwhile: Work, first_cause: FirstCause) -> AsyncLLM:
    """Return the client of a loaded engine; see `Engine.load`."""
    config = configure(args, settings)
    ended = threading.Event()
    known = set(multiprocessing.active_children())
    waiting = threading.Thread(target=_call_after_fork, args=(meanwhile, known, ended), daemon=True)
    # With data parallelism several processes are forked, and nothing shows when the last one exists.
    if config.parallel_config.data_parallel_size == 1:
        waiting.start()
    try:
        with processes.children_end_with_this():
            return Client.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
                aggregate_engine_logging=args.aggregate_engine_logging,
            )
    except VLLM_ERRORS as error:
        ended.set()
        # The worker may start the engine again, which must not be forked while `meanwhile` imports modules.
        if waiting.is_alive():
            waiting.join()
        raise failure(one_line(error), first_cause()) from error
    finally:
        ended.set()


def configure(args: Namespace, settings: Settings, *, headless: bool = False) -> VllmConfig:
    """Return vLLM's configuration, and prepare this process to start the engine's processes.

    `headless`: the processes are those of a cluster's follower, which another machine directs.

    Raises:
        ConfigurationError: vLLM refuses an argument, or there are too few CPU cores.
    """
    set_ulimit()
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    with translated():
        config: VllmConfig = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER, headless)
    parallel = config.parallel_config
    if current_platform.is_cpu():
        _bind_threads(parallel.local_world_size * parallel.data_parallel_size_local)
    _set_start_method(settings.libraries.start_method, has_core=parallel.node_rank_within_dp == 0)
    # The engine process inherits it when it is forked.
    bound_steps()
    # No process needs to look for garbage among the objects that exist now.
    gc.freeze()
    gc.enable()
    return config


def _bind_threads(count: int) -> None:
    """Divide the CPU cores among the processes that compute, where vLLM would not."""
    chosen = os.environ.get(cores.VARIABLE)
    cpus, numa_nodes = cpu_resource_utils.get_allowed_cpu_list(), cpu_resource_utils.get_visible_memory_node()
    if (value := cores.binding(chosen, cpus, len(numa_nodes), count)) is not None:
        os.environ[cores.VARIABLE] = value


def _set_start_method(chosen: str | None, *, has_core: bool) -> None:
    """Fork the engine process unless the user chose otherwise: a new process would import torch and vLLM again.

    Call it after vLLM has created its configuration, which sets the method to `spawn` on CPUs. vLLM still spawns where
    it cannot fork: if CUDA is in use already, on Ray, and with NUMA binding. `has_core`: there is an engine process,
    which starts those that compute.
    """
    # Processes that compute need vLLM's allocator and thread binding on CPUs, which only a new process can load.
    computing = "spawn" if current_platform.is_cpu() else "fork"
    environment.set_start_method(chosen or ("fork" if has_core else computing))
    if chosen is None and has_core and computing == "spawn":
        os.register_at_fork(after_in_child=partial(environment.set_start_method, computing))


def _call_after_fork(work: Work, known: Set[multiprocessing.process.BaseProcess], ended: threading.Event) -> None:
    """Call `work` once there is another process than the `known` ones: the engine's.

    A module that is imported during a fork stays half-imported in it.
    """
    while not set(multiprocessing.active_children()) - known:
        if ended.wait(POLL_SECONDS):
            return
    work()
