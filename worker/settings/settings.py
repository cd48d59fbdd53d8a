"""The worker's own settings as one frozen object. `flags.py` turns the other variables into vLLM's arguments."""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator

from worker import redaction
from worker.cluster.role import Role
from worker.settings.libraries import Libraries
from worker.settings.sources import DEFAULT_MODEL, Variables

MAX_CONCURRENCY = 512
"""The most requests at once that a worker accepts, whatever `MAX_CONCURRENCY` says."""
QUEUE_CONCURRENCY = 250
_KEY_NAME = re.compile(r"([\w.-]{1,64}):(?=.)", re.ASCII)

Lowercase = BeforeValidator(lambda text: text.strip().lower() if isinstance(text, str) else text)
Boolean = Annotated[bool, Lowercase]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(lambda text: text.strip().upper())]


class Settings(BaseModel):
    """The worker's settings. Each field is an environment variable of the same name in capitals."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_name: str = Field(default=DEFAULT_MODEL, min_length=1)
    """A Hugging Face model id (ORG/NAME) or a local folder."""
    model_revision: str | None = None
    """The branch, tag or commit of the model on the Hugging Face Hub."""
    model_subfolder: str | None = None
    """The folder within the repository that holds the model, if it is not the root."""
    base_path: str | None = None
    """Where the volume is mounted. Its model cache is searched, and models are downloaded to it. Default: `/workspace`
    on a pod, `/runpod-volume` elsewhere."""
    download_dir: str | None = None
    """The folder to download models to. Default: the volume's cache, or the folder that `HF_HOME` sets. If it is not
    writable, the worker uses another folder and logs a warning."""
    hf_token: str | None = None
    """The Hugging Face token for gated and private models."""
    compile_cache: Annotated[Literal["auto", "off"], Lowercase] = "auto"
    """`auto` keeps vLLM's compiled code on the network volume for the next worker; `off` does not."""
    compile_cache_gb: float = Field(default=10.0, gt=0)
    """The size limit of the compile cache on the network volume, in GB."""
    skip_fit_check: Boolean = False
    """Load the model even if the worker's estimate says that it does not fit into GPU memory."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """The most requests at once; more than 512 count as 512. Default: twice the engine's `max_num_seqs`, but at most
    512 over HTTP, and 250 from the queue."""
    job_batch_size: int = Field(default=16, ge=1)
    """The most jobs that a worker asks the queue for at once. Up to twice as many are on their way into its engine."""
    delivery_timeout: float = Field(default=900.0, gt=0)
    """Seconds for which a part or a result is posted again while RunPod does not accept it. Then the job is
    cancelled."""
    request_timeout: float | None = Field(default=None, gt=0)
    """Seconds after its complete arrival at which a request is ended with an error. Default: only the platform's own
    limit."""
    stream_batch_ms: float = Field(default=25.0, ge=0)
    """Milliseconds that a stream from the queue collects tokens before it sends them: this long while few streams run,
    up to four times as long while many do. 0 sends each token at once."""
    raw_stream_output: Boolean = False
    """Send the streams of jobs with `messages`, `prompt` or `route` as SSE text, as worker-vllm does, instead of lists
    of objects."""
    worker_mode: Annotated[Literal["auto", "queue", "http", "local"], Lowercase] = "auto"
    """How requests arrive. `auto`: from RunPod's queue if RunPod set one up; else over HTTP on RunPod, in the image, or
    if `PORT` is set; else one local job."""
    host: str = "0.0.0.0"  # noqa: S104 - inside a container
    """The address that the HTTP server listens on."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """The names by which callers may address a worker that listens on a loopback address without `WORKER_API_KEY`:
    another name comes from a web page that attacks it."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """The port of the HTTP server. Default: 80 on a load-balancing endpoint, 8000 elsewhere."""
    port_health: int | None = Field(default=None, ge=1, le=65535)
    """Another port for `/ping`, `/health`, `/info` and `/metrics`, in every mode."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Another port for `/ping`, `/health`, `/info` and `/metrics`, in every mode; for Prometheus."""
    worker_api_key: tuple[str, ...] = ()
    """The API keys that HTTP callers may use, separated by commas. `NAME:KEY` gives a key a name, which log lines and
    metrics show. Default: no key is needed."""
    max_request_bytes: int = Field(default=30_000_000, ge=1)
    """The largest request body over HTTP, in bytes."""
    max_total_request_bytes: int | None = Field(default=None, ge=1)
    """Memory for the bodies, downloads and decoded media of all requests together, in bytes. A request waits until it
    fits; one that is larger than this is refused. Default: a quarter of the container's memory."""
    max_queue: int | None = Field(default=None, ge=0)
    """HTTP requests that may wait beyond `MAX_CONCURRENCY`. Default: four times `MAX_CONCURRENCY`."""
    playground: Boolean = False
    """Serve a page at `/` to try the model in a browser. The page is public; its requests need a key."""
    media_fetch_timeout: float = Field(default=20.0, gt=0)
    """Seconds for downloading one file from a link."""
    media_allowed_domains: tuple[str, ...] = ()
    """The only hosts that links may point to; `*.example.org` means every subdomain. Default: all public hosts."""
    media_allowed_ports: tuple[int, ...] = (80, 443, 8080, 8443)
    """The only ports that links may point to."""
    media_allow_private_networks: Boolean = False
    """Allow links to private networks and to any port. For local development only."""
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    """The largest image file, in bytes."""
    max_video_bytes: int = Field(default=200_000_000, ge=1)
    """The largest video file, in bytes."""
    max_audio_bytes: int = Field(default=50_000_000, ge=1)
    """The largest audio file, in bytes."""
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    """The largest image, or video frame, in pixels."""
    image_downscale_pixels: int | None = Field(default=None, ge=1)
    """Scale larger images down to this many pixels. Default: images keep their size."""
    max_video_seconds: float = Field(default=600.0, gt=0)
    """The longest video, in seconds."""
    max_video_pixels: int = Field(default=1_000_000_000, ge=1)
    """The largest sum of pixels of all frames sampled from one video."""
    max_document_bytes: int = Field(default=50_000_000, ge=1)
    """The largest document file, in bytes."""
    max_document_pages: int = Field(default=50, ge=1)
    """The most pages of one document."""
    document_page_pixels: int = Field(default=2_000_000, ge=1)
    """The most pixels of one page: pages are drawn with 200 dots per inch, or fewer to stay within this."""
    document_decode_timeout: float = Field(default=60.0, gt=0)
    """Seconds for drawing the pages of one document."""
    video_max_frames: int | None = Field(default=None, ge=1)
    """The largest number of frames sampled from one video. Default: vLLM's own for the model."""
    media_decode_timeout: float = Field(default=120.0, gt=0)
    """Seconds for decoding one video or sound."""
    image_decode_timeout: float = Field(default=10.0, gt=0)
    """Seconds for decoding one image."""
    media_processes: int | None = Field(default=None, ge=1)
    """How many processes decode the media of one request at once; all requests together may use four times as many.
    Default: one for each CPU core, at most 8."""
    image_limit: int | None = Field(default=None, ge=0)
    """Images per request. Short for `image` in vLLM's `--limit-mm-per-prompt`. Default: 100, unless a preset or
    `--limit-mm-per-prompt` sets it."""
    video_limit: int | None = Field(default=None, ge=0)
    """Videos per request."""
    audio_limit: int | None = Field(default=None, ge=0)
    """Audio files per request."""
    drain_seconds: float | None = Field(default=None, ge=0)
    """Seconds that running requests get to finish when the worker is stopped. Default: 2.5 for the queue, 30 for
    HTTP."""
    unfinished_jobs: Annotated[Literal["fail", "leave"], Lowercase] = "fail"
    """What happens to a queue job without any output when the worker has to stop, or its engine dies: `fail` it, or
    `leave` it to RunPod, which may give it to another worker. Jobs with output always fail."""
    engine_stall_timeout: float = Field(default=300.0, gt=0)
    """Seconds without any sign of life after which an engine with requests counts as dead. No limit with
    `DISABLE_LOG_STATS`: the engine then sends nothing while it reads a long prompt."""
    cluster_port: int = Field(default=29560, ge=1, le=65535)
    """The port of the head of a cluster, on which its nodes agree and notice that one is lost."""
    cluster_timeout: float = Field(default=600.0, gt=0)
    """Seconds that the nodes of a cluster wait for each other when they start."""
    cluster_key: str | None = None
    """The key that a node needs to join the cluster: the same on every node. Default: derived from `WORKER_API_KEY`."""
    startup_failure: Annotated[Literal["report", "exit"], Lowercase] = "report"
    """What a worker does that cannot start: `report` the cause to its callers for a while, or `exit` at once."""
    lora_allow: tuple[str, ...] = ()
    """The LoRA adapters that a request may load by its `model`: names (ORG/NAME, or of folders in `ADAPTER_FOLDER`) or
    patterns such as `ORG/*`, separated by commas. Default: only the adapters in `LORA_MODULES`."""
    adapter_folder: str | None = None
    """A folder whose subfolders are LoRA adapters. Requests may load those that `LORA_ALLOW` matches."""
    max_batch_bytes: int = Field(default=10_000_000_000, ge=1)
    """The largest file that a batch may have as its input behind a link, in bytes."""
    batch_folder: str | None = None
    """The folder for `/v1/files` and `/v1/batches` over HTTP, for example on the network volume. Default: these routes
    answer 404."""
    batch_keep_days: float = Field(default=30.0, gt=0)
    """Days for which files and ended batches in `BATCH_FOLDER` are kept. A batch that has not ended by then expires."""
    max_batch_file_bytes: int = Field(default=1_000_000_000, ge=1)
    """The largest file that callers may upload to `BATCH_FOLDER`, in bytes."""
    max_batch_folder_bytes: int = Field(default=100_000_000_000, ge=1)
    """The most bytes of all files in `BATCH_FOLDER`: beyond it no file is accepted. Results of batches are still
    written."""
    result_folder: str | None = None
    """The folder that keeps results too large for RunPod's queue, for example on the network volume."""
    bucket_endpoint_url: str | None = None
    """The S3 server that keeps results too large for RunPod's queue. Default: a job's own `s3Config`."""
    bucket_name: str | None = None
    """The bucket on `BUCKET_ENDPOINT_URL`. Default: the first part of that URL's path, or else the month, such as
    `11-26`, as for RunPod's SDK."""
    bucket_access_key_id: str | None = None
    """The access key for `BUCKET_ENDPOINT_URL`."""
    bucket_secret_access_key: str | None = None
    """The secret for `BUCKET_ACCESS_KEY_ID`."""
    result_url_seconds: int = Field(default=604_800, ge=1, le=604_800)
    """Seconds for which the link to a stored result is valid; S3 allows seven days at most."""
    allow_control_routes: Boolean = False
    """Allow requests to all of vLLM's routes, including those that load LoRA adapters or start the profiler."""
    vllm_extra_args: str = ""
    """More vLLM flags, written as on a command line. They come last and win."""
    runpod_webhook_get_job: str | None = None
    """The URL for taking jobs from the queue. Set by RunPod."""
    runpod_endpoint_id: str | None = None
    """The endpoint that the worker belongs to. Set by RunPod, but not on a pod."""
    runpod_pod_id: str | None = None
    """The id of the worker or the pod. Set by RunPod."""
    worker_image: str | None = None
    """The version of the image. Set by the image."""
    log_format: Annotated[Literal["json", "text"], Lowercase] = "json"
    """The format of all log lines: the worker's, vLLM's and the RunPod SDK's."""
    log_prompts: Boolean = False
    """Write prompts and completions to the log."""
    vllm_logging_level: LogLevel = "INFO"
    """The log level of vLLM."""
    otel_exporter_otlp_endpoint: str | None = None
    """Where to send OpenTelemetry traces. Default: nowhere."""
    otel_exporter_otlp_protocol: Literal["grpc", "http/protobuf"] = "grpc"
    """The protocol for traces."""
    log_level: LogLevel = "INFO"
    """The log level of the worker."""

    _variables: Variables = PrivateAttr(default=Variables({}, {}))

    @field_validator(
        "worker_api_key", "allowed_hosts", "lora_allow", "media_allowed_domains", "media_allowed_ports", mode="before"
    )
    @classmethod
    def _split(cls, text: Any) -> Any:
        if not isinstance(text, str):
            return text
        if text.lstrip().startswith("["):
            # A list in the YAML file arrives as JSON.
            try:
                return json.loads(text)
            except ValueError:
                raise ValueError("expected a JSON list, or items separated by commas") from None
        if not (items := tuple(filter(None, map(str.strip, text.split(","))))):
            raise ValueError("expected one or more, separated by commas")
        return items

    @property
    def variables(self) -> Variables:
        """Every variable that is set, vLLM's included, and where each comes from."""
        return self._variables

    @cached_property
    def libraries(self) -> Libraries:
        """The variables of vLLM, CUDA and the Hugging Face libraries that the worker reads too."""
        return Libraries.of(self._variables.values)

    @cached_property
    def role(self) -> Role | None:
        """The machine's role in a cluster; None for a single machine, and where Ray connects the machines."""
        return Role.of(self._variables.values, self._variables.described)

    @property
    def is_follower(self) -> bool:
        """Whether this machine only computes for the head of a cluster."""
        return self.role is not None and self.role.is_follower

    def public(self) -> dict[str, Any]:
        """Return every setting without secrets; of the secret ones only those that are set, as `***`."""
        values = {name: redaction.public(getattr(self, name), name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value or not redaction.is_secret(name)}

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """Return the settings that pydantic prints."""
        return self.public().items()

    @property
    def mode(self) -> Literal["queue", "http", "local"]:
        """How requests arrive."""
        if self.worker_mode != "auto":
            return self.worker_mode
        if self.runpod_webhook_get_job:
            return "queue"
        return "http" if self.port or self.runpod_endpoint_id or self.runpod_pod_id or self.worker_image else "local"

    @cached_property
    def api_keys(self) -> dict[str, str]:
        """The API keys, and the name of each; "" for those without one."""
        named = map(_KEY_NAME.match, self.worker_api_key)
        return {
            key[match.end() :] if match else key: match[1] if match else ""
            for key, match in zip(self.worker_api_key, named, strict=True)
        }

    @property
    def is_pod(self) -> bool:
        """Whether the worker runs on one of RunPod's pods."""
        return bool(self.runpod_pod_id) and not self.runpod_endpoint_id

    @property
    def volume(self) -> Path:
        """Where the volume is mounted, if there is one."""
        return Path(self.base_path or ("/workspace" if self.is_pod else "/runpod-volume"))

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports to open in this mode; the HTTP server's own comes first."""
        has_http = self.mode == "http" or self.is_follower
        http = (self.port or (80 if self.runpod_endpoint_id else 8000)) if has_http else None
        return tuple(dict.fromkeys(port for port in (http, self.port_health, self.metrics_port) if port))

    @property
    def grace(self) -> float:
        """Seconds that running requests get when the worker is stopped."""
        if self.drain_seconds is not None:
            return self.drain_seconds
        # RunPod has been seen to remove a queue worker's container after three seconds.
        return 30.0 if self.mode == "http" else 2.5

    def concurrency(self, capacity: int) -> int:
        """Return the most requests at once for an engine that runs `capacity` at once."""
        limit = QUEUE_CONCURRENCY if self.mode == "queue" else MAX_CONCURRENCY
        return min(self.max_concurrency or min(2 * capacity, limit), MAX_CONCURRENCY)

    @property
    def otlp_traces_endpoint(self) -> str | None:
        """The endpoint for traces as vLLM wants it: for HTTP with the path that OpenTelemetry leaves to the client."""
        endpoint = self.otel_exporter_otlp_endpoint
        if endpoint and self.otel_exporter_otlp_protocol == "http/protobuf":
            return f"{endpoint.rstrip('/')}/v1/traces"
        return endpoint
