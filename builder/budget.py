"""What one version may take: seconds, processor time, memory, bytes and files, as a whole."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from builder.errors import OverBudget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from builder.models.catalog import Artifact
    from builder.models.version import ModelVersion
    from builder.settings import CatalogSettings

Bound = Literal["VERSION_TIMEOUT", "VERSION_PROCESSOR_TIME", "VERSION_MEMORY", "VERSION_BYTES"]
_REMEDY = "Make the version smaller, or raise {name}; docs/settings.md says what it bounds."
# A container's limit of memory, by cgroups of version 2 and 1. At three quarters of it, a version is ended and says so
# before the kernel ends whatever it chooses.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The bounds of one version's work; an engine's time, processor time and memory are no part of it.

    Attributes:
        seconds: wall-clock time.
        processor: seconds of processor time, of all processes together.
        memory: bytes of memory that are no file's, of all processes together.
        size: bytes on disk, in the folders that the work is done in.
    """

    seconds: float
    processor: float
    memory: int
    size: int

    @classmethod
    def of(cls, settings: CatalogSettings) -> Self:
        """Return the settings' budget; of memory no more than the container lets it have."""
        has = _container_memory()
        memory = int(settings.version_memory)
        return cls(
            seconds=settings.version_timeout,
            processor=settings.version_processor_time,
            memory=min(memory, int(has * _SHARE)) if has else memory,
            size=int(settings.version_bytes),
        )

    def exceeded(self, whose: str, bound: Bound, amount: float) -> OverBudget:
        """Return the error for a bound that was exceeded.

        Args:
            whose: the version.
            bound: the setting.
            amount: what was taken when it was noticed: seconds, or bytes.
        """
        taken = {
            "VERSION_TIMEOUT": f"more than {self.seconds:g} seconds",
            "VERSION_PROCESSOR_TIME": f"{amount:.0f} seconds of processor time, and may take {self.processor:g}",
            "VERSION_MEMORY": f"{_mib(amount)} of memory, and may take {_mib(self.memory)}",
            "VERSION_BYTES": f"{_mib(amount)} on disk, and may take {_mib(self.size)}",
        }[bound]
        message = f"The work on {whose} was ended: it took {taken} ({bound})."
        return OverBudget(message, remedy=_REMEDY.format(name=bound))


def out_of_memory(version: object) -> OverBudget:
    """Return the error for work that was refused memory by the limit that the budget sets."""
    message = f"The work on {version} took more memory than it may (VERSION_MEMORY)."
    return OverBudget(message, remedy=_REMEDY.format(name="VERSION_MEMORY"))


def check_listing(settings: CatalogSettings, version: ModelVersion, artifacts: Sequence[Artifact]) -> None:
    """Raise OverBudget if a version has more artifacts, or larger ones, than it may; nothing was downloaded yet."""
    if len(artifacts) > settings.version_files:
        message = f"{version} has {len(artifacts)} artifacts, and may have {settings.version_files} (VERSION_FILES)."
        raise OverBudget(message, remedy=_REMEDY.format(name="VERSION_FILES"))
    size = sum(artifact.size or 0 for artifact in artifacts)
    if size > settings.version_bytes:
        message = (
            f"The artifacts of {version} have {_mib(size)}, and may have {_mib(settings.version_bytes)} "
            "(VERSION_BYTES)."
        )
        raise OverBudget(message, remedy=_REMEDY.format(name="VERSION_BYTES"))


def _mib(size: float) -> str:
    return f"{int(size) >> 20:,} MiB"


def _container_memory() -> int | None:
    """Return the bytes of memory that this container may have; None where nothing bounds it."""
    for path in _CONTAINER_LIMITS:
        with suppress(OSError, ValueError):
            return int(path.read_text())
    return None
