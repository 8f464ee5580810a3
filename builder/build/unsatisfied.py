"""How a resolution fails, whichever resolver it was: in words that name the package, the platform and the ways out."""

from __future__ import annotations

from collections.abc import Sequence

from builder.errors import BuildFailed, InvalidVersion, one_line
from builder.reference import Platform

_MOST_SAID = 700


class NoWheel(BuildFailed):
    """A package has no wheel for a platform, so that only an engine could build it there, if there is source.

    Args:
        package: its normal name.
        platform: which one.
        said: the resolver's own words; empty for none.
        systems: the platform tags of the only files that there are, where these are wheels for other systems.
    """

    def __init__(self, package: str, platform: Platform, said: str = "", *, systems: Sequence[str] = ()) -> None:
        why = f" ({one_line(said, _MOST_SAID)})" if said else ""
        self.package = package
        self.platform = platform
        self.buildable = not systems
        if systems:
            there = one_line(", ".join(systems), 200)
            message = f"{package} has no wheel for {platform}, and no engine can build it there: there is no source, "
            message += f"and only wheels for {there}."
            windows = all(system.startswith("win") for system in systems)
            marker = "sys_platform == 'win32'" if windows else "sys_platform != 'linux'"
            remedy = f"Leave {package}, or what requires it, out of the model's requirements, or ask for it where it "
            remedy += f"belongs (`{package}; {marker}`), and register the model again."
            super().__init__(message, remedy=remedy)
            return
        remedy = (
            "Build this platform with an engine (BUILD_ENGINE) or a Dockerfile.template, configure an index that has "
            "the wheel, pin a version that has one, log the wheel with the model, or leave the platform out "
            "(MODEL_PLATFORMS)."
        )
        super().__init__(f"{package} has no wheel for {platform}{why}.", remedy=remedy)


class Unsatisfiable(InvalidVersion):
    """No set of packages fulfils the requirements.

    Args:
        platform: what was resolved for.
        said: the resolver's own words.
    """

    def __init__(self, platform: Platform, said: str) -> None:
        message = f"The model's requirements cannot be fulfilled for {platform}: {one_line(said, _MOST_SAID)}"
        remedy = "Correct them and register the model again. RESOLVE_AS_OF=now takes packages newer than it, too."
        super().__init__(message, remedy=remedy)
        self.platform = platform
        self.said = said


def names_an_address(required: str, wheel: str = "A wheel") -> InvalidVersion:
    """Return the error for a wheel that requires what is at an address, and not what an index has.

    Args:
        required: what it requires.
        wheel: which one.
    """
    message = f"{wheel} requires {one_line(required, 200)!r}, which is at an address, and only indexes are asked."
    remedy = "Name it in the model's requirements.txt, and build the wheel again with the package's name alone."
    return InvalidVersion(message, remedy=remedy)
