"""LoRA adapters that requests name: loads them into the engine, and unloads the least recently used ones."""

import asyncio
import logging
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from vllm.entrypoints.serve import create_error_response
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM

from worker import threads
from worker.engine.model_field import model_of
from worker.model import adapters as adapter_files
from worker.model.adapter_checks import AdapterNotAllowedError, Base, check, rejected
from worker.request.asgi import App, ClientDisconnectedError, Message, Receive, Send
from worker.request.rewrite import then, unless_disconnected
from worker.settings import Settings

log = logging.getLogger(__name__)

DOWNLOADS = 4
"""How many adapters are downloaded at once."""
READERS = 2
"""How many adapters on disk are checked at once."""
POLL_SECONDS = 0.5
NO_CONTROL = "This route is off, because LORA_ALLOW is set. Name the adapter in 'model' of a request, which loads it."


def keep_slot_free(args: Namespace) -> None:
    """On CPUs, reserve one more adapter slot than is used.

    vLLM's code for CPUs uses the adapter in the last slot for requests without one (pull request 48421).
    """
    if args.enable_lora and current_platform.is_cpu():
        used = max(args.max_loras, args.max_cpu_loras or 0, len(args.lora_modules or ()))
        args.max_loras = args.max_cpu_loras = used + 1


class _Adapter:
    """An adapter that requests use or load."""

    def __init__(self, name: str, static: LoRARequest | None) -> None:
        self.name = name
        self.users = 0
        """How many requests use it, or wait for it."""
        self.request = static
        """Set while the engine has the adapter."""
        self.is_static = static is not None
        """Whether LORA_MODULES names it. Its name stays known when it is unloaded."""
        self.is_leaving = False
        """Whether it is about to be unloaded. New requests wait until it is."""
        self.loading: asyncio.Task[None] | None = None


class Adapters:
    """The adapters of one engine. At most MAX_CPU_LORAS are loaded, and none is unloaded while a request uses it.

    The engine therefore never loads one by itself. That would end it if the files were gone or damaged.
    """

    def __init__(self, client: AsyncLLM, app: Starlette, model: Path, settings: Settings) -> None:
        self._client = client
        self._models = app.state.openai_serving_models
        self._model = model
        self._settings = settings
        config: Any = client.vllm_config.lora_config
        self._max_rank: int = config.max_lora_rank
        self._capacity: int = config.max_cpu_loras - current_platform.is_cpu()
        self._adapters: dict[str, _Adapter] = {}
        """By name, the least recently used first."""
        self._loading = asyncio.Lock()
        """Held while adapters are loaded into the engine or unloaded from it."""
        self._changed = asyncio.Event()
        self._downloads = adapter_files.Downloads(settings)
        self._downloaders = ThreadPoolExecutor(DOWNLOADS, "adapter-downloads")
        self._readers = ThreadPoolExecutor(READERS, "adapter-readers")
        self._copies = Path(tempfile.mkdtemp(prefix="adapters-"))
        """Copies of adapters in ADAPTER_FOLDER. Each is removed when the engine has loaded it, or cannot."""
        # Nothing else may load or unload adapters.
        self._models.load_lora_adapter = self._models.unload_lora_adapter = _refuse
        self._models.lora_resolvers.clear()
        self._models.show_available_models = self._listing(self._models.show_available_models)
        for name, request in [*self._models.lora_requests.items()][-self._capacity :]:
            # vLLM has loaded the adapters in LORA_MODULES.
            self._adapters[name] = _Adapter(name, request)

    def close(self) -> None:
        """End all downloads, and remove the copies of adapters."""
        self._downloads.close()
        for executor in (self._downloaders, self._readers):
            executor.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self._copies, ignore_errors=True)

    def over(self, app: App) -> App:
        """Return `app`, which gets a request once the adapter that it names is loaded. The body is one message."""

        async def adapted(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                await app(scope, receive, send)
                return
            message = await receive()
            name = await model_of(scope, message["body"]) if message.get("body") else None
            async with AsyncExitStack() as stack:
                if isinstance(name, str) and self._is_adapter(name):
                    try:
                        await unless_disconnected(stack.enter_async_context(self._using(name)), receive)
                    except ClientDisconnectedError:
                        return
                await app(scope, then(message, receive), send)

        return adapted

    def _is_adapter(self, name: str) -> bool:
        """Return whether `name` is that of an adapter. vLLM answers for all other names.

        Raises:
            AdapterNotAllowedError: it may be one, but LORA_ALLOW does not match it.
        """
        if not name or self._models.is_base_model(name):
            return False
        if name in self._models.lora_requests or adapter_files.is_allowed(name, self._settings):
            return True
        if "/" in name:
            raise AdapterNotAllowedError(name)
        return False

    @asynccontextmanager
    async def _using(self, name: str) -> AsyncIterator[None]:
        """Load an adapter unless it is loaded, and keep it while the block runs."""
        while (adapter := self._adapters.get(name)) is not None and adapter.is_leaving:
            await self._changed.wait()
        if adapter is None:
            adapter = _Adapter(name, None)
            adapter.loading = asyncio.create_task(self._load(adapter))
            # All who asked for it may be gone when it fails.
            adapter.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._adapters.pop(name, None)
        self._adapters[name] = adapter
        adapter.users += 1
        try:
            if adapter.loading is not None:
                await asyncio.shield(adapter.loading)
            yield
        finally:
            adapter.users -= 1
            self._notify()

    def _notify(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _load(self, adapter: _Adapter) -> None:
        """Find or download an adapter, check it, and load it into the engine."""
        started, name = time.monotonic(), adapter.name
        try:
            async with AsyncExitStack() as lock:
                async with self._request(adapter) as request:
                    await lock.enter_async_context(self._loading)
                    await self._make_room()
                    await self._add(request)
                adapter.request = self._models.lora_requests[name] = request
        except BaseException:
            del self._adapters[name]
            self._notify()
            raise
        log.info("Loaded the LoRA adapter %s in %.1f s", name, time.monotonic() - started)

    @asynccontextmanager
    async def _request(self, adapter: _Adapter) -> AsyncIterator[LoRARequest]:
        """Provide what vLLM's `add_lora` takes. Nobody changes the adapter's files while the block runs.

        Raises:
            AdapterError, AdapterUnavailableError: there is no such adapter, or it does not fit the model.
        """
        name = adapter.name
        # Static adapters have been checked and loaded at the start. They may have been unloaded since.
        static = self._models.lora_requests.get(name)
        adapter.is_static = static is not None
        if static is not None:
            yield static
            return
        base = await threads.call(self._readers, lambda: self._base)
        find = partial(adapter_files.find, name, self._settings, self._copies, base.max_bytes)
        folder = await threads.call(self._readers, find)
        if folder is None:
            folder = await threads.call(self._downloaders, self._downloads.get, name, base.max_bytes)
        try:
            await threads.call(self._readers, check, folder, name, base)
            yield LoRARequest(name, self._models.lora_id_counter.inc(1), str(folder))
        finally:
            if folder.parent == self._copies:
                await threads.call(self._readers, partial(shutil.rmtree, folder, ignore_errors=True))

    @cached_property
    def _base(self) -> Base:
        names = [self._settings.model_name, *(model.name for model in self._models.base_model_paths)]
        return Base.of(self._model, names, self._max_rank)

    async def _make_room(self) -> None:
        """Unload adapters until there is room for another one. If all are in use, new requests for one of them wait."""
        while len(loaded := [each for each in self._adapters.values() if each.request]) >= self._capacity:
            if (unused := next(filter(self._is_unused, loaded), None)) is not None:
                await self._unload(unused)
                continue
            changed, oldest = self._changed, loaded[0]
            oldest.is_leaving = True
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await changed.wait()
            oldest.is_leaving = False

    def _is_unused(self, adapter: _Adapter) -> bool:
        """Return whether no request uses an adapter, not even one that goes on in the background."""
        states = self._client.output_processor.request_states.values()
        return not adapter.users and all(state.lora_name != adapter.name for state in states)

    async def _unload(self, adapter: _Adapter) -> None:
        adapter.is_leaving = True
        if not adapter.is_static:
            self._models.lora_requests.pop(adapter.name, None)
        if adapter.request is not None:
            await self._client.remove_lora(adapter.request.lora_int_id)
        del self._adapters[adapter.name]
        self._notify()
        log.info("Unloaded the LoRA adapter %s", adapter.name)

    async def _add(self, request: LoRARequest) -> None:
        """Load an adapter into the engine.

        Raises:
            AdapterError: vLLM cannot use it.
        """
        # vLLM raises a plain `Exception` with the message of the engine process.
        (result,) = await asyncio.gather(self._client.add_lora(request), return_exceptions=True)
        if not isinstance(result, BaseException):
            return
        if self._client.errored or type(result) is not Exception:
            raise result
        # It may have been loaded in part.
        await self._client.remove_lora(request.lora_int_id)
        raise rejected(request.lora_name, str(result), request.lora_path)

    def _listing(self, show: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        """Return `show`, the function behind /v1/models, with the adapters that requests may load."""

        async def show_available_models() -> Any:
            models = await show()
            offered = await asyncio.to_thread(adapter_files.offered, self._settings)
            loaded = {each.name for each in self._adapters.values() if each.request and not each.is_static}
            # vLLM shows the folders of those that are loaded.
            models.data = [card for card in models.data if card.id not in loaded]
            names = loaded.union(offered).difference(card.id for card in models.data)
            base = models.data[0]
            fields = {"parent": base.id, "max_model_len": None}
            models.data += [base.model_copy(update={**fields, "id": name, "root": name}) for name in sorted(names)]
            return models

        return show_available_models


async def _refuse(*_: Any, **__: Any) -> Any:
    """Answer vLLM's routes that load or unload an adapter."""
    return create_error_response(NO_CONTROL, "PermissionDeniedError", HTTPStatus.FORBIDDEN)
