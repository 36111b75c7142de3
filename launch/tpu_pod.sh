#!/usr/bin/env bash
# A run on a Cloud TPU slice, from one command on your own machine: creates the slice (or takes the
# one of that name), installs this checkout on all of its hosts, starts the run on all of them,
# follows the log, and begins again after a preemption or a failure until all steps are done.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-64 [options] -- train --config=FILE --workdir=DIR ...
#
# options:
#   --project=ID        another project than gcloud's own
#   --version=IMAGE     TPU software (v2-alpha-tpuv5; v6e needs v2-alpha-tpuv6e)
#   --spot              a preemptible slice, at a lower price
#   --bucket=NAME       mount this bucket as runs/ on all hosts (make it with hierarchical
#                       namespace: checkpoints are committed by renaming a directory)
#   --restarts=N        starts again at most N times (100)
#   --delete            give the slice back when the run is done
#   --dry-run           print every command instead of running it
#   --help
#
# The workdir must be on storage that all hosts share: runs/... with --bucket, or a file share that
# you mount yourself. Ctrl-C stops following; the run goes on, and the same command follows again.
# docs/launch.md says more.
set -euo pipefail
exec 3>&1

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "tpu_pod.sh: $*" >&2; exit 2; }

name="" zone="" type="" project="" version=v2-alpha-tpuv5 spot=no bucket="" restarts=100 delete=no dry=no
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --dry-run) dry=yes ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1 (see --help)" ;;
  esac
  shift
done
[ -n "$name" ] || fail "--name=NAME is missing"
[ -n "$zone" ] || fail "--zone=ZONE is missing"
[ -n "$type" ] || fail "--type=TYPE is missing, such as v5p-64"
[ $# -gt 0 ] || fail "what to run is missing: -- train --config=FILE --workdir=DIR"
case " $* " in *" --workdir="*) ;; *) fail "--workdir=DIR is missing" ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# Runs a command, or prints it so that it could be pasted into a shell.
run() {
  if [ "$dry" = yes ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
on_all() { tpu ssh --worker=all --command="$1"; }
on_first() { tpu ssh --worker=0 --command="$1"; }

# The slice's state; empty if there is none.
state() {
  if [ "$dry" = yes ]; then
    tpu describe "--format=value(state)" >&3
  else
    tpu describe "--format=value(state)" 2>/dev/null || true
  fi
}

create() {
  local options=("--accelerator-type=$type" "--version=$version")
  [ "$spot" = no ] || options+=(--spot)
  echo "== creating $name ($type in $zone)"
  tpu create "${options[@]}"
}

install() {
  local archive=/tmp/echorl-source.tar.gz pinned mount=""
  pinned="$(sed -n 's/^jax==//p' "$root/requirements.txt")"
  echo "== installing on all hosts"
  run tar --create --gzip "--file=$archive" "--directory=$root" \
    --exclude=./.git --exclude=./.venv --exclude=./runs .
  run gcloud compute tpus tpu-vm scp "$archive" "$name:echorl-source.tar.gz" "${where[@]}" --worker=all
  on_all "set -e
mkdir -p echorl && tar -xzf echorl-source.tar.gz -C echorl && cd echorl
if ! command -v python3.11 >/dev/null; then
  sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv python3.11
fi
[ -x .venv/bin/python ] || python3.11 -m venv .venv
.venv/bin/pip install -q -r requirements.txt 'jax[tpu]==$pinned'
.venv/bin/pip install -q --no-deps -e ."
  if [ -n "$bucket" ]; then
    mount="mkdir -p echorl/runs
mountpoint -q echorl/runs || gcsfuse --implicit-dirs $bucket echorl/runs"
    on_all "command -v gcsfuse >/dev/null || {
  echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add -
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
$mount"
  fi
}

# Starts the run on all hosts, each apart from the connection that started it.
start() {
  local command
  command="$(printf '%q ' "$@")"
  echo "== starting on all hosts"
  on_all "cd echorl && { [ ! -e run.pid ] || ! kill -0 \$(cat run.pid) 2>/dev/null; } || exit 0
rm -f run.code
setsid nohup bash -c 'bash launch/attempt.sh .venv/bin/python -m echorl_jax $command; echo \$? > run.code' > run.log 2>&1 < /dev/null &
echo \$! > run.pid"
}

# Follows host 0's log until the run has ended there, then prints its exit code on the last line.
follow() {
  on_first "cd echorl && tail -n +1 -F --pid=\$(cat run.pid) run.log; echo; cat run.code"
}

# One attempt: 0 done, 2 to give up, anything else to begin again.
attempt() {
  local found code
  found="$(state)"
  if [ -n "$found" ] && [ "$found" != READY ] && [ "$found" != CREATING ]; then
    echo "== $name is $found: deleting it"
    tpu delete --quiet || return 1
    found=""
  fi
  if [ -z "$found" ]; then
    create || return 1
  fi
  install || return 1
  start "$@" || return 1
  if [ "$dry" = yes ]; then
    follow
    return 0
  fi
  code="$(follow | tee /dev/stderr | tail -n 1)" || return 1
  case "$code" in
    0 | 2) return "$code" ;;
    *) return 1 ;;
  esac
}

for ((i = 0; i <= restarts; i++)); do
  result=0
  attempt "$@" || result=$?
  [ "$result" -ne 2 ] || fail "the run ended with a wrong option or file; its log is above"
  if [ "$result" -eq 0 ]; then
    if [ "$dry" = yes ]; then
      echo "== dry run: nothing was run; once all steps are done:"
    else
      echo "== all steps are done"
    fi
    [ "$delete" = no ] || tpu delete --quiet
    exit 0
  fi
  echo "== ended early; starting again ($((i + 1)) of $restarts)"
  sleep 30
done
echo "tpu_pod.sh: gave up after $restarts restarts" >&2
exit 1
