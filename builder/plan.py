"""What would happen: computed before anything does, printable, comparable, and written to plan.json.

Push believes plan.json and nothing that the build phase wrote: which model, which reference, which platforms, which
annotations, and which digest the tag had when the plan was made.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from builder.models.catalog import Artifact
from builder.models.version import ModelVersion
from builder.reference import Digest, Platform, Reference

AsPlatform = Annotated[
    Platform, BeforeValidator(lambda v: Platform.parse(v) if isinstance(v, str) else v), PlainSerializer(str)
]
AsDigest = Annotated[Digest, BeforeValidator(lambda v: Digest(v) if isinstance(v, str) else v), PlainSerializer(str)]
AsReference = Annotated[
    Reference, BeforeValidator(lambda v: Reference.parse(v) if isinstance(v, str) else v), PlainSerializer(str)
]

# `publish`: make every platform and move the tag. `extend`: make what is missing and join it with what is there.
# `nothing`: all is there. `foreign`: the tag is not ours, and nobody forced us.
Action = Literal["publish", "extend", "nothing", "foreign"]


class Base(BaseModel):
    """The base image of one platform, as it stood when the plan was made.

    Attributes:
        name: the reference in the Dockerfile's last FROM, complete.
        digest: digest of what the reference named: an index or a manifest.
        diff_ids: the base's uncompressed layers for the platform, first to last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    digest: AsDigest
    diff_ids: tuple[AsDigest, ...]


class PlatformPlan(BaseModel):
    """What happens for one platform: `build` makes its image, `keep` leaves the one that stands in the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    platform: AsPlatform
    action: Literal["build", "keep"]
    kept: AsDigest | None = None
    base: Base | None = None


class Plan(BaseModel):
    """Everything that the phases after it need to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ModelVersion
    target: str
    source_id: str
    method: Literal["dockerfile"]
    engine: str
    reference: AsReference
    action: Action
    reason: str
    observed: AsDigest | None
    platforms: tuple[PlatformPlan, ...]
    artifacts: tuple[Artifact, ...] = ()
    dockerfile: str = ""
    content_digest: AsDigest | None = None
