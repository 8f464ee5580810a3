"""The model registry, as the rest of the program sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from builder.models.version import ModelVersion


class Artifact(BaseModel):
    """One file of a model version.

    Attributes:
        path: where it stands in the context, relative, with forward slashes, normalised and checked.
        size: bytes, as the artifact store tells; None where it does not.
        root: URI of the artifact folder it is in (the run's, or the logged model's).
        remote: its path below `root`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int | None
    root: str
    remote: str


class Catalog(Protocol):
    """Find, list, read and tag model versions. `MlflowCatalog` is the one on a server."""

    def find(self, name: str, version: str) -> ModelVersion:
        """Return one version, by number or by alias as `@alias`.

        Raises:
            VersionNotFound: there is no such model, version or alias.
            ServiceUnavailable: MLflow is away or answers with what it should not.
            PermissionRefused: MLflow refuses the credential.
        """
        ...

    def tagged(self, tag: str) -> Iterator[ModelVersion]:
        """Yield every version that carries `tag` with the value `true` in any case, page by page."""
        ...

    def artifacts(self, version: ModelVersion) -> tuple[Artifact, ...]:
        """Return the files of the version's context, ordered by path: the run's, and the logged model's below the
        model folder.

        Raises:
            InvalidVersion: a path is absolute, leaves the context, or collides with another one; or there is no file.
        """
        ...

    def download(self, artifact: Artifact, destination: Path) -> None:
        """Write one artifact's bytes to the file `destination`, whose folder exists."""
        ...

    def set_tags(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags on the version; others stay as they are."""
        ...
