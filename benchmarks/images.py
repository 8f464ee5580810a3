"""How large an image is in the registry."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

_OCI, _DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution.manifest"
_TYPES = f"{_OCI}.index.v1+json, {_OCI}.manifest.v1+json, {_DOCKER}.list.v2+json, {_DOCKER}.v2+json"


def compressed_size(reference: str) -> int:
    """Return the bytes of an image's layers and config as the registry holds them; of an index, its first image's.

    Args:
        reference: by tag, on a registry of this machine.
    """
    manifest = _image(reference)
    return sum(blob["size"] for blob in [*manifest["layers"], manifest["config"]])


def layers(reference: str) -> list[str]:
    """Return the digests of an image's layers, first to last; of an index, its first image's.

    Args:
        reference: by tag, on a registry of this machine.
    """
    return [layer["digest"] for layer in _image(reference)["layers"]]


def _image(reference: str) -> Any:  # as the JSON is
    host, _, rest = reference.partition("/")
    repository, _, tag = rest.rpartition(":")
    manifest = _manifest(host, repository, tag)
    if "manifests" in manifest:
        manifest = _manifest(host, repository, manifest["manifests"][0]["digest"])
    return manifest


def _manifest(host: str, repository: str, name: str) -> Any:  # as the JSON is
    asked = urllib.request.Request(f"http://{host}/v2/{repository}/manifests/{name}", headers={"Accept": _TYPES})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30) as answer:
        return json.load(answer)
