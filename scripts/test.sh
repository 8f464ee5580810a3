#!/usr/bin/env bash
# Run the tests with coverage, as many files at a time as there are processors. Pytest's summary is the last line; the
# table of coverage stands before it. PYTEST_ADDOPTS may say otherwise: `-n 0` for one process, `-p no:xdist`, `--no-cov`.
# Those that need a Kubernetes are left to `scripts/test.sh cluster`, which runs nothing else, in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = cluster ]; then
  .venv/bin/python -m scripts.cluster build >/dev/null
  export PYTEST_ADDOPTS="-m cluster ${PYTEST_ADDOPTS:-}"
  exec .venv/bin/pytest --durations=10 "${@:2}"
fi
.venv/bin/python -m scripts.collected
export PYTEST_ADDOPTS="-m 'not cluster' ${PYTEST_ADDOPTS:-}"
# In the variable, since what stands on the command line would overrule it. More than four would need much memory, for
# servers of their own.
case " ${PYTEST_ADDOPTS:-} $* " in
  *no:xdist*) ;;
  *) export PYTEST_ADDOPTS="--numprocesses=auto --maxprocesses=4 --dist=loadfile ${PYTEST_ADDOPTS:-}" ;;
esac
exec .venv/bin/pytest --cov --cov-report=term "$@"
