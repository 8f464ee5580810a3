"""Small things that are published as large ones are: packages, a base image of some bytes, model versions."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.oci import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, BytesBlob, Descriptor
from builder.reference import Digest, Platform, Reference
from builder.settings import Settings
from tests.package_index.server import PackageIndex, running
from tests.servers.mlflow import MlflowServer
from tests.servers.registries import RegistryServer
from tests.versions import MLMODEL, Registered, register

# Found by whoever looks for GNU's C library and its version in a file.
_GLIBC = b"\x7fELF" + b"GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n"
_STDLIB = Path(os.__file__).parent
_MODULES = ("argparse", "dataclasses", "enum", "inspect", "typing")
CLIENT = """\
import pathlib, sys
import small_lib, small_app
here = pathlib.Path(__file__).resolve().parent.parent
print("prediction", small_lib.predict((here / "mymodel/weights.txt").read_text()), small_app.WHO, sys.version_info[1])
"""
REQUIREMENTS = "small-app==1.0\n"


@pytest.fixture(scope="session")
def packages() -> Iterator[PackageIndex]:
    """An index of small packages: small-app needs small-lib; only-amd64 has wheels for one platform."""
    with running() as index:
        index.add(
            "small-lib",
            "1.0",
            files={"small_lib/__init__.py": b"def predict(text):\n    return int(text) + 1\n"},
            padding=b"lib" * 50_000,
        )
        index.add("small-app", "1.0", requires=["small-lib"], files={"small_app/__init__.py": b"WHO = 'small'\n"})
        # Code of which a compiler with another history can make other bytecode.
        modules = {f"much_code/{name}.py": (_STDLIB / f"{name}.py").read_bytes() for name in _MODULES}
        index.add("much-code", "1.0", files=modules)
        index.add("only-amd64", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
        index.add("needs-old", "1.0", requires=["small-lib<1"])
        for number in range(120):
            name = f"tiny-{number:03}"
            module = f"tiny_{number:03}/__init__.py"
            index.add(name, "1.0", files={module: f"NUMBER = {number}\n".encode()}, padding=b"x" * number)
        yield index


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return a layer's archive of files that everybody may execute."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            layer.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def rootfs(*, python: str = "3.11", musl: bool = False, occupied: bool = False) -> bytes:
    """Return the archive of a file system that has what a base image must have, and nothing that runs."""
    library = "lib/ld-musl-x86_64.so.1" if musl else "lib/x86_64-linux-gnu/libc.so.6"
    files = {f"usr/local/bin/python{python}": b"\x7fELF", library: _GLIBC}
    return archive(files | ({"opt/model/here": b""} if occupied else {}))


def push_base(
    host: str,
    name: str = "base/tiny:3.11",
    *,
    platforms: tuple[str, ...] = ("linux/amd64", "linux/arm64"),
    registries: Registries | None = None,
    layers: tuple[bytes, ...] = (),
    config: Mapping[str, object] | None = None,
    **options: object,
) -> str:
    """Push a base image of one small layer for some platforms, and return its reference."""
    reference = Reference.parse(f"{host}/{name}")
    archives = layers or (rootfs(**options),)
    with contextlib.ExitStack() as stack:
        client = (registries or stack.enter_context(Registries())).for_host(host)
        repository = reference.repository

        def kept(content: bytes) -> bytes:
            client.push_blob(repository, BytesBlob(content))
            return content

        entries = []
        for platform in map(Platform.parse, platforms):
            blobs = [kept(gzip.compress(archive, 1, mtime=0)) for archive in archives]
            written = {
                "os": platform.os,
                "architecture": platform.architecture,
                **({"variant": platform.variant} if platform.variant else {}),
                "config": {"Env": ["LANG=C.UTF-8"], **(config or {})},
                "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(archive)) for archive in archives]},
            }
            manifest = {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": Descriptor.of(kept(json.dumps(written).encode()), OCI_CONFIG).to_json(),
                "layers": [Descriptor.of(blob, f"{OCI_LAYER}+gzip").to_json() for blob in blobs],
            }
            content = json.dumps(manifest).encode()
            client.put_manifest(repository, content, OCI_MANIFEST, Digest.of(content))
            entries.append(Descriptor.of(content, OCI_MANIFEST, platform).to_json())
        index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        client.put_manifest(repository, index, OCI_INDEX, reference.tag)
    return str(reference)


@pytest.fixture(scope="session")
def tiny_base(registry: RegistryServer) -> str:
    """A base image in `registry` for two platforms; nothing in it runs."""
    return push_base(registry.host)


def small_files(**changes: str | bytes | None) -> dict[str, str | bytes]:
    """Return the files of a version that is published by its wheels; None takes one away."""
    files: dict[str, str | bytes | None] = {
        "mymodel/MLmodel": MLMODEL,
        "mymodel/weights.txt": "41\n",
        "mymodel/requirements.txt": REQUIREMENTS,
        "client/app.py": CLIENT,
        **changes,
    }
    return {path: content for path, content in files.items() if content is not None}


@pytest.fixture
def small(mlflow_server: MlflowServer) -> Callable[..., Registered]:
    """Register a version with a client, whose requirements `packages` has; `files` changes its files."""

    def make(requirements: str = REQUIREMENTS, *, files: Mapping[str, str | bytes | None] | None = None, **options):
        changes = {"mymodel/requirements.txt": requirements, **(files or {})}
        return register(mlflow_server.uri, small_files(**changes), **options)

    return make


@pytest.fixture
def small_environ(
    mlflow_server: MlflowServer, registry: RegistryServer, packages: PackageIndex, tiny_base: str, tmp_path: Path
) -> Callable[..., dict[str, str]]:
    """Return the environment of a publisher: a namespace of its own in `registry`, so that it knows no layer."""

    def make(model: Registered, **changes: str) -> dict[str, str]:
        environ = {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": f"{registry.host}/{model.name}",
            "MODEL_NAME": model.name,
            "MODEL_VERSION": model.version,
            "BASE_IMAGE": tiny_base,
            "UV_DEFAULT_INDEX": packages.simple,
            "BUILDER_WORKSPACE": str(tmp_path / "workspace"),
            "LOG_FORMAT": "json",
        }
        return {name: value for name, value in {**environ, **changes}.items() if value}

    return make


@pytest.fixture
def small_settings(small_environ: Callable[..., dict[str, str]]) -> Callable[..., Settings]:
    """Return the settings of `small_environ`."""
    return lambda model, **changes: Settings.from_environ(small_environ(model, **changes))
