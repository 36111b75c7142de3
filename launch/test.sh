#!/usr/bin/env bash
# Makes the environment if needed, then runs linter, type checker and tests, as CI does.
#   bash launch/test.sh               everything but the slow tests
#   bash launch/test.sh -m slow       the slow ones (any pytest arguments; linters run only without)
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment dev
export JAX_PLATFORMS=cpu
if [ $# -eq 0 ]; then
  echo "== ruff"
  ruff check .
  ruff format --check .
  echo "== pyright"
  pyright
  echo "== pytest"
  set -- -m "not slow"
fi
exec pytest "$@"
