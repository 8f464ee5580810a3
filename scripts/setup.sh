#!/usr/bin/env bash
# Get what the Makefile's targets need: Debian's packages where we may install them, and a Python environment in .venv.
# Quick where all is there; what takes long to get is kept outside the checkout.
#
# usage: scripts/setup.sh [python | demo | cluster | test]
#   the Python environment alone; what the demo needs too; what a Kubernetes needs too; all
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

# Words: the command that shows that it is there, and the Debian package that brings it.
demo_tools="docker-registry:docker-registry skopeo:skopeo buildah:buildah podman:podman runc:runc
  mmdebstrap:mmdebstrap qemu-aarch64-static:qemu-user-static update-binfmts:binfmt-support"
cluster_tools="$demo_tools containerd:containerd ip:iproute2 iptables:iptables
  /usr/lib/cni/bridge:containernetworking-plugins"
# A browser for the status page; promtool and Prometheus for rules and dashboard.
test_tools="$cluster_tools dockerd:docker.io chromium:chromium chromedriver:chromium-driver promtool:prometheus"

# Print the packages of those of the given words whose command is not there.
missing() {
  local word
  for word in "$@"; do
    command -v "${word%%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${word%%:*}" ] || printf '%s ' "${word##*:}"
  done
}

may_install() { [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ] && command -v apt-get >/dev/null; }

has_docker() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

install() {
  say "installing $*"
  # Recommended packages would be a desktop's worth of them.
  local options=(--quiet --quiet --yes --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  export DEBIAN_FRONTEND=noninteractive
  apt-get --quiet --quiet -o DPkg::Lock::Timeout=300 update >&2
  apt-get "${options[@]}" install "$@" >&2
}

system_packages() {
  local wanted
  wanted=$(missing "$@")
  find_python >/dev/null || wanted="$wanted python3 python3-venv"
  [ -z "${wanted// /}" ] && return
  if may_install; then
    # shellcheck disable=SC2086 # one word each
    install $wanted
  elif find_python >/dev/null && has_docker; then
    say "Not here: $wanted- Docker will do instead."
  else
    say "These are missing, and this script installs them only on Debian, as root: $wanted"
    say "Run 'sudo apt-get install --no-install-recommends $wanted' on Debian or Ubuntu, or start Docker; Python must"
    say "be 3.11, 3.12 or 3.13, with venv (PYTHON=/path/to/python names one)."
    exit 69
  fi
}

# Let the kernel start programs of other architectures; where it does not, only this machine's is built for.
emulation() {
  [ "$(id -u)" = 0 ] && command -v update-binfmts >/dev/null || return 0
  [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null || :
  local name
  for name in qemu-aarch64 qemu-arm; do
    [ -e "/proc/sys/fs/binfmt_misc/$name" ] || update-binfmts --enable "$name" 2>/dev/null || :
  done
}

python_environment() {
  local stamp uv
  stamp=$(fingerprint pyproject.toml requirements/*.txt)
  [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null && return
  say "making the Python environment .venv"
  uv=$(find_uv)
  "$uv" venv --quiet --clear --python "$(find_python)" "$venv"
  "$uv" pip sync --quiet --require-hashes --compile-bytecode --python "$venv" requirements/dev.txt
  "$uv" pip install --quiet --no-deps --no-build-isolation --python "$venv" --editable .
  printf '%s\n' "$stamp" >"$venv/.stamp"
}

case ${1:-test} in
  python) system_packages ;;
  demo) # shellcheck disable=SC2086
    system_packages $demo_tools && emulation ;;
  cluster) # shellcheck disable=SC2086
    system_packages $cluster_tools && emulation ;;
  test) # shellcheck disable=SC2086
    system_packages $test_tools && emulation ;;
  *) say "usage: $0 [python | demo | cluster | test]" && exit 64 ;;
esac
python_environment
