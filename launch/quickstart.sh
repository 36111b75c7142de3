#!/usr/bin/env bash
# From a bare clone to a trained model and a report, on CPU, in minutes: GRPO + EchoRL on Countdown.
#   bash launch/quickstart.sh                         into runs/quickstart
#   bash launch/quickstart.sh runs/plain --config.echo.enabled=false    another directory, other options
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment user
exec echorl quickstart "$@"
