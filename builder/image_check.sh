#!/usr/bin/env bash
# `make image-check`: builds both images, runs them in the ways that users do, and prints a table. The exit code is 1 if
# one of them fails. Takes about twenty minutes, and removes what it built.
#
# Needs docker or podman; as root on Debian it installs podman if both are missing. Without access to an image registry
# it makes python:3.12-slim with debootstrap, which has Debian's version of Python. vLLM's image for GPUs is too large
# for this check. In its place the GPU stage gets a base with vLLM for CPUs, without the packages that it installs.
#   ENGINE="podman --runtime runc"     the command, with its global options
#   BUILD_OPTIONS, RUN_OPTIONS         more options, such as --ulimit where the engine may not set its defaults
#   IMAGES="cpu gpu"                   the images to check
set -uo pipefail
cd "$(dirname "$0")/.." || exit

CONTAINER=worker-image-check
CPU=localhost/worker:check-cpu
GPU=localhost/worker:check-gpu
STAND_IN=localhost/vllm-openai:stand-in
BASE=docker.io/library/python:3.12-slim
made_base=
READY_SECONDS=300
WORK=$(mktemp -d)
# The embedded model, for the GPU image, which contains none.
TINY=(-v "$PWD/tests/models/tiny-vlm:/tiny:ro" -e MODEL_NAME=/tiny -e SERVED_MODEL_NAME=tiny -e MAX_MODEL_LEN=2048
  -e MAX_NUM_SEQS=128 -e ENFORCE_EAGER=true -e GPU_MEMORY_UTILIZATION=0.2 -e SKIP_MM_PROFILING=true
  -e VLLM_CPU_KVCACHE_SPACE=1 -e HF_HUB_OFFLINE=1)

main() {
  trap clean EXIT
  find_engine
  if ! [ -n "$($ENGINE images -q python:3.12-slim)" ] && ! $ENGINE pull -q python:3.12-slim >/dev/null 2>&1; then
    made_base=$BASE
    row "base made with debootstrap" make_base || return
  fi
  row "cpu: build" build "$CPU" --target cpu || return
  for name in ${IMAGES:-cpu gpu}; do
    image=$CPU settings=()
    if [ "$name" = gpu ]; then
      image=$GPU settings=("${TINY[@]}")
      row "gpu: stand-in for vLLM's image" make_stand_in || return
      row "gpu: build, without a target" build "$GPU" --build-arg "VLLM_REPOSITORY=${STAND_IN%:*}" \
        --build-arg "VLLM_TAG=${STAND_IN#*:}" || return
    fi
    check_image
  done
}

check_image() {
  row "$name: labels, port, entry point" has_metadata
  row "$name: --check" run -- --check
  row "$name: --check with \`python handler.py\`" run --entrypoint python -- handler.py --check
  row "$name: --check after another start command" run -- python3 /src/handler.py --check
  row "$name: one job" job
  row "$name: one job, read-only" job --read-only --tmpfs /tmp
  row "$name: one job, read-only, --user 1234" job --read-only --tmpfs /tmp --user 1234
  row "$name: HTTP, no volume" serve 10001
  row "$name: HTTP, read-only, fewest rights" serve 10001 --read-only --tmpfs /tmp --security-opt no-new-privileges \
    --cap-drop ALL --cap-add SETUID --cap-add SETGID --cap-add NET_BIND_SERVICE
  row "$name: HTTP, volume with folders of root" serve 10001 -v "$(volume 10001):/runpod-volume"
  row "$name: HTTP as a pod, volume of root" serve 0 -e RUNPOD_POD_ID=pod -v "$(volume 0):/workspace"
}

# Runs a check and adds a row to the table. What the check prints goes to the log.
row() {
  local title=$1 began=$SECONDS result=ok
  shift
  printf '== %s\n' "$title" | tee -a "$WORK/log" >&2
  : >"$WORK/detail"
  "$@" >>"$WORK/log" 2>&1 || result=FAILED
  [ "$result" = ok ] || tail -n 30 "$WORK/log" >&2
  printf '%-45s %-7s %5d s  %s\n' "$title" "$result" $((SECONDS - began)) "$(cat "$WORK/detail")" >>"$WORK/table"
  [ "$result" = ok ]
}

detail() { printf '%s' "$*" >"$WORK/detail"; }

find_engine() {
  if [ -z "${ENGINE:-}" ]; then
    if docker info >/dev/null 2>&1; then ENGINE=docker; else ENGINE=podman; fi
  fi
  case $ENGINE in
    *podman*)
      command -v podman >/dev/null ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends podman runc; } >/dev/null
      # An OCI image has no health check, an image in Docker's format does.
      BUILD_OPTIONS="--format docker --layers=false ${BUILD_OPTIONS:-}"
      ;;
  esac
}

make_base() {
  local root=$WORK/root mirror
  command -v debootstrap || apt-get install -y -qq --no-install-recommends debootstrap || return
  mirror=$(sed -n 's/^URIs: *//p; s/^deb \(\[.*\] \)\?\(http[^ ]*\) .*/\2/p' /etc/apt/sources.list \
    /etc/apt/sources.list.d/debian* 2>/dev/null | head -n 1)
  debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$root" "$mirror" || return
  # This machine's certificates, and permission to install packages without a virtual environment.
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
  ln -s python3 "$root/usr/bin/python"
  tar -C "$root" -c . |
    $ENGINE import --change "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" - "$BASE"
}

# Makes an image like vLLM's: vLLM in the system's Python, another entry point, neither `python` nor the added packages.
make_stand_in() {
  mkdir -p "$WORK/stand-in"
  grep -o '^[a-z][a-z0-9_-]*' builder/requirements.txt >"$WORK/stand-in/added.txt"
  cat >"$WORK/stand-in/Dockerfile" <<END
FROM python:3.12-slim
COPY --from=$CPU /usr /usr
COPY added.txt /added.txt
RUN python3 -m pip uninstall --yes --requirement /added.txt && rm -f /usr/bin/python /usr/local/bin/python
WORKDIR /vllm-workspace
ENTRYPOINT ["vllm", "serve"]
END
  $ENGINE build --network host ${BUILD_OPTIONS:-} -t "$STAND_IN" "$WORK/stand-in"
}

build() {
  local tag=$1
  shift
  # Buildah, which podman builds with, may not know --link. It changes only how layers are stored.
  sed 's/^COPY --link /COPY /' Dockerfile >"$WORK/Dockerfile"
  $ENGINE build --network host ${BUILD_OPTIONS:-} --build-arg VERSION=check "$@" -f "$WORK/Dockerfile" -t "$tag" . ||
    return
  detail "$($ENGINE image inspect --format '{{.Size}}' "$tag" | awk '{printf "%.1f GB", $1 / 1e9}')"
}

has_metadata() {
  local found text
  local expected=('"WORKER_IMAGE=check"' '"8000/tcp"' /worker/builder/entrypoint.sh /worker/builder/healthcheck.py)
  if [ "$name" = gpu ]; then
    expected+=('"org.opencontainers.image.version": "check"' '"org.opencontainers.image.licenses": "MIT"')
  fi
  found=$($ENGINE image inspect "$image")
  for text in "${expected[@]}"; do
    case $found in *"$text"*) ;; *) detail "missing: $text" && return 1 ;; esac
  done
}

# Runs the image without a network: options of the engine, --, and arguments of the worker.
run() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  # vLLM for CPUs needs 160 MB of shared memory; Docker's default is 64 MB.
  $ENGINE run --pull never --name "$CONTAINER" --network none --shm-size 1g ${RUN_OPTIONS:-} \
    "${settings[@]}" "${options[@]}" "$image" "$@"
  local code=$?
  case " ${options[*]} " in *" --detach "*) ;; *) $ENGINE rm --force "$CONTAINER" >/dev/null ;; esac
  return $code
}

# Runs the job in test_input.json. The exit code is 0 only if it succeeds.
job() { run -e WORKER_MODE=local "$@" --; }

# Starts a server, waits until its health check succeeds, and sends a request. $1: the user id that it must have.
serve() {
  local result=0
  run --detach "${@:2}" -- && becomes_healthy && runs_as "$1" && answers || result=1
  $ENGINE logs "$CONTAINER" 2>&1
  $ENGINE stop --time 20 "$CONTAINER" >/dev/null
  $ENGINE rm --force "$CONTAINER" >/dev/null
  return $result
}

# The health check must fail while the model is loaded, and then succeed.
becomes_healthy() {
  local began=$SECONDS code=1 loading="" text
  while [ "$code" != 0 ]; do
    if [ $((SECONDS - began)) -gt $READY_SECONDS ]; then detail "not healthy in time" && return 1; fi
    sleep 1
    text=$($ENGINE exec "$CONTAINER" python3 /worker/builder/healthcheck.py) && code=0 || code=$?
    echo "health check: $code $text"
    case $text in *loading*) loading=$code ;; esac
    [ "$($ENGINE inspect --format '{{.State.Running}}' "$CONTAINER")" = true ] || { detail "it stopped" && return 1; }
  done
  if [ "$loading" != 1 ]; then detail "healthy while loading" && return 1; fi
  detail "healthy after $((SECONDS - began)) s"
}

runs_as() {
  local user
  user=$($ENGINE exec "$CONTAINER" awk '/^Uid:/ {print $2}' /proc/1/status)
  [ "$user" = "$1" ] || { detail "runs as user $user instead of $1" && return 1; }
}

answers() {
  $ENGINE exec "$CONTAINER" python3 -c '
import json, urllib.request
body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"])' ||
    { detail "no answer" && return 1; }
}

# Makes a volume whose top folder belongs to the user id $1 and whose model cache belongs to root. Prints its path.
volume() {
  local folder
  folder=$(mktemp -d "$WORK/volume.XXXX")
  mkdir -p "$folder/huggingface-cache/hub"
  chmod -R 755 "$folder" && chown "$1" "$folder"
  echo "$folder"
}

clean() {
  $ENGINE rm --force "$CONTAINER" >/dev/null 2>&1
  # Debian's Python under the name of another image must not stay.
  $ENGINE rmi --force "$CPU" "$GPU" "$STAND_IN" $made_base >/dev/null 2>&1
  printf '\n%s, Linux %s\n' "$($ENGINE --version)" "$(uname -r)"
  cat "$WORK/table"
  local code=0
  if grep -q ' FAILED ' "$WORK/table"; then
    mv "$WORK/log" "$WORK.log" && echo "The log is in $WORK.log"
    code=1
  fi
  rm -rf "$WORK"
  exit $code
}

main
