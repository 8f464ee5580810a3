"""Print what an image is made of: `python scripts/image_size.py ARCHIVE [MOST_MEGABYTES]`.

ARCHIVE is what `docker save` writes. Sizes are compressed as registries keep them (gzip, level 6), in MB of 1,000,000
bytes. Ends with 1 where the whole is larger than MOST_MEGABYTES.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import IO

# The part that a path belongs to: the first pattern that is found; its group, or the name behind it.
_PARTS = (
    (re.compile(r"^kaniko/venv/bin/(uv)$"), ""),
    (re.compile(r"^kaniko/venv/lib/[^/]+/site-packages/([A-Za-z0-9]+)[^/]*"), ""),
    (re.compile(r"^kaniko/compilers/([0-9.]+)/"), "compiler "),
    (re.compile(r"^kaniko/(python|lib|ssl)/"), ""),
)
_OTHER = "other"
_LEAST = 400_000
MEGABYTE = 1_000_000


def sizes(archive: Path) -> tuple[int, Counter[str]]:
    """Return the compressed size of an image's layers, and about how much of it each part has.

    Args:
        archive: what `docker save` writes.
    """
    whole, parts = 0, Counter[str]()
    with tarfile.open(archive) as saved:
        manifest = json.load(_file(saved, "manifest.json"))
        for name in manifest[0]["Layers"]:
            whole += sum(map(len, _compressed(_file(saved, name))))
            with tarfile.open(fileobj=_file(saved, name)) as layer:
                for member in layer:
                    if member.isreg():
                        content = layer.extractfile(member)
                        assert content is not None  # noqa: S101  # it is a file
                        parts[_part(member.name)] += sum(map(len, _compressed(content)))
    return whole, parts


def _part(path: str) -> str:
    found = ((pattern.search(path), prefix) for pattern, prefix in _PARTS)
    return next((prefix + match[1] for match, prefix in found if match), _OTHER)


def _file(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    if file is None:
        message = f"{name} is no file of the archive"
        raise ValueError(message)
    return file


def _compressed(file: IO[bytes]) -> list[bytes]:
    """Return a file as a gzip stream, in pieces; what is compressed already is left as it is."""
    compressor, pieces = zlib.compressobj(6, zlib.DEFLATED, 31), []
    first = True
    while chunk := file.read(1 << 20):
        if first and chunk.startswith(b"\x1f\x8b"):
            return [chunk, *iter(lambda: file.read(1 << 20), b"")]
        first = False
        pieces.append(compressor.compress(chunk))
    return [*pieces, compressor.flush()]


def main() -> None:
    """Print the table."""
    whole, parts = sizes(Path(sys.argv[1]))
    most = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0  # noqa: PLR2004  # the second argument
    small = sum(size for size in parts.values() if size < _LEAST)
    print(f"{whole / MEGABYTE:6.1f} MB  compressed, of which")
    for name, size in parts.most_common():
        if size >= _LEAST:
            print(f"{size / MEGABYTE:6.1f}     {name}")
    print(f"{small / MEGABYTE:6.1f}     smaller ones together")
    if most and whole > most * MEGABYTE:
        sys.exit(f"The image is larger than {most:g} MB compressed.")


if __name__ == "__main__":
    main()
