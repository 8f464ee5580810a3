"""The files that a run of Buildah reads instead of the machine's: no ambient credential, policy or registry setting."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.dockerfile import Dockerfile
from builder.build.pip_config import certificate, copy_bundle, pip_config
from builder.build.uv_config import uv_config
from builder.errors import InvalidSettings, InvalidVersion
from builder.images.hosts import is_loopback
from builder.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.build.engine import BuildJob

# Where RUN steps see the CA bundles. Buildah leaves the empty folder in the image, and an empty /etc/pip.conf, where
# the base has none; what was in them is never there.
SEEN = Path("/run/builder")
SEEN_BUNDLE = SEEN / "ca-bundle.pem"
_SEEN_PIP_BUNDLE = SEEN / "pip.pem"


@dataclass(frozen=True, slots=True)
class Files:
    """One run's own files.

    Attributes:
        folder: all of them, and room for temporary ones; only this user can enter it.
        home: an empty home.
        authfile: the credentials for pulls, perhaps none.
        policy: the signature policy, which hosts often lack.
        registries: which hosts are reached over plain HTTP.
        containers: an empty containers.conf.
        image_id: file that Buildah writes the image's id to.
        ca_bundle: the CA bundle for Buildah's own pulls; None for the system's.
        volumes: pairs of a file or folder here and where RUN steps see it.
    """

    folder: Path
    home: Path
    authfile: Path
    policy: Path
    registries: Path
    containers: Path
    image_id: Path
    ca_bundle: Path | None
    volumes: tuple[tuple[Path, Path], ...]


@contextmanager
def staged(job: BuildJob, parent: Path) -> Iterator[Files]:
    """Write the files of a run into a new folder below `parent`, and remove it afterwards.

    Raises:
        InvalidSettings: a file that the settings name cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix=".buildah-", dir=parent) as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        yield Files(
            folder=folder,
            home=home,
            authfile=_authfile(job, folder / "auth.json"),
            policy=_written(folder / "policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]})),
            registries=_written(folder / "registries.conf", registries_conf(job)),
            containers=_written(folder / "containers.conf", ""),
            image_id=folder / "image-id",
            ca_bundle=job.network.ca_bundle,
            volumes=tuple(_volumes(job, folder)),
        )


def registries_conf(job: BuildJob) -> str:
    """Return a registries.conf: Docker Hub for short names; plain HTTP for the named hosts and for loopback.

    Loopback has a host for every port, so those that this job can meet are listed: its Dockerfile's and its cache's.
    """
    hosts = {*job.network.insecure_registries}
    images = Dockerfile.parse(job.dockerfile.read_text(errors="replace")).images(_platform_arguments(job))
    for image in images:
        try:
            hosts.add(Reference.parse(image).repository.host)
        except InvalidVersion:
            continue  # Buildah will say so
    if job.cache:
        hosts.add(job.cache.host)
    insecure = sorted(host for host in hosts if host in job.network.insecure_registries or is_loopback(host))
    entries = "".join(f"\n[[registry]]\nlocation = {json.dumps(host)}\ninsecure = true\n" for host in insecure)
    return f'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "disabled"\n{entries}'


def _platform_arguments(job: BuildJob) -> dict[str, str]:
    platform = job.platform
    return {
        "TARGETPLATFORM": str(platform),
        "TARGETOS": platform.os,
        "TARGETARCH": platform.architecture,
        "TARGETVARIANT": platform.variant,
    }


def _authfile(job: BuildJob, path: Path) -> Path:
    """Write the pull credentials: those of the job's Docker config, or none."""
    source = job.docker_config / "config.json" if job.docker_config else None
    content = "{}"
    if source is not None and source.is_file():
        try:
            content = source.read_text()
        except (OSError, UnicodeDecodeError) as error:
            message = f"{source} cannot be read: {type(error).__name__}."
            raise InvalidSettings(message, remedy="Name a folder with a config.json in BUILD_DOCKER_CONFIG.") from error
    return _written(path, content)


def _volumes(job: BuildJob, folder: Path) -> Iterator[tuple[Path, Path]]:
    network = job.network
    trusted = certificate(network)
    seen = folder / "seen"
    if network.ca_bundle or trusted:
        seen.mkdir()
        seen.chmod(0o755)  # a RUN step of another user reads it
        yield seen, SEEN
    if network.ca_bundle:
        copy_bundle(network.ca_bundle, seen / SEEN_BUNDLE.name)
    pip_bundle = SEEN_BUNDLE if network.ca_bundle else None
    if trusted and trusted != network.ca_bundle:
        copy_bundle(trusted, seen / _SEEN_PIP_BUNDLE.name)
        pip_bundle = _SEEN_PIP_BUNDLE
    if text := pip_config(network, str(pip_bundle or "")):
        yield _written(folder / "pip.conf", text, mode=0o644), Path("/etc/pip.conf")
    if text := uv_config(network):
        yield _written(folder / "uv.toml", text, mode=0o644), Path("/etc/uv/uv.toml")


def _written(path: Path, text: str, *, mode: int = 0o600) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    return path
