"""What has been said becomes one frozen `Settings`; what vLLM has flags for is in `worker/flags.py`."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from worker.errors import ConfigurationError
from worker.settings.sources import DEFAULT_MODEL

MAX_CONCURRENCY = 512

BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def _boolean(text: Any) -> Any:
    return BOOLEANS.get(text.strip().lower(), text) if isinstance(text, str) else text


def _upper(text: Any) -> Any:
    return text.strip().upper() if isinstance(text, str) else text


def _lower(text: Any) -> Any:
    return text.strip().lower() if isinstance(text, str) else text


Boolean = Annotated[bool, BeforeValidator(_boolean)]


class Settings(BaseModel):
    """What the worker itself is told, one field per variable of the same name in capitals."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_name: str = Field(default=DEFAULT_MODEL, min_length=1)
    """A Hugging Face id or a local folder."""
    model_revision: str | None = None
    """A branch, tag or commit on the Hub."""
    model_subfolder: str | None = None
    """The folder of the repository that holds the model, if it is not its root."""
    base_path: str = "/runpod-volume"
    """Where a network volume is mounted, whose cache of models is used."""
    download_dir: str | None = None
    """Where models are downloaded to; by default the volume's cache, or where `HF_HOME` says."""
    hf_token: str | None = Field(default=None, repr=False)
    """For gated and private models."""
    compile_cache: Annotated[Literal["auto", "off"], BeforeValidator(_lower)] = "auto"
    """Whether what vLLM compiles is kept on the network volume, where there is one."""
    compile_cache_gb: float = Field(default=10.0, gt=0)
    """How much of the volume that may take."""
    skip_fit_check: Boolean = False
    """Whether a model is loaded that does not fit the GPUs, by the worker's estimate."""
    max_concurrency: int | None = Field(default=None, ge=1, le=MAX_CONCURRENCY)
    """Jobs in flight at once; by default twice the engine's `max_num_seqs`, at most 512."""
    request_timeout: float | None = Field(default=None, gt=0)
    """Seconds after which a job is ended with an error; by default the platform's own timeout alone counts."""
    stream_batch_ms: float = Field(default=25.0, ge=0)
    """How long a batch of a stream gathers events; four times that late in a long one. 0: as soon as possible."""
    worker_mode: Annotated[Literal["auto", "queue", "http"], BeforeValidator(_lower)] = "auto"
    """How jobs arrive; `auto`: from RunPod's queue where it gives jobs, over HTTP where `PORT` is set, else locally."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Where HTTP is served; by default 80 on RunPod and 8000 elsewhere."""
    port_health: int | None = Field(default=None, ge=1, le=65535)
    """Where `/ping`, `/health`, `/info` and `/metrics` are served as well."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """The same, also for a worker of the queue, which otherwise listens nowhere."""
    worker_api_key: tuple[str, ...] = Field(default=(), repr=False)
    """Keys of which callers over HTTP must send one, separated by commas; by default anybody may call."""
    max_request_bytes: int = Field(default=30_000_000, ge=1)
    """The largest body that is read over HTTP."""
    max_queue: int | None = Field(default=None, ge=0)
    """Requests over HTTP that may wait beyond `MAX_CONCURRENCY`; by default four times as many."""
    playground: Boolean = False
    """Whether a page to try the model is served over HTTP, at `/`, to anybody; what it asks the model needs a key."""
    media_fetch_timeout: float = Field(default=20.0, gt=0)
    """Seconds for fetching one link to an image, a video or so on."""
    media_allowed_domains: tuple[str, ...] = ()
    """The only hosts whose links are fetched, `*.example.org` for every name below one; by default all public ones."""
    media_allowed_ports: tuple[int, ...] = (80, 443, 8080, 8443)
    """The only ports at which links are fetched."""
    media_allow_private_networks: Boolean = False
    """Whether links into private networks, and to any port, are fetched; for local work."""
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    """The largest image file."""
    max_video_bytes: int = Field(default=200_000_000, ge=1)
    """The largest video file."""
    max_audio_bytes: int = Field(default=50_000_000, ge=1)
    """The largest sound file."""
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    """The largest image, or frame of a video."""
    image_downscale_pixels: int | None = Field(default=None, ge=1)
    """To how many pixels a larger image is scaled down; by default none is."""
    max_video_seconds: float = Field(default=600.0, gt=0)
    """The longest video."""
    max_video_pixels: int = Field(default=1_000_000_000, ge=1)
    """What the frames that are taken of a video may come to together."""
    video_max_frames: int | None = Field(default=None, ge=1)
    """How many frames are taken of a video at most; by default so many as vLLM takes for the model."""
    media_decode_timeout: float = Field(default=120.0, gt=0)
    """Seconds for decoding one video."""
    image_limit: int | None = Field(default=None, ge=0)
    """Images in one request; vLLM's `--limit-mm-per-prompt` says the same of every kind."""
    video_limit: int | None = Field(default=None, ge=0)
    """Videos in one request."""
    audio_limit: int | None = Field(default=None, ge=0)
    """Sounds in one request."""
    drain_seconds: float | None = Field(default=None, ge=0)
    """What runs is given to end when the worker is told to leave; by default 2.5 for the queue and 30 over HTTP."""
    on_engine_death: Annotated[Literal["fail", "retry"], BeforeValidator(_lower)] = "fail"
    """What becomes of a job that has said nothing yet when the engine dies: it fails, or is left to the platform."""
    engine_stall_timeout: float = Field(default=300.0, gt=0)
    """Seconds without any sign of an engine that has requests, after which it counts as dead."""
    startup_failure: Annotated[Literal["report", "exit"], BeforeValidator(_lower)] = "report"
    """Whether a worker that can never start tells the cause to its callers for a while, or leaves at once."""
    worker_job_loop: Literal["event", "sdk"] = "event"
    """Which loop takes jobs from the queue: the worker's own, or the SDK's, which knows no grace and no dead engine."""
    allow_control_routes: Boolean = False
    """Whether jobs may call every route of the engine, LoRA loading and profiling included."""
    vllm_extra_args: str = Field(default="", repr=False)
    """Flags as on a command line, appended last."""
    runpod_webhook_get_job: str | None = Field(default=None, repr=False)
    """Where the platform gives jobs; RunPod sets it."""
    runpod_pod_id: str | None = None
    """The worker's name on RunPod, which sets it."""
    log_format: Annotated[Literal["json", "text"], BeforeValidator(_lower)] = "json"
    """Of every line: the worker's, vLLM's and the SDK's."""
    log_prompts: Boolean = False
    """Whether prompts and completions are written to the log."""
    vllm_logging_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"
    """Of vLLM's lines."""
    otel_exporter_otlp_endpoint: str | None = None
    """Where traces go; by default nowhere."""
    otel_exporter_otlp_protocol: Literal["grpc", "http/protobuf"] = "grpc"
    """How traces go there."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"
    """Of the worker's own lines."""

    @field_validator("worker_api_key", "media_allowed_domains", "media_allowed_ports", mode="before")
    @classmethod
    def _split(cls, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        if text.lstrip().startswith("["):
            # As a list of a YAML file arrives.
            return json.loads(text)
        if not (items := tuple(filter(None, map(str.strip, text.split(","))))):
            raise ValueError("expected one or more, separated by commas")
        return items

    def public(self) -> dict[str, Any]:
        """Return every setting that is no secret."""
        return {
            name: without_password(getattr(self, name)) if field.repr else "***"
            for name, field in type(self).model_fields.items()
            if field.repr or getattr(self, name)
        }

    @property
    def mode(self) -> Literal["queue", "http", "local"]:
        """How jobs arrive."""
        if self.worker_mode != "auto":
            return self.worker_mode
        return "queue" if self.runpod_webhook_get_job else "http" if self.port else "local"

    @property
    def grace(self) -> float:
        """Seconds for what runs when the worker is told to leave."""
        if self.drain_seconds is not None:
            return self.drain_seconds
        # RunPod has been seen to remove a queue's container after three seconds.
        return 30.0 if self.mode == "http" else 2.5

    @property
    def http_port(self) -> int:
        """Where HTTP is served."""
        return self.port or (80 if self.runpod_pod_id else 8000)

    @property
    def otlp_traces_endpoint(self) -> str | None:
        """Where traces go, as vLLM wants it: over HTTP with the path that OpenTelemetry leaves to the client."""
        endpoint = self.otel_exporter_otlp_endpoint
        if endpoint and self.otel_exporter_otlp_protocol == "http/protobuf":
            return f"{endpoint.rstrip('/')}/v1/traces"
        return endpoint


def without_password(value: Any) -> Any:
    """Return a value without the user name and password of the URL that it may be."""
    return re.sub(r"//[^/@]*@", "//***@", value) if isinstance(value, str) else value


LIBRARY_DEFAULTS = {
    "RUNPOD_LOG_LEVEL": "INFO",
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    "RUNPOD_SKIP_GPU_CHECK": "true",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "OTEL_SERVICE_NAME": "runpod-vllm-worker",
}
"""What vLLM and the SDK are told unless the user says otherwise.

The SDK's DEBUG level prints every chunk of output. Its checks open a CUDA context in the worker's process and call a
public address; a model that has just generated a token proves more.
"""


OTHER_ALLOCATION = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "KV_TRANSFER_CONFIG"}
"""What says how memory is allocated, or cannot do, as sleep mode cannot, with segments that grow."""


def cache_root(environ: Mapping[str, str]) -> Path:
    """Return where vLLM keeps what it compiles."""
    return Path(environ.get("VLLM_CACHE_ROOT") or "~/.cache/vllm").expanduser()


def library_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the environment does not set of what vLLM and the SDK should be told."""
    defaults = dict(LIBRARY_DEFAULTS)
    if protocol := environ.get("OTEL_EXPORTER_OTLP_PROTOCOL"):
        # The only one of OpenTelemetry's two names that vLLM reads.
        defaults["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = protocol
    # Beside what vLLM itself compiles, so that one cache holds all of it.
    defaults["TRITON_CACHE_DIR"] = str(cache_root(environ) / "triton")
    defaults["FLASHINFER_WORKSPACE_BASE"] = str(cache_root(environ) / "flashinfer")
    sleeps = BOOLEANS.get(environ.get("ENABLE_SLEEP_MODE", "").strip().lower()) is True
    if not sleeps and not OTHER_ALLOCATION & environ.keys():
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # In a file it may have been said, too, and the Hub's library reads it here.
    token = {"HF_TOKEN": environ["HF_TOKEN"]} if "HF_TOKEN" in environ else {}
    return token | {name: value for name, value in defaults.items() if name not in environ}


BARE = (
    "MODEL_NAME",
    "WORKER_MODE",
    "RUNPOD_WEBHOOK_GET_JOB",
    "RUNPOD_POD_ID",
    "PORT",
    "PORT_HEALTH",
    "METRICS_PORT",
    "WORKER_API_KEY",
    "STARTUP_FAILURE",
    "LOG_FORMAT",
)
"""What has to be known of a worker to say that the rest of its settings is wrong."""


def bare(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the settings without which nobody can be told that the others are wrong."""
    return {name: environ[name] for name in BARE if name in environ}


def load(values: Mapping[str, str], told: Callable[[str], str] = str) -> Settings:
    """Read the worker's own settings; an empty variable counts as unset. `told` names a variable and its source.

    Raises:
        ConfigurationError: one line for each wrong value.
    """
    said = {name.lower(): value for name, value in values.items() if value.strip()}
    try:
        return Settings.model_validate(said)
    except ValidationError as error:
        lines = [f"{told(str(one['loc'][0]).upper())}={one['input']!r}: {one['msg']}" for one in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None
