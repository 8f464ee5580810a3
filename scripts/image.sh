#!/usr/bin/env bash
# Build the builder image, and report its size.
#
# IMAGE          name of the image; model-image-builder where it is not set
# KANIKO_IMAGE   the engine's image; `scratch` for a builder without one. The Dockerfile's own where it is not set.
# PYTHON_IMAGE   where the interpreter comes from; made from Debian packages where no image can be pulled
# CONTAINER_TOOL docker or buildah; docker where its daemon answers
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

IMAGE=${IMAGE:-model-image-builder}
tool=${CONTAINER_TOOL:-}
if [ -z "$tool" ]; then
  if docker info >/dev/null 2>&1; then tool=docker; elif command -v buildah >/dev/null; then tool=buildah; fi
fi
if [ -z "$tool" ]; then
  say "The image is built with Docker or Buildah, and neither is here: start Docker, or 'apt-get install buildah'."
  exit 69
fi

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp -R Dockerfile .dockerignore LICENSE README.md builder docker pyproject.toml requirements templates "$context"
# The build finds its packages as this machine does; neither file is in the image.
for bundle in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}"; do
  if [ -f "$bundle" ]; then cp "$bundle" "$context/docker/ca-bundle.pem" && break; fi
done
for config in "${PIP_CONFIG_FILE:-}" /etc/pip.conf; do
  if [ -f "$config" ]; then cp "$config" "$context/docker/pip.conf" && break; fi
done

# Bring an OCI layout's image of this machine's platform to the tool, under a name.
load() {
  if [ "$tool" = docker ]; then
    skopeo copy --quiet "oci:$1" "docker-archive:$context/base.tar:$2"
    docker load --quiet --input "$context/base.tar" >&2
    rm "$context/base.tar"
  else
    skopeo copy --quiet "oci:$1" "containers-storage:$2"
  fi
}

default=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
if [ -z "${PYTHON_IMAGE:-}" ] && ! "$tool" pull --quiet "$default" >/dev/null 2>&1; then
  say "$default cannot be pulled: Python comes from Debian packages"
  scripts/setup.sh demo
  PYTHON_IMAGE=localhost/python-base:debian
  machine=$(.venv/bin/python -c 'from scripts.machine import native_platform; print(native_platform())')
  load "$(.venv/bin/python -m scripts.base_image "$machine")" "$PYTHON_IMAGE"
fi

arguments=(--tag "$IMAGE" ${PYTHON_IMAGE:+--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE"})
[ -z "${KANIKO_IMAGE:-}" ] || arguments+=(--build-arg "KANIKO_IMAGE=$KANIKO_IMAGE")
[ "${KANIKO_IMAGE:-}" != scratch ] || arguments+=(--build-arg BUILDER_USER=65532)
if [ "$tool" = docker ]; then
  docker build --network=host "${arguments[@]}" "$context"
else
  buildah build --isolation chroot --layers "${arguments[@]}" "$context"
fi
printf '%s %s\n' "$IMAGE" "$("$tool" images --format '{{.Size}}' "$IMAGE")"
