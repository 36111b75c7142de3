#!/usr/bin/env bash
# Several processes on this machine as one run, the way several hosts are: to try a launch out.
#   bash launch/local_multiprocess.sh 2 train --config=configs/countdown.py --workdir=runs/two
# On CPU each process has ECHORL_DEVICES virtual devices (4); with NVIDIA GPUs, process i has GPU i.
# Lines are marked with their process. Ctrl-C and SIGTERM save and stop all. The exit code is the
# first one that is not 0.
set -euo pipefail
usage() { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
if [ "${1:-}" = --help ]; then
  usage
  exit 0
elif [ $# -lt 2 ]; then
  usage >&2
  exit 2
fi
if ! command -v echorl >/dev/null; then
  # shellcheck source=launch/environment.sh
  . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  prepare_environment user
fi

processes="$1"
shift
port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export ECHORL_COORDINATOR="127.0.0.1:$port" ECHORL_PROCESSES="$processes"
ECHORL_SECRET="$(python3 -c 'import secrets; print(secrets.token_hex(16))')"
export ECHORL_SECRET
gpus=0
if [ "${JAX_PLATFORMS:-cuda}" != cpu ] && command -v nvidia-smi >/dev/null; then
  gpus="$(nvidia-smi --list-gpus | wc -l)"
fi
if [ "$gpus" -eq 0 ]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${ECHORL_DEVICES:-4}"
elif [ "$gpus" -lt "$processes" ]; then
  echo "local_multiprocess.sh: $processes processes, but $gpus GPU(s)" >&2
  exit 2
fi

children=()
for ((i = 0; i < processes; i++)); do
  [ "$gpus" -eq 0 ] || export CUDA_VISIBLE_DEVICES="$i"
  ECHORL_PROCESS_ID="$i" echorl "$@" > >(sed -u "s/^/[$i] /") 2>&1 &
  children+=($!)
done
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' TERM
# A terminal sends Ctrl-C to all of them itself.
trap : INT

code=0
for child in "${children[@]}"; do
  while :; do
    one=0
    wait "$child" || one=$?
    kill -0 "$child" 2>/dev/null || break
  done
  [ "$code" -ne 0 ] || code="$one"
done
exit "$code"
