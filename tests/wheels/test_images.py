"""Wheel layers in an image: taken by readers that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from builder.wheels.install import WheelLayer
from builder.wheels.wheel import open_wheel
from tests.oci.layouts import CONFIG, MANIFEST, make_layout
from tests.wheels.made import INFO, PYTHON, SITE, compiler, make

FILES = {
    "demo/__init__.py": b"VALUE = 1\n" * 1000,
    "demo/gr\u00f6\u00dfe.txt": b"x" * 100_000,
    "demo/random.bin": os.urandom(300_000),
    "demo/" + "long/" * 40 + "name.py": b"x = 1\n",
    "demo/empty.py": b"",
    f"{INFO}/entry_points.txt": b"[console_scripts]\nrun = demo:main\n",
}


def write_image(folder: Path, *wheels: Path) -> tuple[dict[str, Any], list[str]]:
    """Write an image of these wheels' layers as a layout, and return its manifest and diff ids."""
    layout = make_layout(folder, layers=[])
    layers, diff_ids = [], []
    for wheel in wheels:
        layer = WheelLayer(open_wheel(wheel), python=PYTHON, bytecode=compiler())
        data = b"".join(layer)
        assert layout.blob(data)["digest"] == str(layer.layer.digest)
        layers.append(layer.layer.descriptor.to_json())
        diff_ids.append(str(layer.layer.diff_id))
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": layout.json_blob(config, CONFIG),
        "layers": layers,
    }
    layout.index(layout.json_blob(manifest, MANIFEST))
    return manifest, diff_ids


def test_crane_and_skopeo_take_a_layer_of_gzip_members(tmp_path, registry, crane):
    wheels = [
        make(tmp_path / "a", FILES),
        make(tmp_path / "b", {"demo/b.py": b"x = 2\n"}, methods={"demo/b.py": 0}, streamed=True),
    ]
    manifest, diff_ids = write_image(tmp_path / "layout", *wheels)
    reference = f"{registry.host}/wheels/demo:1"
    copy = [
        "skopeo",
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        f"oci:{tmp_path / 'layout'}",
        f"docker://{reference}",
    ]
    subprocess.run(copy, check=True, capture_output=True)

    # Go's reader of gzip members: size, digest, and that of what is within, of every layer.
    assert "PASS" in crane("validate", "--insecure", "--remote", reference)
    assert json.loads(crane("manifest", "--insecure", reference))["layers"] == manifest["layers"]
    flat = tmp_path / "flat.tar"
    crane("export", "--insecure", reference, str(flat))
    with tarfile.open(flat) as archive:
        for name, content in FILES.items():
            member = archive.extractfile(f"{SITE}/{name}")
            assert member
            assert member.read() == content

    # containers/image unpacks for a layout without compression, and checks every diff id.
    plain = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{reference}"]
    subprocess.run([*plain, f"docker-archive:{tmp_path / 'archive.tar'}:demo:1"], check=True, capture_output=True)
    with tarfile.open(tmp_path / "archive.tar") as archive:
        assert {f"{diff_id.removeprefix('sha256:')}.tar" for diff_id in diff_ids} <= set(archive.getnames())
