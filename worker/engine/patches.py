"""What the worker replaces in vLLM and FastAPI for the whole process, where they offer no other way."""

import re
from functools import partial
from types import SimpleNamespace

from fastapi.dependencies import utils as dependencies
from fastapi.dependencies.utils import request_body_to_args
from vllm.entrypoints.serve.exception_handling import utils as messages
from vllm.entrypoints.speech_to_text.base import serving
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from worker.engine import speech, validation
from worker.engine.connector import Connector, Guard
from worker.settings.environment import MEDIA_CONNECTOR


def install(guard: Guard) -> None:
    """Have vLLM load all media through `guard`, and bound the cost of wrong requests."""
    # vLLM looks this name up for each request with media, and calls the result to create a connector.
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(partial(Connector, guard))
    # vLLM's video loaders call this method of the class itself: there is no object, argument or setting to replace it.
    setattr(OpenCVVideoBackendMixin, "open_video_capture", staticmethod(guard.open_capture))  # noqa: B010 - for mypy
    # `speech.replace_decoding` decodes uploads before vLLM's function for that, which then gets their samples.
    setattr(serving, "load_audio", speech.samples_of)  # noqa: B010 - for mypy
    # FastAPI calls this function for the body of every request.
    validate = validation.in_threads(speech.checking_upload(request_body_to_args, guard.limits.bytes["audio"]))
    setattr(dependencies, "request_body_to_args", validate)  # noqa: B010
    # Many modules hold the function that removes paths from vLLM's error messages. It finds `re` by this name.
    setattr(messages, "re", SimpleNamespace(sub=validation.bounded(re.sub)))  # noqa: B010
