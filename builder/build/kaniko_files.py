"""The files of one run of Kaniko: below its own folder, or named as a path that it leaves alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.pip_config import certificate, copy_bundle, pip_config
from builder.build.uv_config import uv_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.build.engine import BuildJob


@dataclass(frozen=True, slots=True)
class Files:
    """Our own files of one build.

    Attributes:
        folder: where they stand, below Kaniko's own folder.
        docker_config: folder of a Docker config.json, perhaps with no credential in it.
        ca_bundle: the CA bundle of the network; None for the system's.
        seen: configuration files outside that folder, for RUN steps.
    """

    folder: Path
    docker_config: Path
    ca_bundle: Path | None
    seen: tuple[Path, ...]


@contextmanager
def staged(job: BuildJob, root: Path, etc: Path) -> Iterator[Files]:
    """Put a build's files where Kaniko leaves them alone, and take them away again.

    Args:
        job: what is built.
        root: Kaniko's own folder.
        etc: the folder in which RUN steps look for pip's and uv's configuration.

    Raises:
        InvalidSettings: a file that the settings name cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=root) as name:
        folder = Path(name)
        folder.chmod(0o755)  # a RUN step of another user reads the CA bundle
        docker_config = folder / "docker"
        docker_config.mkdir(mode=0o700)
        if job.docker_config and (job.docker_config / "config.json").exists():
            shutil.copyfile(job.docker_config / "config.json", docker_config / "config.json")
        ca_bundle = _copied(job.network.ca_bundle, folder / "ca-bundle.pem")
        trusted = certificate(job.network)
        trusted = _copied(trusted, folder / "pip.pem") if trusted != job.network.ca_bundle else ca_bundle
        texts = {
            etc / "pip.conf": pip_config(job.network, str(trusted or "")),
            etc / "uv" / "uv.toml": uv_config(job.network),
        }
        with ExitStack() as stack:
            # What somebody mounted there is seen as it is, and Kaniko leaves mounts out of the image by itself.
            seen = tuple(path for path, text in texts.items() if text and not _is_mounted(path))
            for path in seen:
                stack.enter_context(_written(path, texts[path]))
            yield Files(folder, docker_config, ca_bundle, seen)


def _copied(source: Path | None, target: Path) -> Path | None:
    """Copy a file to where Kaniko leaves it alone and every RUN step can read it; None stays None."""
    if source is None:
        return None
    copy_bundle(source, target)
    return target


def _is_mounted(path: Path) -> bool:
    """Return whether something is mounted on exactly this path (proc(5), mountinfo's fifth field)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == str(path) for line in lines)


@contextmanager
def _written(path: Path, text: str) -> Iterator[None]:
    """Give a file this content for a while; afterwards it is as it was."""
    before = path.read_bytes() if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, text.encode())
    try:
        yield
    finally:
        _replace(path, before)


def _replace(path: Path, content: bytes | None) -> None:
    """Write a new file in a file's place, through no link that a RUN step may have left there; None removes it."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(content)
