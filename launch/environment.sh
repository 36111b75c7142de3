# shellcheck shell=bash
# Sourced by the other scripts: makes .venv once, installs the pinned requirements and this package.
# ECHORL_VENV names another place, ECHORL_PYTHON another interpreter (3.11 or later).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root" || exit
venv="${ECHORL_VENV:-$root/.venv}"

prepare_environment() {
  local extras="$1" base="${ECHORL_PYTHON:-python3}" stamp
  stamp="$venv/.installed-$(cat requirements.txt requirements-dev.txt pyproject.toml | cksum | cut -d' ' -f1)-$extras"
  if [ ! -e "$stamp" ]; then
    command -v "$base" >/dev/null || { echo "$base not found: install Python 3.11 or later, or set ECHORL_PYTHON" >&2; exit 2; }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "Python 3.11 or later is needed, $base is $("$base" -V 2>&1); set ECHORL_PYTHON" >&2; exit 2; }
    echo "== environment: $venv (once, about 2 minutes)"
    [ -x "$venv/bin/python" ] || "$base" -m venv "$venv"
    local files=(-r requirements.txt)
    [ "$extras" = dev ] && files+=(-r requirements-dev.txt)
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${files[@]}"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    touch "$stamp"
  fi
  export PATH="$venv/bin:$PATH"
}
