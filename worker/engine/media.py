"""vLLM's media connector, which also tells the calling job's meter what it fetched."""

import time
from typing import Any

import aiohttp
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from worker.meter import Fetch, Rejection, metered

NAME = "worker"
"""What `VLLM_MEDIA_CONNECTOR` has to be for vLLM to use the connector."""


class Connection(HTTPConnection):
    """vLLM's HTTP client."""

    async def async_get_bytes(self, url: str, **options: Any) -> bytes:
        """Fetch a link, and enter it in the meter of the job that needs it."""
        began = time.monotonic()
        fetch = Fetch(0.0, rejection="unreachable")
        try:
            data = await super().async_get_bytes(url, **options)
            fetch = Fetch(time.monotonic() - began, len(data))
        except Exception as error:
            fetch = Fetch(time.monotonic() - began, rejection=_reason(error))
            raise
        finally:
            if (meter := metered.get()) is not None:
                meter.fetches.append(fetch)
        return data


def _reason(error: Exception) -> Rejection:
    match error:
        case MediaDownloadSizeExceededError():
            return "too_large"
        case aiohttp.ClientResponseError():
            return "refused_by_server"
        case TimeoutError():
            return "timeout"
        case ValueError():
            return "invalid"
    return "unreachable"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class Connector(MediaConnector):
    """The door through which every route loads media."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"connection": _CONNECTION, **options})


_CONNECTION = Connection()
