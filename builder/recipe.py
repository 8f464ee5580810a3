"""What an image of the wheels method is made from, as fetch found it out, and push carries it out.

It stands in the workspace beside the plan, with the addresses of wheels, which are no part of a lock.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.build.locked import Lock, LockedWheel
from builder.build.wheel_groups import Group, grouped
from builder.errors import UsageError
from builder.images.assembly import MOST_LAYERS
from builder.images.layer_store import Text
from builder.plan import AsDigest, AsPlatform
from builder.reference import Platform

# Where the folders of the model and of its client are in an image.
HOME = "/app"
# Layers that are kept for the model's files at least, so that the environment's do not depend on the model.
_MODEL_LAYERS = 24
_ENVIRONMENT_LAYERS = 1
# Wheels need five layers at least to be grouped in.
MOST_BASE_LAYERS = MOST_LAYERS - _MODEL_LAYERS - _ENVIRONMENT_LAYERS - 5


class PlatformRecipe(BaseModel):
    """One platform's environment.

    Attributes:
        platform: which.
        interpreter: the base's interpreter, an absolute path.
        base_layers: how many layers the base has.
        command: what a container runs, relative to the context's folder.
        lock: the wheels.
        libraries: names of the base's shared libraries; None where they are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: AsPlatform
    interpreter: str
    base_layers: int
    command: tuple[str, ...]
    lock: Lock
    libraries: tuple[str, ...] | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The wheels by the layers they stand in."""
        return grouped(self.lock.wheels, MOST_LAYERS - self.base_layers - _ENVIRONMENT_LAYERS - _MODEL_LAYERS)

    @property
    def model_layers(self) -> int:
        """The most layers of the model and its client: all that are left on this platform, whatever others have."""
        return MOST_LAYERS - self.base_layers - _ENVIRONMENT_LAYERS - len(self.groups)


class Recipe(BaseModel):
    """All platforms' environments, and how a container of the image is started.

    Attributes:
        python: the model's Python, `3.11`.
        model_folder: of the context.
        client_folder: of the context; empty where no client is in the image.
        indexes: package indexes that the model names beside the configured ones.
        requirements: digest of what is installed, as the locks were made from it.
        platforms: those that are made so.
        context: where the context was, a `file:` URL: wheels that were logged with the model lie below it.
        unkept: what was found out, and the registry did not take from the credential of fetch, which may only pull.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    model_folder: str
    client_folder: str = ""
    indexes: tuple[str, ...] = ()
    requirements: AsDigest
    platforms: tuple[PlatformRecipe, ...] = Field(default=())
    context: str
    unkept: tuple[Text, ...] = ()

    def within(self, context: Path) -> Recipe:
        """Return the recipe for a context that may have moved: each phase mounts the workspace where it likes."""
        here = context.absolute().as_uri()

        def moved(wheel: LockedWheel) -> LockedWheel:
            if wheel.origin != "model" or not wheel.url or not wheel.url.startswith(f"{self.context}/"):
                return wheel
            return wheel.model_copy(update={"url": here + wheel.url.removeprefix(self.context)})

        parts = (
            part.model_copy(
                update={"lock": part.lock.model_copy(update={"wheels": tuple(map(moved, part.lock.wheels))})}
            )
            for part in self.platforms
        )
        return self.model_copy(update={"platforms": tuple(parts), "context": here})

    def for_platform(self, platform: Platform) -> PlatformRecipe:
        """Return one platform's part.

        Raises:
            UsageError: there is none, so that the recipe is another plan's.
        """
        for part in self.platforms:
            if part.platform == platform:
                return part
        message = f"The workspace has no recipe for {platform}."
        raise UsageError(message, remedy="Run 'builder fetch' again, with the same BUILDER_WORKSPACE.")

    @classmethod
    def from_json(cls, content: bytes) -> Recipe:
        """Return the recipe that a workspace holds.

        Raises:
            UsageError: it is none of this program's.
        """
        try:
            return cls.model_validate_json(content)
        except (ValidationError, ValueError) as error:
            message = "The workspace holds a recipe that this program did not write."
            raise UsageError(message, remedy="Run 'builder fetch' again.") from error
