"""Wheels made by the tests: good ones, and ones with one thing wrong."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from builder.wheels.install import Compiler, WheelLayer
from builder.wheels.wheel import open_wheel

NAME = "demo-1.0-py3-none-any.whl"
INFO = "demo-1.0.dist-info"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"opt/model/lib/python{PYTHON}/site-packages"
METADATA = b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"

Rows = dict[str, tuple[str, str]]
Patch = Callable[[bytearray], bytes | bytearray | None]


def digest(content: bytes, algorithm: str = "sha256") -> str:
    value = base64.urlsafe_b64encode(hashlib.new(algorithm, content).digest()).decode().rstrip("=")
    return f"{algorithm}={value}"


def entry(name: str, *, mode: int = 0o100644, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = method
    return info


def make(
    folder: Path,
    files: Mapping[str, bytes | None] | None = None,
    *,
    name: str = NAME,
    modes: Mapping[str, int] | None = None,
    methods: Mapping[str, int] | None = None,
    rows: Callable[[Rows], object] = lambda _rows: None,
    patch: Patch = lambda _data: None,
    unlisted: Mapping[str, bytes] | None = None,
    streamed: bool = False,
    zip64: bool = False,
) -> Path:
    """Write a wheel and return its path.

    Args:
        folder: where to write it.
        files: content by name, beside METADATA and WHEEL; None takes one of those away.
        name: of the wheel's file.
        modes: Unix mode by name.
        methods: compression method by name.
        rows: changes RECORD's rows.
        patch: changes, or replaces, the archive's bytes.
        unlisted: files that RECORD does not list; RECORD itself may be one of them.
        streamed: with data descriptors, as a writer makes that cannot go back.
        zip64: with 64-bit sizes in the local headers.
    """
    content: dict[str, bytes | None] = {f"{INFO}/METADATA": METADATA, f"{INFO}/WHEEL": WHEEL, **(files or {})}
    kept = {path: data for path, data in content.items() if data is not None}
    listed: Rows = {path: (digest(data), str(len(data))) for path, data in kept.items() if not path.endswith("/")}
    listed[f"{INFO}/RECORD"] = ("", "")
    rows(listed)
    record = "".join(f'"{path}",{hashed},{size}\n' for path, (hashed, size) in listed.items()).encode()
    everything = {**kept, f"{INFO}/RECORD": record, **(unlisted or {})}
    buffer = _Unseekable() if streamed else io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in everything.items():
            info = entry(
                path,
                mode=(modes or {}).get(path, 0o040755 if path.endswith("/") else 0o100644),
                method=(methods or {}).get(path, zipfile.ZIP_DEFLATED),
            )
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(data)
    data = bytearray(buffer.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(patch(data) or data)
    return path


class _Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation

    def seek(self, *_args: int) -> int:
        raise io.UnsupportedOperation


def compiler(**more: object) -> Compiler:
    """Return the interpreter of the tests as a compiler."""
    found = Compiler.find(PYTHON)
    assert found
    return dataclasses.replace(found, **more)


def built(path: Path, *, bytecode: Compiler | None = None) -> tuple[WheelLayer, bytes]:
    """Return a wheel's layer, read to its end, and its bytes."""
    layer = WheelLayer(open_wheel(path), python=PYTHON, bytecode=bytecode)
    return layer, b"".join(layer)


def unpacked(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Return mode and content of a layer's files by path."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return {member.name: (member.mode, archive.extractfile(member).read()) for member in archive if member.isfile()}


def central(data: bytes | bytearray, name: str) -> int:
    """Return where the central directory's entry of a member begins."""
    return _header(data, name, b"PK\x01\x02", 46)


def local(data: bytes | bytearray, name: str) -> int:
    """Return where a member's own header begins."""
    return _header(data, name, b"PK\x03\x04", 30)


def _header(data: bytes | bytearray, name: str, signature: bytes, size: int) -> int:
    position = -1
    while (position := data.find(signature, position + 1)) >= 0:
        if data[position + size : position + size + len(name.encode())] == name.encode():
            return position
    raise AssertionError(name)


def put(data: bytearray, offset: int, form: str, *values: int) -> None:
    """Write numbers in little-endian form over an archive's bytes."""
    struct.pack_into(f"<{form}", data, offset, *values)
