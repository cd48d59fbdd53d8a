#!/bin/sh
# Builds the GPU image and pushes it as USER/runpod-vllm-worker:TAG. Usage: builder/build_and_push.sh USER TAG
# If MODEL_NAME is set, the image contains this model, downloaded with MODEL_REVISION and HF_TOKEN.
set -eu
[ $# -eq 2 ] || { echo "usage: $0 USER TAG" >&2; exit 2; }
cd "$(dirname "$0")/.."
IMAGE="$1/runpod-vllm-worker" TAG="$2" REVISION="$(git rev-parse HEAD)" HF_TOKEN="${HF_TOKEN:-}" \
  docker buildx bake --push gpu
