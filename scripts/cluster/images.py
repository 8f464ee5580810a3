"""Archives of the builder image of this checkout, built with Buildah and kept as long as nothing in it changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from scripts.cache import cache_folder, locked
from scripts.launch import clean_environ

_CHECKOUT = Path(__file__).parents[2]
_SOURCES = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml", "requirements/builder.txt")
_FOLDERS = ("builder", "docker", "templates")
# Of each variant: several checkouts may use the cache, and more would only take space.
_KEPT = 6


def builder_archive(kaniko: str = "scratch") -> tuple[Path, str]:
    """Build the builder image where it is not in the cache (about a minute, then seconds), as an archive like Docker's.

    Args:
        kaniko: the engine's image, or an archive of it; `scratch` for a builder without one.

    Returns:
        The archive, and the name of the image in it.

    Raises:
        subprocess.CalledProcessError: it cannot be built; the message is on stderr.
    """
    variant = "builder" if kaniko == "scratch" else "builder-kaniko"
    key = _fingerprint(kaniko)
    name = f"localhost/{variant}:{key}"
    folder = cache_folder("builder-images")
    archive = folder / f"{variant}-{key}.tar"
    if archive.exists():
        # At once, and not only when another checkout's image is built.
        archive.touch()
        return archive, name
    with locked(folder / variant):
        if archive.exists():
            return archive, name
        loaded = f"localhost/kaniko:{key}" if Path(kaniko).is_file() else ""
        if loaded:
            _run("skopeo", "copy", "--quiet", f"docker-archive:{kaniko}", f"containers-storage:{loaded}")
        _run("scripts/image.sh", CONTAINER_TOOL="buildah", IMAGE=name, KANIKO_IMAGE=loaded or kaniko, REPORT="no")
        part = archive.with_suffix(".part")
        part.unlink(missing_ok=True)
        _run("skopeo", "copy", "--quiet", f"containers-storage:{name}", f"docker-archive:{part}:{name}")
        # The layers of its packages stay, for the next one.
        _run("buildah", "rmi", name, *([loaded] if loaded else []))
        part.rename(archive)
        kept = sorted(folder.glob(f"{variant}-[0-9a-f]*.tar"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in kept[_KEPT:]:
            path.unlink()
    return archive, name


def _fingerprint(kaniko: str) -> str:
    """Return a word that changes with what is in the image."""
    paths = [_CHECKOUT / name for name in _SOURCES]
    for folder in _FOLDERS:
        paths += sorted(path for path in (_CHECKOUT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    digest = hashlib.sha256(f"{os.environ.get('PYTHON_IMAGE')}\n{kaniko}\n".encode())
    if Path(kaniko).is_file():
        digest.update(str(Path(kaniko).stat().st_mtime_ns).encode())
    for path in paths:
        digest.update(f"{path.relative_to(_CHECKOUT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _run(*command: str, **environ: str) -> None:
    done = subprocess.run(
        command, check=False, cwd=_CHECKOUT, env=clean_environ(**environ), capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout[-10_000:], done.stderr[-10_000:], sep="\n", file=sys.stderr)
        done.check_returncode()
