# shellcheck shell=bash
# shellcheck disable=SC2034 # the sourcing scripts use them
# Sourced by the other scripts: where things are kept, and the two tools that everything else is installed with.
# It also runs under macOS's bash 3.2, so that a laptop with Docker can run the demo.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/model-image-builder
venv=$checkout/.venv

# An environment is installed with its bytecode, or every start of a program compiles it again.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

# Print a word that changes with the content of the files.
fingerprint() { cat "$@" | cksum | tr ' ' '-'; }

# Print a Python that the project supports, the oldest first: what runs with it runs with the others.
find_python() {
  local name
  for name in ${PYTHON:-} /usr/bin/python3.11 python3.11 python3.12 python3.13 python3; do
    # A version manager may leave a command on PATH for a version that is not there.
    if "$name" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# Print uv at the version of its lock file, installed where it is not yet.
find_uv() {
  local folder
  folder=$cache/uv-$(fingerprint "$checkout/requirements/uv.txt")
  if ! [ -x "$folder/bin/uv" ]; then
    mkdir -p "$cache"
    "$(find_python)" -m venv --clear "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
      --requirement "$checkout/requirements/uv.txt" >&2
  fi
  printf '%s\n' "$folder/bin/uv"
}
