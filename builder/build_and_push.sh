#!/bin/sh
# Builds the image for GPUs and pushes it: builder/build_and_push.sh USER TAG
# MODEL_NAME, MODEL_REVISION and HF_TOKEN in the environment put a model into it.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 USER TAG" >&2; exit 2; }
cd "$(dirname "$0")/.."
IMAGE="$1/runpod-vllm-worker" TAG="$2" REVISION="$(git rev-parse HEAD)" HF_TOKEN="${HF_TOKEN:-}" \
  docker buildx bake --push gpu
