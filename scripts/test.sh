#!/usr/bin/env bash
# Run the tests with coverage. Pytest's summary is the last line; the table of coverage stands before it.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m scripts.collected
exec .venv/bin/pytest --cov --cov-report=term "$@"
