#!/usr/bin/env bash
# A run on a Cloud TPU slice, from one command on your own machine: asks for the slice as a queued
# resource (or takes the one of that name), waits for it, installs this checkout on all of its hosts,
# starts the run on all of them, follows the log, and begins again after a preemption or a failure
# until all steps are done.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5p-64 [options] -- train --config=FILE --workdir=DIR ...
#
# options:
#   --type=TYPE         v5litepod-16 (or v5e-16) and v6e-8 count chips; v5p-64 and v4-32 count cores,
#                       two to a chip
#   --version=IMAGE     TPU software other than the one of the type
#   --project=ID        another project than gcloud's default
#   --spot              a preemptible slice, at a lower price
#   --bucket=NAME       mount this bucket as runs/ on all hosts (make it with hierarchical
#                       namespace: checkpoints are committed by renaming a directory);
#                       --workdir=gs://NAME/DIR is short for --bucket=NAME and --workdir=runs/DIR
#   --extras=NAME,...   install these extras of the package too, such as wandb,gcs
#   --env=NAME,...      give these variables of your shell to the run, such as HF_TOKEN,WANDB_API_KEY
#                       or 'ECHORL_*'; values are copied in a file, never on a command line
#   --restarts=N        starts again at most N times (100)
#   --delete            give the slice back when the run is done
#   --dry-run           print every command instead of running it
#   --help
#
# The copy leaves out .git, environments, caches, runs/, data/, models/ and files over 20 MB: read
# rows and weights from gs://, the Hugging Face hub or the mounted bucket. On several hosts the
# workdir must be on storage that all share: the bucket, or a file share that you mount yourself.
# Ctrl-C stops following; the run goes on, and the same command follows again.
# docs/launch.md says more.
set -euo pipefail
exec 3>&1

usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "tpu_pod.sh: $*" >&2; exit 2; }

name="" zone="" type="" project="" version="" spot=no bucket="" extras="" variables="" restarts=100
delete=no dry=no
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --extras=*) extras="${1#*=}" ;;
    --env=*) variables="${1#*=}" ;;
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
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# Source of the images: docs.cloud.google.com/tpu/docs/runtimes.
case "$type" in v5e-*) type="v5litepod-${type#*-}" ;; esac
case "$type" in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  v[234]-*) image=tpu-ubuntu2204-base ;;
  *) image="" ;;
esac
[[ "$type" =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] && [ -n "$image$version" ] ||
  fail "--type=$type: known are v5litepod-16, v5p-64, v6e-8 and v4-32 with other sizes; --version=IMAGE allows others"
version="${version:-$image}"

words=()
workdir=""
for word in "$@"; do
  case "$word" in
    --workdir=gs://?*/?*)
      workdir="${word#--workdir=gs://}"
      [ "${bucket:-${workdir%%/*}}" = "${workdir%%/*}" ] || fail "$word is not in --bucket=$bucket"
      bucket="${workdir%%/*}" workdir="runs/${workdir#*/}"
      word="--workdir=$workdir"
      ;;
    --workdir=*://*) fail "$word: must be gs://BUCKET/DIR or a path on the hosts" ;;
    --workdir=?*) workdir="${word#--workdir=}" ;;
  esac
  words+=("$word")
done
[ -n "$workdir" ] || fail "--workdir=DIR is missing"
several=no
# In all generations a slice of up to 8 (chips or cores) is one host.
[ "${type##*-}" -le 8 ] || several=yes
case "$several$bucket:$workdir" in
  no* | *:/* | yes?*:runs/*) ;;
  *) fail "--workdir=$workdir is a folder of each host alone, and $type has several hosts: take gs://BUCKET/DIR, runs/DIR with --bucket=NAME, or the full path of a share that all mount" ;;
esac

case " $* " in *gs://*) case ",$extras," in *,gcs,*) ;; *) extras="${extras:+$extras,}gcs" ;; esac ;; esac
while read -r extra; do
  grep -q "^${extra:-tpu} = \[" "$root/pyproject.toml" || fail "--extras=$extra: pyproject.toml has no such extra"
done < <(tr , '\n' <<<"$extras")

# The names that --env asks for, each a variable that is exported here.
forwarded=""
while read -r pattern; do
  before="$forwarded"
  while read -r variable; do
    # shellcheck disable=SC2053  # a pattern such as ECHORL_*
    [[ "$variable" != $pattern ]] || forwarded+=" $variable"
  done < <(compgen -e)
  [ -z "$pattern" ] || [ "$forwarded" != "$before" ] || fail "--env=$pattern: no such variable is exported here"
done < <(tr , '\n' <<<"$variables")

if [ "$dry" = yes ]; then
  stage="${TMPDIR:-/tmp}/echorl-$name"
else
  stage="$(mktemp -d)" # readable by this user alone
  trap 'rm -rf "$stage"' EXIT
fi

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
request() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
on_all() { tpu ssh --worker=all --command="$1"; }
on_first() { tpu ssh --worker=0 --command="$1"; }

# The request's state, such as WAITING_FOR_RESOURCES or ACTIVE; empty if there is none.
state() {
  if [ "$dry" = yes ]; then
    request describe "--format=value(state.state)" >&3
    echo ACTIVE
  else
    request describe "--format=value(state.state)" 2>/dev/null || true
  fi
}

create() {
  local options=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version")
  [ "$spot" = no ] || options+=(--spot)
  echo "== asking for $name ($type in $zone, $version)"
  request create "${options[@]}"
}

# Polls until the slice is there: 0 it is; 1 to ask again; 2 the request was refused.
wait_for_slice() {
  local found last="" start=$SECONDS
  while :; do
    found="$(state)"
    [ "$found" != ACTIVE ] || return 0
    if [ "$found" != "$last" ] || [ $(((SECONDS - start) % 600)) -lt 30 ]; then
      echo "== $name is ${found:-gone} after $(((SECONDS - start) / 60)) min (Ctrl-C keeps the place in the queue)"
    fi
    last="$found"
    case "$found" in
      CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES) sleep 30 ;;
      FAILED) request describe "--format=yaml(state)" >&2; return 2 ;;
      *) return 1 ;;
    esac
  done
}

give_back() { request delete --force --quiet; }

# The archive: this checkout without what is large or private, and the forwarded variables.
pack() {
  local file variable excluded=()
  for file in './.*' ./runs ./data ./models ./build ./dist ./site ./wandb ./mlruns __pycache__ '*.egg-info'; do
    excluded+=("--exclude=$file")
  done
  while IFS= read -r file; do
    echo "== left out, over 20 MB: $file"
    excluded+=("--exclude=$file")
  done < <(cd "$root" && find . \( -path './.*' -o -path ./runs -o -path ./data -o -path ./models \) -prune -o -type f -size +20M -print)
  [ -z "$forwarded" ] || echo "== launch.env gives the run$forwarded, readable by your user alone"
  if [ "$dry" = no ]; then
    for variable in $forwarded; do
      printf 'export %s=%q\n' "$variable" "${!variable}"
    done | (umask 077 && cat >"$stage/launch.env")
  fi
  run tar --create --gzip "--file=$stage/source.tar.gz" "${excluded[@]}" \
    "--directory=$root" . "--directory=$stage" launch.env || return 1
  [ "$dry" = yes ] || echo "== copying $(du -h "$stage/source.tar.gz" | cut -f1)B to all hosts"
}

install() {
  local pinned
  pinned="$(sed -n 's/^jax==//p' "$root/requirements.txt")"
  pack || return 1
  run gcloud compute tpus tpu-vm scp "$stage/source.tar.gz" "$name:echorl-source.tar.gz" "${where[@]}" --worker=all || return 1
  echo "== installing on all hosts"
  on_all "set -e
mkdir -p echorl && tar -xzf echorl-source.tar.gz -C echorl && rm echorl-source.tar.gz && cd echorl
if ! command -v python3.11 >/dev/null; then
  sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv python3.11
fi
[ -x .venv/bin/python ] || python3.11 -m venv .venv
.venv/bin/pip install -q -r requirements.txt 'jax[tpu]==$pinned' -e '.${extras:+[$extras]}'" || return 1
  [ -z "$bucket" ] || on_all "set -e
command -v gcsfuse >/dev/null || {
  echo \"deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add -
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
}
mkdir -p echorl/runs
mountpoint -q echorl/runs || gcsfuse --implicit-dirs $bucket echorl/runs"
}

# Checks that all hosts see a file that host 0 writes into the workdir: 2 if one does not.
share() {
  local mark found
  [ "$several" = yes ] || return 0
  mark="$(printf '%q' "$workdir/.seen-by-all")"
  on_first "cd echorl && mkdir -p $(printf '%q' "$workdir") && touch $mark" || return 1
  found="$(on_all "cd echorl && { [ -e $mark ] || echo not shared; }")" || return 1
  [ "$dry" = no ] || echo "$found"
  [ "$dry" = yes ] || [[ "$found" != *"not shared"* ]] || return 2
  on_first "cd echorl && rm -f $mark"
}

# Starts the run on all hosts, each apart from the connection that started it.
start() {
  local command
  command="$(printf '%q ' bash launch/attempt.sh .venv/bin/python -m echorl_jax "${words[@]}")"
  command="$(printf '%q' ". ./launch.env; $command; echo \$? > run.code")"
  echo "== starting on all hosts"
  on_all "cd echorl && { [ ! -e run.pid ] || ! kill -0 \$(cat run.pid) 2>/dev/null; } || exit 0
rm -f run.code
setsid nohup bash -c $command > run.log 2>&1 < /dev/null &
echo \$! > run.pid"
}

# Follows host 0's log until the run has ended there, then prints its exit code on the last line.
follow() {
  on_first "cd echorl && tail -n +1 -F --pid=\$(cat run.pid) run.log; echo; cat run.code"
}

# One attempt: 0 done, 2 to give up, anything else to begin again.
attempt() {
  local found code=0
  found="$(state)"
  case "$found" in
    "")
      create || {
        [ "$i" -gt 0 ] || fail "the slice cannot be asked for; gcloud's reason is above"
        return 1
      }
      ;;
    CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | ACTIVE) [ "$dry" = no ] || create ;;
    *)
      echo "== $name is $found: asking anew"
      give_back || return 1
      create || return 1
      ;;
  esac
  wait_for_slice || code=$?
  [ "$code" -ne 2 ] || fail "the request for $name was refused, for the reason above"
  [ "$code" -eq 0 ] || return 1
  install || return 1
  share || code=$?
  [ "$code" -ne 2 ] || fail "--workdir=$workdir: a file that host 0 wrote there is not seen by all hosts"
  [ "$code" -eq 0 ] || return 1
  start || return 1
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
  attempt || result=$?
  [ "$result" -ne 2 ] || fail "the run ended with a wrong option or file; its log is above"
  if [ "$result" -eq 0 ]; then
    if [ "$dry" = yes ]; then
      echo "== dry run: nothing was run; once all steps are done:"
    else
      echo "== all steps are done"
    fi
    [ "$delete" = no ] || give_back
    exit 0
  fi
  echo "== ended early; starting again ($((i + 1)) of $restarts)"
  sleep 30
done
echo "tpu_pod.sh: gave up after $restarts restarts" >&2
exit 1
