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
  # Whole files to each of two workers: fixtures of a file are made once.
  set -- -m "not slow" --numprocesses=2 --dist=loadfile --durations=10
fi
exec pytest "$@"
