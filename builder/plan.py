"""The plan of a publish: computed before anything happens, printable, comparable, and written to plan.json.

Push believes plan.json and nothing that the build phase wrote: which model, which reference, which platforms, which
annotations, and which digest the tag had when the plan was made.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from builder.errors import InvalidVersion
from builder.models import Artifact, ModelVersion
from builder.oci.manifest import SOURCE_ID, Published
from builder.reference import Digest, Platform, Reference

AsPlatform = Annotated[
    Platform, BeforeValidator(lambda v: Platform.parse(v) if isinstance(v, str) else v), PlainSerializer(str)
]
AsDigest = Annotated[Digest, BeforeValidator(lambda v: Digest(v) if isinstance(v, str) else v), PlainSerializer(str)]
AsReference = Annotated[
    Reference, BeforeValidator(lambda v: Reference.parse(v) if isinstance(v, str) else v), PlainSerializer(str)
]

# `publish`: make every platform and move the tag. `extend`: make the missing platforms and join them with the present
# ones. `nothing`: every platform is present. `foreign`: the image is not ours, and there is no --force.
Action = Literal["publish", "extend", "nothing", "foreign"]


# `dockerfile`: an engine runs a Dockerfile. `wheels`: the image is assembled, and nothing runs.
Method = Literal["dockerfile", "wheels"]


class Base(BaseModel):
    """The base image of one platform, as it was when the plan was made.

    Attributes:
        name: the reference in the Dockerfile's last FROM, or BASE_IMAGE's; complete.
        digest: digest of what the reference named: an index or a manifest.
        diff_ids: the base's uncompressed layers for the platform, first to last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: AsDigest
    diff_ids: tuple[AsDigest, ...]


class Layers(BaseModel):
    """The state of an image's wheel layers in the registry.

    Attributes:
        known: how many are present.
        missing: the wheels of those that are missing.
        download: bytes of the missing wheels, as far as the index gives sizes.
        model: bytes of the model's and the client's own files, which are sent unless present.
        lacks: the parts of wheels that cannot be loaded without a missing library, for people; empty if a wheel is
            missing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    known: int
    missing: tuple[str, ...]
    download: int
    model: int
    lacks: tuple[str, ...] = ()


class Keep(BaseModel):
    """A platform whose image is already in the registry, and is left as it is.

    Attributes:
        platform: which.
        kept: digest of the image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["keep"] = "keep"
    platform: AsPlatform
    kept: AsDigest


class Build(BaseModel):
    """A platform whose image is made.

    Attributes:
        platform: which.
        method: how.
        base: the image it is based on; None if it is not known beforehand.
        layers: the state of its wheel layers in the registry; only in a plan for people.
        notes: what was added to its environment, and why, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Literal["build"] = "build"
    platform: AsPlatform
    method: Method = "dockerfile"
    base: Base | None = None
    layers: Layers | None = None
    notes: tuple[str, ...] = ()


Step = Annotated[Keep | Build, Field(discriminator="action")]


class Plan(BaseModel):
    """Everything that the later phases need to know.

    Attributes:
        version: the model version.
        target: the target's name.
        source_id: what the image is made from, 64 hexadecimal digits.
        reference: the tag.
        action: what to do.
        reason: why, for people.
        observed: digest that the tag had when the plan was made; None if it did not exist.
        observed_annotations: annotations of the image or the index with that digest.
        wanted: the platforms to publish for.
        platforms: what happens for each platform.
        artifacts: the version's files, of which the context has those that are needed; empty if nothing is built.
        changes: what has changed since the image was made, if nothing is built; for people.
        dockerfile: the rendered Dockerfile; empty if none is run.
        content_digest: digest of the downloaded files; None before the download.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ModelVersion
    target: str
    source_id: str
    reference: AsReference
    action: Action
    reason: str
    observed: AsDigest | None
    observed_annotations: dict[str, str] = Field(default_factory=dict)
    wanted: tuple[AsPlatform, ...]
    platforms: tuple[Step, ...]
    artifacts: tuple[Artifact, ...] = ()
    changes: tuple[str, ...] = ()
    dockerfile: str = ""
    content_digest: AsDigest | None = None

    @property
    def same_source(self) -> bool:
        """Whether the tag held an image of the same source when the plan was made."""
        return self.observed_annotations.get(SOURCE_ID) == self.source_id

    @property
    def builds(self) -> tuple[Platform, ...]:
        """The platforms whose image has to be made."""
        return tuple(step.platform for step in self.platforms if isinstance(step, Build))

    @property
    def keeps(self) -> tuple[Keep, ...]:
        """The platforms whose image is left as it is."""
        return tuple(step for step in self.platforms if isinstance(step, Keep))

    @property
    def all_platforms(self) -> tuple[Platform, ...]:
        """The platforms under the tag afterwards."""
        return tuple(step.platform for step in self.platforms)

    def made_by(self, method: Method) -> tuple[Build, ...]:
        """Return the steps whose image has to be made by a method."""
        return tuple(step for step in self.platforms if isinstance(step, Build) and step.method == method)


class Decision(BaseModel):
    """What to do about one version, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    reason: str
    platforms: tuple[Step, ...]


def decide(
    *,
    wanted: tuple[Platform, ...],
    existing: Published | None,
    source_id: str,
    reference: Reference,
    force: bool = False,
    rebuild: bool = False,
) -> Decision:
    """Return what has to happen so that the tag holds the source's image for every platform wanted. Pure.

    Args:
        wanted: the platforms to publish for.
        existing: the image under the tag; None if there is none.
        source_id: the source's id, 64 hexadecimal digits.
        reference: the tag.
        force: replace the existing image, regardless of its maker and its source.
        rebuild: make every platform again from the same source.

    Raises:
        InvalidVersion: the tag holds an image that we made from another source, and `force` is not given.
    """
    everything = tuple(Build(platform=platform) for platform in wanted)
    if existing is None:
        return Decision(action="publish", reason="the tag does not exist", platforms=everything)
    if existing.source_id is None:
        if force:
            return Decision(
                action="publish", reason="--force adopts an image that we did not make", platforms=everything
            )
        reason = "the image under the tag was not made by this publisher; --force replaces it"
        return Decision(action="foreign", reason=reason, platforms=())
    if existing.source_id != source_id:
        if not force:
            message = f"{reference} holds an image made from another source (id {existing.source_id[:12]}…)."
            remedy = (
                "The version's tags, or the model itself, have changed since it was published. Register a new version, "
                "or replace the image with --force."
            )
            raise InvalidVersion(message, remedy=remedy)
        return Decision(action="publish", reason="--force replaces another source's image", platforms=everything)
    if rebuild:
        # A platform that is no longer wanted may still be pulled, so it is made again too; --force drops it.
        others = () if force else tuple(platform for platform in sorted(existing.platforms) if platform not in wanted)
        again = (*everything, *(Build(platform=platform) for platform in others))
        return Decision(action="publish", reason="--rebuild makes every platform again", platforms=again)
    kept = tuple(
        Keep(platform=platform, kept=descriptor.digest) for platform, descriptor in sorted(existing.platforms.items())
    )
    missing = tuple(step for step in everything if step.platform not in existing.platforms)
    if not missing:
        return Decision(action="nothing", reason="the tag already holds the image of this source", platforms=kept)
    names = ", ".join(str(step.platform) for step in missing)
    return Decision(action="extend", reason=f"the image lacks {names}", platforms=(*kept, *missing))
