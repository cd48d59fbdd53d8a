#!/bin/sh
# Runs the worker as the user `worker`, with the right to open ports below 1024. It runs as root with RUN_AS_ROOT=true,
# or if only root may write to the volume or to DOWNLOAD_DIR. With `docker run --user` it keeps that user.
set -eu
handler="$(dirname "$0")/../handler.py"
as_worker="setpriv --reuid=worker --regid=worker --init-groups --no-new-privs"
as_worker="$as_worker --inh-caps=+net_bind_service --ambient-caps=+net_bind_service"

# As in worker/settings: a pod's volume is at /workspace. A pod has an id, but belongs to no endpoint.
volume=/runpod-volume
[ -z "${RUNPOD_POD_ID:-}" ] || [ -n "${RUNPOD_ENDPOINT_ID:-}" ] || volume=/workspace

run=
if [ "$(id -u)" = 0 ]; then
  reason=
  if [ "${RUN_AS_ROOT:-false}" = true ]; then
    reason="RUN_AS_ROOT is set"
  elif ! $as_worker true; then
    reason="the container cannot change its user"
  else
    for folder in "${BASE_PATH:-$volume}" "${DOWNLOAD_DIR:-}"; do
      if [ -d "$folder" ] && ! $as_worker test -w "$folder"; then
        reason="only root may write to $folder"
      fi
    done
  fi
  if [ -n "$reason" ]; then
    echo "Running as root: $reason" >&2
  else
    run=$as_worker
    export HOME=/home/worker
  fi
fi

# Another user than `worker` may have no name, no home folder and no right to write to the image's caches. On a
# read-only root file system nobody may write to them.
export USER="${USER:-worker}"
$run test -w "${HOME:-/none}" || export HOME=/tmp
if [ -n "${VLLM_CACHE_ROOT:-}" ] && ! { $run mkdir -p "$VLLM_CACHE_ROOT" && $run test -w "$VLLM_CACHE_ROOT"; }; then
  # vLLM starts faster with the properties of model classes that the image's build stored.
  if [ ! -e /tmp/vllm ] && [ -d "$VLLM_CACHE_ROOT/modelinfos" ]; then
    $run mkdir -p /tmp/vllm && $run cp -R "$VLLM_CACHE_ROOT/modelinfos" /tmp/vllm/ || true
  fi
  export VLLM_CACHE_ROOT=/tmp/vllm
fi
exec $run python3 -u "$handler" "$@"
