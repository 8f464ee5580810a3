"""Small OCI image layouts, as engines write them, and ways to spoil them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@dataclass
class Layout:
    """A layout that can be changed before and after it is written.

    Attributes:
        folder: where it is.
        layers: uncompressed tar files.
        platform: what the config says.
        index_platform: what index.json says; None says nothing, as Buildah does.
        layer_type: media type of the layers; one that ends in gzip compresses them.
        config: further fields of the image config.
        manifest_type: media type of the manifest.
        config_type: media type of the config.
    """

    folder: Path
    layers: Sequence[bytes]
    platform: dict[str, str]
    index_platform: dict[str, str] | None
    layer_type: str
    config: dict[str, Any]
    manifest_type: str
    config_type: str

    def blob(self, content: bytes, media_type: str = "application/octet-stream") -> dict[str, Any]:
        digest = sha256(content)
        (self.folder / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(content)
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def json_blob(self, value: Any, media_type: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), media_type)

    def path(self, descriptor: dict[str, Any]) -> Path:
        return self.folder / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")

    def image(self, **manifest: Any) -> dict[str, Any]:
        """Write layers, config and manifest, and return the manifest's descriptor."""
        compress = (lambda data: gzip.compress(data, mtime=0)) if self.layer_type.endswith("gzip") else bytes
        layers = [self.blob(compress(layer), self.layer_type) for layer in self.layers]
        config = {
            **self.platform,
            "created": "1970-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in self.layers]},
            **self.config,
        }
        body = {
            "schemaVersion": 2,
            "mediaType": self.manifest_type,
            "config": self.json_blob(config, self.config_type),
            "layers": layers,
            **manifest,
        }
        descriptor = self.json_blob(body, self.manifest_type)
        return {**descriptor, "platform": self.index_platform} if self.index_platform else descriptor

    def index(self, *manifests: dict[str, Any]) -> None:
        (self.folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(manifests)}))

    def manifest(self) -> dict[str, Any]:
        """Return the one manifest, read back."""
        entry = json.loads((self.folder / "index.json").read_text())["manifests"][0]
        return json.loads(self.path(entry).read_bytes())


def make_layout(
    folder: Path,
    *,
    layers: Sequence[bytes] | None = None,
    os: str = "linux",
    architecture: str = "amd64",
    variant: str = "",
    index_platform: dict[str, str] | None = None,
    layer_type: str = f"{LAYER}+gzip",
    config: dict[str, Any] | None = None,
    manifest_type: str = MANIFEST,
    config_type: str = CONFIG,
) -> Layout:
    """Write a layout of one image with two small layers."""
    (folder / "blobs/sha256").mkdir(parents=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    layout = Layout(
        folder=folder,
        layers=[tar("etc/one", b"1" * 1000), tar("etc/two", b"2" * 2000)] if layers is None else layers,
        platform={"os": os, "architecture": architecture, **({"variant": variant} if variant else {})},
        index_platform=index_platform,
        layer_type=layer_type,
        config=config or {},
        manifest_type=manifest_type,
        config_type=config_type,
    )
    layout.index(layout.image())
    return layout
