# syntax=docker/dockerfile:1
# Two images: `--target gpu` on vLLM's own, and `--target cpu` with the embedded model, to try it without a GPU.
ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS gpu
WORKDIR /worker
COPY builder/requirements.txt builder/
RUN python3 -m pip install --no-cache-dir --no-deps --requirement builder/requirements.txt
COPY handler.py test_input.json ./
COPY worker worker
ENTRYPOINT ["python3", "-u", "handler.py"]

FROM python:3.12-slim AS cpu
WORKDIR /worker
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ libgl1 libglib2.0-0 libnuma1 \
 && rm -rf /var/lib/apt/lists/*
COPY builder/requirements-cpu.txt builder/
RUN python3 -m pip install --no-cache-dir --no-deps --requirement builder/requirements-cpu.txt
COPY handler.py test_input.json ./
COPY worker worker
COPY tests/models/tiny-vlm tests/models/tiny-vlm
ENV MODEL_NAME=/worker/tests/models/tiny-vlm SERVED_MODEL_NAME=tiny MAX_MODEL_LEN=2048 MAX_NUM_SEQS=128 \
    ENFORCE_EAGER=true GPU_MEMORY_UTILIZATION=0.2 SKIP_MM_PROFILING=true VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
    ENABLE_AUTO_TOOL_CHOICE=true TOOL_CALL_PARSER=hermes REASONING_PARSER=qwen3 \
    DEFAULT_CHAT_TEMPLATE_KWARGS='{"enable_thinking": false}'
ENTRYPOINT ["python3", "-u", "handler.py"]
