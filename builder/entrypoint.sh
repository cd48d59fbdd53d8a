#!/bin/sh
# Runs the worker as the user `worker`, with the right to open ports below 1024. It runs as root with RUN_AS_ROOT=true, or
# if only root may write to the network volume.
set -eu

as_worker="setpriv --reuid=worker --regid=worker --init-groups --no-new-privs"
as_worker="$as_worker --inh-caps=+net_bind_service --ambient-caps=+net_bind_service"
volume="${BASE_PATH:-/runpod-volume}"

if [ "$(id -u)" != 0 ] || [ "${RUN_AS_ROOT:-false}" = true ]; then
  exec python3 -u handler.py "$@"
elif ! $as_worker true; then
  echo "Running as root: the container cannot change its user" >&2
elif [ -d "$volume" ] && ! $as_worker test -w "$volume"; then
  echo "Running as root: only root may write to $volume" >&2
else
  export HOME=/home/worker
  exec $as_worker python3 -u handler.py "$@"
fi
exec python3 -u handler.py "$@"
