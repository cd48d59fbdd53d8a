#!/bin/sh
# Runs the worker as the user `worker` where that can be: where it may write to the network volume, if there is one, and
# open its port. Otherwise as root, and says why. RUN_AS_ROOT=true leaves it at root.
set -eu

as_worker="setpriv --reuid=worker --regid=worker --init-groups --no-new-privs"
volume="${BASE_PATH:-/runpod-volume}"
lowest_port=$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start 2>/dev/null || echo 1024)
# On RunPod, HTTP is served on port 80 where nothing else is said.
port="${PORT:-80}"

if [ "$(id -u)" != 0 ] || [ "${RUN_AS_ROOT:-false}" = true ]; then
  exec python3 -u handler.py "$@"
elif [ -d "$volume" ] && ! $as_worker test -w "$volume"; then
  echo "Running as root: only root may write to $volume" >&2
elif [ "${WORKER_MODE:-auto}" != queue ] && [ "$port" -lt "$lowest_port" ]; then
  echo "Running as root: only root may open port $port" >&2
else
  export HOME=/home/worker
  exec $as_worker python3 -u handler.py "$@"
fi
exec python3 -u handler.py "$@"
