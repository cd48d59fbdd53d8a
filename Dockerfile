# syntax=docker/dockerfile:1
# Two images. Both serve HTTP on port 8000, or take jobs from RunPod's queue where RunPod set one up.
#   docker build .                for GPUs, based on vLLM's image. VLLM_REPOSITORY and VLLM_TAG choose another base,
#                                 such as one for an older CUDA. MODEL_NAME adds a model, and --secret id=HF_TOKEN the
#                                 token for a gated one.
#   docker build --target cpu .   to try the worker without a GPU, based on plain Python, with the embedded model.
# The GPU image is the last stage, because RunPod builds the last stage.
ARG VLLM_REPOSITORY=vllm/vllm-openai
ARG VLLM_TAG=v0.32.0

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
RUN python3 builder/inspect_models.py && chown -R worker:worker /var/cache/vllm && chmod -R a+rX /var/cache/vllm
COPY handler.py test_input.json ./
COPY builder/entrypoint.sh builder/healthcheck.py builder/list_files.py builder/
COPY worker worker
COPY tests/models/tiny-vlm tests/models/tiny-vlm
RUN python3 -m compileall -q --invalidation-mode unchecked-hash handler.py worker \
 && PYTHONPATH=. python3 builder/list_files.py
ENV MODEL_NAME=/worker/tests/models/tiny-vlm SERVED_MODEL_NAME=tiny MAX_MODEL_LEN=2048 MAX_NUM_SEQS=128 \
    ENFORCE_EAGER=true GPU_MEMORY_UTILIZATION=0.2 SKIP_MM_PROFILING=true VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
    ENABLE_AUTO_TOOL_CHOICE=true TOOL_CALL_PARSER=hermes REASONING_PARSER=qwen3 \
    DEFAULT_CHAT_TEMPLATE_KWARGS='{"enable_thinking": false}'
ARG VERSION=dev
ENV WORKER_IMAGE=${VERSION}
EXPOSE 8000
# Failures before the start period ends do not count, so a container is `starting` while the model is loaded.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m --retries=3 \
  CMD ["python3", "/worker/builder/healthcheck.py"]
ENTRYPOINT ["/worker/builder/entrypoint.sh"]

# Layers that rarely change come first: packages, bytecode, and vLLM's cache of model class properties.
FROM ${VLLM_REPOSITORY}:${VLLM_TAG} AS base
ENV VLLM_CACHE_ROOT=/var/cache/vllm PYTHONUNBUFFERED=1
WORKDIR /worker
# RunPod's guides start a worker with `python handler.py`. /data is where compose.yaml mounts its volume.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin worker \
 && install --directory --owner=worker --group=worker /data \
 && { command -v python || ln -s "$(command -v python3)" /usr/local/bin/python; }
COPY builder/requirements.txt builder/install.py builder/
RUN python3 builder/install.py builder/requirements.txt
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash \
      "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
COPY builder/inspect_models.py builder/
RUN python3 builder/inspect_models.py && chown -R worker:worker /var/cache/vllm && chmod -R a+rX /var/cache/vllm

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
ENV MODEL_NAME=${MODEL_NAME} MODEL_REVISION=${MODEL_REVISION}
COPY --link --chown=10001:10001 --from=model /models /models
COPY handler.py test_input.json ./
COPY builder/entrypoint.sh builder/healthcheck.py builder/list_files.py builder/
COPY worker worker
RUN python3 -m compileall -q --invalidation-mode unchecked-hash handler.py worker \
 && PYTHONPATH=. python3 builder/list_files.py
# A build that is not told its version is `dev`: it claims no release.
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=https://github.com/OWNER/runpod-vllm-worker
LABEL org.opencontainers.image.title="RunPod vLLM worker" \
      org.opencontainers.image.description="Serves any model that vLLM runs from RunPod's queue or over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="MIT"
ENV WORKER_IMAGE=${VERSION}
EXPOSE 8000
# Failures before the start period ends do not count, so a container is `starting` while the model is loaded.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m --retries=3 \
  CMD ["python3", "/worker/builder/healthcheck.py"]
ENTRYPOINT ["/worker/builder/entrypoint.sh"]
