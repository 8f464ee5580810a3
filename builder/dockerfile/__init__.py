"""BUILD_METHOD=dockerfile: templates, and the engines that run a Dockerfile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.errors import InvalidSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from builder.dockerfile.engine import Engine
    from builder.settings import BuildSettings


def select_engine(settings: BuildSettings, engines: Sequence[Engine] | None = None) -> Engine:
    """Return the engine that BUILD_ENGINE names, or the first one installed.

    Args:
        settings: BUILD_ENGINE is used.
        engines: what to choose from, in order; None for Kaniko and Buildah.

    Raises:
        InvalidSettings: that engine is not installed, or none is.
    """
    candidates = _engines() if engines is None else engines
    wanted = settings.build_engine
    for engine in candidates:
        if wanted in {"auto", engine.name} and engine.available():
            return engine
    ways_out = "Run in the builder image, which has Kaniko, or install Buildah (a package of every large distribution)."
    if wanted == "auto":
        message = "No engine can run a Dockerfile here: neither Kaniko nor Buildah is installed."
        raise InvalidSettings(message, remedy=ways_out)
    message = f"BUILD_ENGINE is {wanted}, which is not installed."
    raise InvalidSettings(message, remedy=f"{ways_out} BUILD_ENGINE=auto takes the one that is installed.")


def _engines() -> Sequence[Engine]:
    # Most publishes have nothing to build, and import neither.
    from builder.dockerfile.buildah import Buildah
    from builder.dockerfile.kaniko import Kaniko

    return Kaniko(), Buildah()
