"""What an engine is: a program that runs a Dockerfile for one platform and leaves an OCI image layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from builder.reference import Platform, Repository

# Called with each line of the engine's output, without its newline.
Output = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How RUN steps and pulls reach the world; none of it stays in the image.

    Attributes:
        ca_bundle: file of CA certificates in PEM; None for the system's.
        pip_config: a pip.conf; None for none.
        proxies: HTTP_PROXY, HTTPS_PROXY, NO_PROXY that are set.
        index_variables: pip's and uv's index variables that are set; they may hold a credential.
        insecure_registries: hosts reached over plain HTTP, loopback not named.
        netrc: file of credentials by host, as pip and uv read it for package indexes; None for none.
    """

    ca_bundle: Path | None = None
    pip_config: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)
    index_variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    insecure_registries: frozenset[str] = frozenset()
    netrc: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """One run of an engine: one context, one platform, one layout.

    Attributes:
        context: folder the Dockerfile's COPY steps read; not written to.
        dockerfile: the rendered Dockerfile, a file in the context.
        platform: what to build for.
        layout: folder to write the OCI image layout into; must not exist or be empty.
        timeout: seconds the engine may take.
        network: see `Network`.
        docker_config: folder of a Docker config.json for pulls; None for anonymous pulls.
        cache: repository of the engine's layer cache, read only; None for none.
    """

    context: Path
    dockerfile: Path
    platform: Platform
    layout: Path
    timeout: float
    network: Network
    docker_config: Path | None = None
    cache: Repository | None = None


class Engine(Protocol):
    """Runs a Dockerfile, once per platform, and pushes nothing."""

    name: str

    def available(self) -> bool:
        """Return whether the engine's program is on this machine."""
        ...

    def build(self, job: BuildJob, output: Output) -> None:
        """Build one image into `job.layout`, as an OCI image layout with exactly one image.

        Raises:
            BuildFailed: the Dockerfile does not parse, its base cannot be had, a step fails, it takes too long, or the
                platform cannot be emulated here.
        """
        ...
