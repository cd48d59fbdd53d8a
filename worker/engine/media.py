"""vLLM's media connector, the one door through which every route loads media, with the worker's fetching behind it."""

import os
import time
from typing import Any

from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from worker.fetch import Fetcher, FetchError
from worker.meter import Fetch, metered

NAME = "worker"
"""What `VLLM_MEDIA_CONNECTOR` has to be for vLLM to use the connector."""


class Connection(HTTPConnection):
    """Stands in for vLLM's HTTP client, which goes to any address, by way of any proxy."""

    def __init__(self, fetcher: Fetcher) -> None:
        super().__init__()
        self._fetcher = fetcher

    async def async_get_bytes(self, url: str, *, max_bytes: int | None = None, **_: Any) -> bytes:
        """Fetch a link, and enter it in the meter of the job that needs it.

        Raises:
            VLLMUnprocessableEntityError: it cannot or must not be fetched.
        """
        began = time.monotonic()
        fetch: Fetch | None = None
        try:
            data = await self._fetcher.get(url, max_bytes)
            fetch = Fetch(time.monotonic() - began, len(data))
        except FetchError as error:
            fetch = Fetch(time.monotonic() - began, rejection=error.reason)
            raise VLLMUnprocessableEntityError(f"Media cannot be fetched: {error}.") from None
        finally:
            if fetch and (meter := metered.get()) is not None:
                meter.fetches.append(fetch)
        return data

    def get_bytes(self, *_: Any, **__: Any) -> bytes:
        """Nothing fetches this way while requests are served."""
        raise NotImplementedError("media is fetched asynchronously")


def install(fetcher: Fetcher) -> None:
    """Make vLLM fetch media through `fetcher`."""
    connection = Connection(fetcher)

    class Connector(MediaConnector):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "connection": connection})

    MEDIA_CONNECTOR_REGISTRY.register(NAME)(Connector)
    os.environ["VLLM_MEDIA_CONNECTOR"] = NAME
