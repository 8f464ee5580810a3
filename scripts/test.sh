#!/usr/bin/env bash
# Run the tests with coverage, as many files at a time as there are processors. Pytest's summary is the last line; the
# table of coverage stands before it. PYTEST_ADDOPTS may say otherwise: `-n 0` for one process, `-p no:xdist`, `--no-cov`.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m scripts.collected
# In the variable, since what stands on the command line would overrule it. More than four would need much memory, for
# servers of their own.
case " ${PYTEST_ADDOPTS:-} $* " in
  *no:xdist*) ;;
  *) export PYTEST_ADDOPTS="--numprocesses=auto --maxprocesses=4 --dist=loadfile ${PYTEST_ADDOPTS:-}" ;;
esac
exec .venv/bin/pytest --cov --cov-report=term "$@"
