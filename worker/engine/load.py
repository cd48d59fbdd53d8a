"""Loads the model into vLLM's engine processes: minutes for a large one."""

import multiprocessing
import os
import threading
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM

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
    set_ulimit()
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    with translated():
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    _set_start_method(settings.libraries.start_method)
    # The engine process inherits it when it is forked.
    bound_steps()
    ended = threading.Event()
    # With data parallelism several processes are forked, and nothing shows when the last one exists.
    if config.parallel_config.data_parallel_size == 1:
        threading.Thread(target=_call_after_fork, args=(meanwhile, ended), daemon=True).start()
    try:
        return Client.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
            aggregate_engine_logging=args.aggregate_engine_logging,
        )
    except VLLM_ERRORS as error:
        raise failure(one_line(error), first_cause()) from error
    finally:
        ended.set()


def _set_start_method(chosen: str | None) -> None:
    """Fork the engine process unless the user chose otherwise: a new process would import torch and vLLM again.

    Call it after vLLM has created its configuration, which sets the method to `spawn` on CPUs. vLLM still spawns where
    it cannot fork: if CUDA is in use already, on Ray, and with NUMA binding.
    """
    environment.set_start_method(chosen or "fork")
    if chosen is None and current_platform.is_cpu():
        # The processes that compute need vLLM's allocator and thread binding, which only a new process can load.
        os.register_at_fork(after_in_child=partial(environment.set_start_method, "spawn"))


def _call_after_fork(work: Work, ended: threading.Event) -> None:
    """Call `work` once the engine process exists. A module that is imported during a fork stays half-imported in it."""
    while not multiprocessing.active_children():
        if ended.wait(POLL_SECONDS):
            return
    work()
