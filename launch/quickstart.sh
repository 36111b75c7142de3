#!/usr/bin/env bash
# From a bare clone to a trained model and a report, on CPU, in minutes: GRPO + EchoRL on Countdown.
#   bash launch/quickstart.sh                         into runs/quickstart
#   bash launch/quickstart.sh runs/plain --config.echo.enabled=false    another directory, other options
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment user
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

workdir="${1:-runs/quickstart}"
[ $# -gt 0 ] && shift
echo "== training: a 1M-parameter model on Countdown, GRPO + EchoRL, into $workdir"
echorl train --config=configs/countdown.py --workdir="$workdir" "$@"
cat <<NEXT

== where to go on
   look at the report:      open $workdir/report.html in a browser
   compare with plain GRPO: bash launch/quickstart.sh runs/plain --config.echo.enabled=false
                            .venv/bin/echorl report --workdir=$workdir --compare=runs/plain
   every option:            .venv/bin/echorl options
NEXT
