"""The process environment. No other module reads or writes it.

`prepare` sets the variables that vLLM, the RunPod SDK and others read, unless the user has set them.
"""

import os
from pathlib import Path

from worker.settings import flags, sources
from worker.settings.settings import Settings

DEFAULTS = {
    "RUNPOD_LOG_LEVEL": "INFO",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "OTEL_SERVICE_NAME": "runpod-vllm-worker",
}
"""Defaults for vLLM and the RunPod SDK.

At its DEBUG level the SDK logs every chunk of output. Its checks open a CUDA context in the worker's process and
connect to a public address; the worker's own first generation is a better check.
"""
ALLOCATION_SETTINGS = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "KV_TRANSFER_CONFIG"}
"""Settings that replace expandable segments, or are incompatible with them."""
NO_LIMIT_SECONDS = 10**6
"""As long as vLLM can wait: it counts in milliseconds."""
MEDIA_CONNECTOR = "worker"
"""The name of the worker's media connector in vLLM's registry."""


def read() -> dict[str, str]:
    """Return the environment."""
    return dict(os.environ)


def prepare(settings: Settings, logging_config: Path | None = None) -> None:
    """Set everything that other libraries read from the environment. Call it before they are imported.

    `logging_config` is the JSON file with which vLLM configures the logging of all its processes.
    """
    values, cache = settings.variables.values, settings.libraries.vllm_cache
    defaults = {
        **DEFAULTS,
        # Inside vLLM's own cache, so that the compile cache keeps all of it.
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(cache / "flashinfer"),
    }
    if not flags.boolean(values, "DISABLE_LOG_STATS"):
        # ENGINE_STALL_TIMEOUT takes its place: vLLM's own limit for a step counts the time of a frozen worker too.
        defaults["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(NO_LIMIT_SECONDS)
    if logging_config is not None:
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(logging_config)
    if settings.hf_token:
        # The Hub's library reads it from the environment; it may have been set in the file.
        defaults["HF_TOKEN"] = settings.hf_token
    if protocol := values.get("OTEL_EXPORTER_OTLP_PROTOCOL"):
        # vLLM reads only the second of OpenTelemetry's two names.
        defaults["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = protocol
    # Sleep mode is incompatible with expandable segments.
    if not flags.boolean(values, "ENABLE_SLEEP_MODE") and ALLOCATION_SETTINGS.isdisjoint(values):
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Variables of other programs count in the file too. An empty variable counts as unset.
    os.environ.update({name: value for name, value in values.items() if sources.FOREIGN.match(name)})
    os.environ.update({name: values.get(name, value) for name, value in defaults.items()})
    os.environ["VLLM_MEDIA_CONNECTOR"] = MEDIA_CONNECTOR
    os.environ["VLLM_MAX_IMAGE_PIXELS"] = str(settings.max_image_pixels)
    os.environ["VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"] = str(-(-settings.max_audio_bytes // (1 << 20)))


def use_interface(name: str, address: str) -> None:
    """Have vLLM and its libraries use this interface and address between the nodes, unless the user chose others.

    NCCL takes a name for the beginning of several names, unless it begins with `=`.
    """
    for variable, value in (
        ("VLLM_HOST_IP", address),
        ("GLOO_SOCKET_IFNAME", name),
        ("NCCL_SOCKET_IFNAME", f"={name}"),
    ):
        os.environ[variable] = os.environ.get(variable) or value


def go_offline() -> None:
    """Keep the Hugging Face libraries from asking the Hub. They read this once, when they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def set_start_method(method: str) -> None:
    """Have vLLM `fork` or `spawn` the processes that it starts from now on."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
