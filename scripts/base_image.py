"""Make a small Python base image from Debian packages: `python -m scripts.base_image [PLATFORM …]`.

For machines that reach no image registry. The image is what `docker.io/library/python:3.11-slim` would be for the
program: Python 3.11, pip, venv, apt-get; for any of Debian's architectures, without emulation, in some seconds each.
Packages come from the mirror that this machine's apt is configured with. It is printed as the path of an OCI image
layout that holds one index. `python -m scripts.base_image --interpreter 3.9 [PLATFORM]` makes a smaller one, of another
Debian release's Python.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.cache import cache_folder, locked

SUITE = "bookworm"  # the Debian release whose Python is 3.11
_ARCHITECTURES = {
    "linux/amd64": "amd64",
    "linux/arm64": "arm64",
    "linux/arm/v7": "armhf",
    "linux/386": "i386",
    "linux/ppc64le": "ppc64el",
    "linux/s390x": "s390x",
}
_PACKAGES = (
    "apt,base-files,base-passwd,bash,ca-certificates,coreutils,dash,debianutils,diffutils,dpkg,findutils,grep,gzip,"
    "hostname,init-system-helpers,libc-bin,login,mawk,ncurses-base,passwd,perl-base,python3,python3-pip,python3-venv,"
    "sed,sysvinit-utils,tar,util-linux"
)
# Other versions of Python: the Debian release that has it.
INTERPRETERS = {"3.9": "bullseye", "3.13": "trixie"}
_HOOK = Path(__file__).with_name("debian_rootfs.py")
# 1980-01-02, the oldest day that both tar and zip can write: every file's time, so that the layer is always the same.
_EPOCH = 315619200
_CREATED = "1980-01-02T00:00:00Z"
_MEDIA = "application/vnd.oci.image"


class NoMirror(Exception):
    """This machine has no apt that names a Debian mirror."""


def base_layer(platform: str) -> Path:
    """Return the base image's one layer for `platform`, a compressed tar archive; cached.

    Raises:
        NoMirror: no Debian mirror is known.
        subprocess.CalledProcessError: mmdebstrap failed; its own message is on stderr.
    """
    folder = _folder()
    with locked(folder / "index"):
        return _layer(folder, _ARCHITECTURES[platform])


def base_image(platforms: Sequence[str]) -> Path:
    """Return an OCI image layout with one index of a Python 3.11 base image for `platforms`; cached.

    Args:
        platforms: such as `linux/amd64` and `linux/arm/v7`, in the order of the index.

    Raises:
        NoMirror: no Debian mirror is known.
        subprocess.CalledProcessError: mmdebstrap failed; its own message is on stderr.
    """
    folder = _folder()
    with locked(folder / "index"):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            layers = list(pool.map(lambda platform: _layer(folder, _ARCHITECTURES[platform]), platforms))
        layout = folder / "-".join(_ARCHITECTURES[platform] for platform in platforms)
        if not layout.exists():
            _write_layout(layout, dict(zip(platforms, layers, strict=True)))
    return layout


def interpreter_image(python: str, platform: str) -> Path:
    """Return an OCI image layout with a Python of another version, for the builder image's compilers; cached.

    It has nothing but that Python and what it needs.

    Args:
        python: a version in `INTERPRETERS`.
        platform: such as `linux/amd64`.

    Raises:
        NoMirror: no Debian mirror is known.
        subprocess.CalledProcessError: mmdebstrap failed; its own message is on stderr.
    """
    folder, architecture = _folder(), _ARCHITECTURES[platform]
    name = f"python{python}-{architecture}"
    with locked(folder / "index"):
        layer = folder / f"{name}.tar.gz"
        if not layer.exists():
            _extract(layer, architecture, INTERPRETERS[python], "python3")
        if not (folder / name).exists():
            _write_layout(folder / name, {platform: layer})
    return folder / name


def _folder() -> Path:
    """Return the folder of what this version of this file makes."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + _HOOK.read_bytes()).hexdigest()[:16]
    return cache_folder(f"base-image/{recipe}")


def _mirror() -> str:
    """Return the URI of the mirror that apt takes Debian's main packages from."""
    form = "$(REPO_URI) $(COMPONENT) $(LABEL)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        lines = []
    found = [line.split()[0] for line in lines if line.endswith(" main Debian")]
    if not found:
        message = "apt names no Debian mirror here: run 'apt-get update' on a Debian machine, or set BASE_IMAGE."
        raise NoMirror(message)
    return found[0]


def _layer(folder: Path, architecture: str) -> Path:
    """Return the compressed layer of one architecture; the file beside it holds the digest of its content."""
    path = folder / f"{architecture}.tar.gz"
    if not path.exists():
        hook = shlex.join([sys.executable, "-I", str(_HOOK)])
        bytecode = shlex.quote(str(cache_folder("base-image/bytecode")))
        _extract(path, architecture, SUITE, _PACKAGES, f'--extract-hook={hook} "$1" {bytecode}')
    return path


def _extract(path: Path, architecture: str, suite: str, packages: str, *options: str) -> None:
    """Write a layer of a Debian release's packages to `path`, and its diff id to the file beside it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        tar = Path(scratch) / "rootfs.tar"
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=extract",
            f"--architectures={architecture}",
            f"--include={packages}",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            *options,
            *_proxy_options(),
            suite,
            str(tar),
            _mirror(),
        ]
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": str(_EPOCH)})
        part = Path(scratch) / path.name
        digest = hashlib.sha256()
        # Fast rather than small: it never leaves this machine.
        with (
            tar.open("rb") as source,
            part.open("wb") as target,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=target, mtime=0) as packed,
        ):
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                packed.write(chunk)
        path.with_suffix(".diffid").write_text(f"sha256:{digest.hexdigest()}")
        part.rename(path)


def _proxy_options() -> list[str]:
    """Return the proxies that apt is configured with, as options of mmdebstrap, which reads no apt.conf."""
    dump = subprocess.run(
        ["apt-config", "dump", "--no-empty", "Acquire::http::Proxy"], check=True, capture_output=True, text=True
    )
    return [f"--aptopt={line}" for line in dump.stdout.splitlines()]


def _write_layout(layout: Path, layers: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(dir=layout.parent) as scratch:
        blobs = Path(scratch) / "layout" / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        manifests = [_manifest(blobs, platform, layer) for platform, layer in layers.items()]
        index = {"schemaVersion": 2, "mediaType": f"{_MEDIA}.index.v1+json", "manifests": manifests}
        top = _blob(blobs, index, f"{_MEDIA}.index.v1+json")
        root = blobs.parent.parent
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
        root.rename(layout)


def _manifest(blobs: Path, platform: str, layer: Path) -> dict[str, Any]:
    system, architecture, variant = (*platform.split("/"), "")[:3]
    named = {"os": system, "architecture": architecture, **({"variant": variant} if variant else {})}
    config = {
        "created": _CREATED,
        **named,
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"],
            "Cmd": ["python3"],
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.with_suffix(".diffid").read_text()]},
        "history": [{"created": _CREATED, "created_by": f"mmdebstrap {SUITE}"}],
    }
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shutil.copyfile(layer, blobs / digest)
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA}.manifest.v1+json",
        "config": _blob(blobs, config, f"{_MEDIA}.config.v1+json"),
        "layers": [
            {
                "mediaType": f"{_MEDIA}.layer.v1.tar+gzip",
                "digest": f"sha256:{digest}",
                "size": layer.stat().st_size,
            }
        ],
    }
    return {**_blob(blobs, manifest, f"{_MEDIA}.manifest.v1+json"), "platform": named}


def _blob(blobs: Path, content: dict[str, Any], media_type: str) -> dict[str, Any]:
    """Write a JSON blob and return its descriptor."""
    data = json.dumps(content, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--interpreter"]:
            print(interpreter_image(sys.argv[2], *sys.argv[3:4] or ["linux/amd64"]))
        else:
            print(base_image(sys.argv[1:] or ["linux/amd64", "linux/arm64", "linux/arm/v7"]))
    except NoMirror as error:
        sys.exit(str(error))
