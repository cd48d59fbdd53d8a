"""What the worker replaces in vLLM and Pillow for the whole process, where they offer no other way."""

import warnings
from functools import partial

from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from worker.engine.connector import Connector, Guard
from worker.settings.environment import MEDIA_CONNECTOR


def install(guard: Guard) -> None:
    """Have vLLM load all media through `guard`."""
    # vLLM looks this name up for each request with media, and calls the result to create a connector.
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(partial(Connector, guard))
    # vLLM's video loaders call this method of the class itself: there is no object, argument or setting to replace it.
    setattr(OpenCVVideoBackendMixin, "open_video_capture", staticmethod(guard.open_capture))  # noqa: B010 - for mypy
    # Pillow reads its limit from this global, and only warns about an image of up to twice as many pixels.
    Image.MAX_IMAGE_PIXELS = int(guard.limits.image_pixels.value)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
