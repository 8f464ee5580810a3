#!/usr/bin/env bash
# Every check that runs nothing: all of them run, whichever fails.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PATH=$PWD/.venv/bin:$PATH
failed=()

check() {
  printf '%s\n' "$*"
  "$@" || failed+=("$*")
}

check ruff check --quiet .
check ruff format --check .
check mypy --no-error-summary
check lint-imports --no-logo
[ ! -f scripts/settings_table.py ] || check python -m scripts.settings_table --check
check python -m scripts.manifests --check
check python -m scripts.house --check

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
