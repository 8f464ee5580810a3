#!/usr/bin/env bash
# Build the builder image, and report its size.
#
# IMAGE          name of the image; model-image-builder where it is not set
# KANIKO_IMAGE   the engine's image; `scratch` for a builder without one. The Dockerfile's own where it is not set.
# PYTHON_IMAGE   where the interpreter comes from; made from Debian packages where no image can be pulled
# PYTHON_3_9_IMAGE to PYTHON_3_14_IMAGE   where the interpreters that only compile come from; likewise
# MOST_MEGABYTES bound of the compressed size; none where it is not set
# REPORT         `no` leaves out the sizes by part
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

default_of() { sed -n "s/^ARG $1=//p" Dockerfile; }

pulled() { "$tool" pull --quiet "$1" >/dev/null 2>&1; }

machine=
if [ -z "${PYTHON_IMAGE:-}" ] && ! pulled "$(default_of PYTHON_IMAGE)"; then
  say "$(default_of PYTHON_IMAGE) cannot be pulled: Python comes from Debian packages"
  scripts/setup.sh demo
  PYTHON_IMAGE=localhost/python-base:debian
  machine=$(.venv/bin/python -c 'from scripts.machine import native_platform; print(native_platform())')
  load "$(.venv/bin/python -m scripts.base_image "$machine")" "$PYTHON_IMAGE"
fi

interpreters=()
for minor in 9 10 11 12 13 14; do
  name=PYTHON_3_${minor}_IMAGE image=localhost/python-base:3.$minor
  if [ -n "${!name:-}" ]; then
    interpreters+=(--build-arg "$name=${!name}")
  elif [ -z "$machine" ] && pulled "$(default_of "$name")"; then
    :
  elif [ -n "$machine" ] && layout=$(.venv/bin/python -m scripts.base_image --interpreter "3.$minor" "$machine"); then
    load "$layout" "$image"
    interpreters+=(--build-arg "$name=$image")
  else
    say "no image of Python 3.$minor: models of it get no bytecode, unless the builder itself runs on it"
    interpreters+=(--build-arg "$name=${PYTHON_IMAGE:-$(default_of PYTHON_IMAGE)}")
  fi
done

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315619200)}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' builder/__init__.py)

arguments=(--tag "$IMAGE" ${PYTHON_IMAGE:+--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE"} "${interpreters[@]}")
arguments+=(--build-arg "REVISION=$revision" --build-arg "VERSION=$version")
arguments+=(--build-arg "CREATED=$(date --utc --date "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)")
[ -z "${KANIKO_IMAGE:-}" ] || arguments+=(--build-arg "KANIKO_IMAGE=$KANIKO_IMAGE")
[ "${KANIKO_IMAGE:-}" != scratch ] || arguments+=(--build-arg BUILDER_USER=65532)
if [ "$tool" = docker ]; then
  docker build --network=host "${arguments[@]}" "$context"
else
  # Every file has one constant time (1980-01-02), so that the same content gives the same digest; a label has the
  # commit's. Layers of an earlier commit stay usable.
  buildah build --isolation chroot --layers --timestamp 315619200 "${arguments[@]}" "$context"
fi
"$tool" images --no-trunc --format '{{.ID}}' "$IMAGE"
[ "${REPORT:-}" = no ] && exit
archive=$context/image.tar
if [ "$tool" = docker ]; then
  docker save --output "$archive" "$IMAGE"
else
  buildah push --quiet "$IMAGE" "docker-archive:$archive:$IMAGE" >/dev/null
fi
"$(find_python)" scripts/image_size.py "$archive" ${MOST_MEGABYTES:+"$MOST_MEGABYTES"}
