"""The routes for embeddings, scores and classes: vLLM prepares their requests in threads, with the request's context.

vLLM prepares scores in the event loop, where loading an image would wait for itself. It prepares all others in a thread
that does not know the request, so that nothing would be counted for it.
"""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from starlette.datastructures import State

from worker import threads

HANDLERS = ("serving_pooling", "serving_embedding", "serving_classification", "serving_scores")
"""The names of vLLM's handlers in the state of its app."""

Preprocess = Callable[[Any, Any], Awaitable[None]]


def prepare_in_threads(state: State) -> None:
    """Replace how vLLM's handlers prepare requests."""
    for name in HANDLERS:
        if (handler := getattr(state, name, None)) is not None:
            handler._preprocessing = _in_threads(handler._preprocessing, handler.renderer._executor)


def _in_threads(preprocess: Preprocess, executor: Any) -> Preprocess:
    """Return vLLM's `preprocess`, whose two steps run in the threads of its own executor."""

    async def preprocessing(io_processor: Any, ctx: Any) -> None:
        requests = await threads.call(executor, io_processor.get_request_factory_online, ctx)

        def render(request: Any) -> Awaitable[Any]:
            return threads.call(executor, io_processor.render, request)

        steps = SimpleNamespace(get_request_factory_online=lambda _: requests, render_async=render)
        await preprocess(steps, ctx)

    return preprocessing
