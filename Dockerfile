# syntax=docker/dockerfile:1
# Two images:
#   docker build --target gpu .   for GPUs, based on vLLM's image. VLLM_REPOSITORY and VLLM_TAG choose another base, such
#                                 as one for an older CUDA; MODEL_NAME adds a model (--secret id=HF_TOKEN if it is gated).
#   docker build --target cpu .   to try the worker without a GPU, based on plain Python, with the embedded model.
ARG VLLM_REPOSITORY=vllm/vllm-openai
ARG VLLM_TAG=v0.32.0

# Layers that rarely change come first: packages, bytecode, and vLLM's cache of model class properties.
FROM ${VLLM_REPOSITORY}:${VLLM_TAG} AS base
ENV VLLM_CACHE_ROOT=/var/cache/vllm PYTHONUNBUFFERED=1
WORKDIR /worker
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker
COPY builder/requirements.txt builder/install.py builder/
RUN python3 builder/install.py builder/requirements.txt
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
COPY builder/inspect_models.py builder/
RUN python3 builder/inspect_models.py && chown -R worker:worker /var/cache/vllm

# Downloads the model if MODEL_NAME is set. No layer contains the token.
FROM base AS model
ARG MODEL_NAME=""
ARG MODEL_REVISION=""
COPY builder/bake_model.py builder/
COPY worker worker
RUN --mount=type=secret,id=HF_TOKEN mkdir -p /models && python3 builder/bake_model.py

FROM base AS gpu
ARG MODEL_NAME=""
ARG MODEL_REVISION=""
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="RunPod vLLM worker" \
      org.opencontainers.image.description="Serves any model that vLLM runs from RunPod's queue or over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV MODEL_NAME=${MODEL_NAME} MODEL_REVISION=${MODEL_REVISION}
COPY --link --chown=10001:10001 --from=model /models /models
COPY handler.py test_input.json ./
COPY builder/entrypoint.sh builder/healthcheck.py builder/
COPY worker worker
RUN python3 -m compileall -q --invalidation-mode unchecked-hash handler.py worker
HEALTHCHECK --interval=30s --timeout=6s --start-period=30m --retries=3 CMD ["python3", "builder/healthcheck.py"]
ENTRYPOINT ["builder/entrypoint.sh"]

FROM python:3.12-slim AS cpu
ENV VLLM_CACHE_ROOT=/var/cache/vllm PYTHONUNBUFFERED=1
WORKDIR /worker
# vLLM needs a compiler: it compiles some code for the CPU when it starts.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ gcc libgl1 libglib2.0-0 libnuma1 util-linux \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker
COPY builder/requirements-cpu.txt builder/
RUN python3 -m pip install --no-cache-dir --no-deps --requirement builder/requirements-cpu.txt
COPY builder/inspect_models.py builder/
RUN python3 builder/inspect_models.py && chown -R worker:worker /var/cache/vllm
COPY handler.py test_input.json ./
COPY builder/entrypoint.sh builder/healthcheck.py builder/
COPY worker worker
COPY tests/models/tiny-vlm tests/models/tiny-vlm
ENV MODEL_NAME=/worker/tests/models/tiny-vlm SERVED_MODEL_NAME=tiny MAX_MODEL_LEN=2048 MAX_NUM_SEQS=128 \
    ENFORCE_EAGER=true GPU_MEMORY_UTILIZATION=0.2 SKIP_MM_PROFILING=true VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
    ENABLE_AUTO_TOOL_CHOICE=true TOOL_CALL_PARSER=hermes REASONING_PARSER=qwen3 \
    DEFAULT_CHAT_TEMPLATE_KWARGS='{"enable_thinking": false}'
HEALTHCHECK --interval=30s --timeout=6s --start-period=5m --retries=3 CMD ["python3", "builder/healthcheck.py"]
ENTRYPOINT ["builder/entrypoint.sh"]
