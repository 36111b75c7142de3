#!/usr/bin/env bash
# One attempt at a run, for launchers that start again: says whether there is more to do.
#   bash launch/attempt.sh COMMAND... --workdir=DIR ...
# Exit codes: 0 all steps are done; 75 stopped by a signal, with everything saved: start again;
# 2 wrong option, config or file: starting again does not help; anything else: it failed, start again.
# SIGTERM, SIGINT and SIGUSR1 are passed on to the command.
set -uo pipefail

workdir=""
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
case "$workdir" in
  "") echo "attempt.sh: --workdir=DIR is missing" >&2; exit 2 ;;
  *://*) echo "attempt.sh: --workdir=$workdir: must be a path, such as a mounted bucket, to see how far the run is" >&2; exit 2 ;;
esac

"$@" &
child=$!
for name in TERM INT USR1; do
  # shellcheck disable=SC2064  # the number of the child now, not then
  trap "kill -$name $child 2>/dev/null" "$name"
done
code=0
# A signal ends `wait` early; the command is then still saving.
while :; do
  wait "$child" && code=0 || code=$?
  kill -0 "$child" 2>/dev/null || break
done

[ "$code" -eq 0 ] || exit "$code"
total="$(sed -n 's/^  "steps": \([0-9]*\),\{0,1\}$/\1/p' "$workdir/config.json" 2>/dev/null | head -n 1)"
done_steps="$(tail -n 1 "$workdir/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\)[,}].*/\1/p')"
# Stopped before the first step was logged.
[ -s "$workdir/metrics.jsonl" ] || [ ! -e "$workdir/metrics.jsonl" ] || done_steps=0
if [ -z "$total" ] || [ -z "$done_steps" ]; then
  echo "attempt.sh: no config.json and metrics.jsonl in $workdir" >&2
  exit 1
fi
[ "$done_steps" -ge "$total" ] || { echo "attempt.sh: stopped after step $done_steps of $total"; exit 75; }
