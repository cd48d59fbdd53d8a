#!/bin/sh
# Runs the worker as the user `worker`, with the right to open ports below 1024. It runs as root with RUN_AS_ROOT=true, or
# if only root may write to the network volume or to DOWNLOAD_DIR. With `docker run --user` it keeps that user.
set -eu

as_worker="setpriv --reuid=worker --regid=worker --init-groups --no-new-privs"
as_worker="$as_worker --inh-caps=+net_bind_service --ambient-caps=+net_bind_service"

if [ "$(id -u)" != 0 ]; then
  # Another user than `worker` has no name, no home folder and no right to write to the image's caches.
  export USER="${USER:-worker}"
  [ -w "${HOME:-/}" ] || export HOME=/tmp
  [ -w "${VLLM_CACHE_ROOT:-/}" ] || export VLLM_CACHE_ROOT=/tmp/vllm
  exec python3 -u handler.py "$@"
fi

reason=
if [ "${RUN_AS_ROOT:-false}" = true ]; then
  reason="RUN_AS_ROOT is set"
elif ! $as_worker true; then
  reason="the container cannot change its user"
else
  for folder in "${BASE_PATH:-/runpod-volume}" "${DOWNLOAD_DIR:-}"; do
    if [ -d "$folder" ] && ! $as_worker test -w "$folder"; then
      reason="only root may write to $folder"
    fi
  done
fi

if [ -n "$reason" ]; then
  echo "Running as root: $reason" >&2
  exec python3 -u handler.py "$@"
fi
export HOME=/home/worker
exec $as_worker python3 -u handler.py "$@"
