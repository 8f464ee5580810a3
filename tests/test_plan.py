"""What is decided about a version, for every state of the registry."""

from __future__ import annotations

import pytest

from builder.errors import InvalidVersion
from builder.models import ModelVersion, wanted_platforms
from builder.oci import OCI_INDEX, OCI_MANIFEST, Descriptor
from builder.oci.manifest import Published
from builder.plan import Plan, decide
from builder.reference import Digest, Platform, Reference

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
TAG = Reference.parse("quay.io/domino/model:v1")
SOURCE, OTHER = "a" * 64, "b" * 64


def standing(*platforms: Platform, source_id: str | None = SOURCE) -> Published:
    images = {platform: Descriptor.of(str(platform).encode(), OCI_MANIFEST, platform) for platform in platforms}
    return Published(
        digest=Digest.of(repr(platforms).encode()),
        media_type=OCI_INDEX,
        source_id=source_id,
        platforms=images,
        annotations={},
    )


def steps(decision):
    return {str(step.platform): step.action for step in decision.platforms}


@pytest.mark.parametrize(
    ("existing", "wanted", "flags", "action", "expected"),
    [
        (None, (AMD64,), {}, "publish", {"linux/amd64": "build"}),
        (standing(AMD64), (AMD64,), {}, "nothing", {"linux/amd64": "keep"}),
        (standing(AMD64, ARM64), (AMD64,), {}, "nothing", {"linux/amd64": "keep", "linux/arm64": "keep"}),
        (standing(AMD64), (AMD64, ARM64), {}, "extend", {"linux/amd64": "keep", "linux/arm64": "build"}),
        (standing(AMD64), (ARM64,), {}, "extend", {"linux/amd64": "keep", "linux/arm64": "build"}),
        (standing(AMD64), (AMD64,), {"rebuild": True}, "publish", {"linux/amd64": "build"}),
        (
            standing(AMD64, ARM64),
            (AMD64,),
            {"rebuild": True},
            "publish",
            {"linux/amd64": "build", "linux/arm64": "build"},
        ),
        (standing(AMD64, ARM64), (AMD64,), {"rebuild": True, "force": True}, "publish", {"linux/amd64": "build"}),
        (standing(AMD64, source_id=None), (AMD64,), {}, "foreign", {}),
        (standing(AMD64, source_id=None), (AMD64,), {"rebuild": True}, "foreign", {}),
        (standing(AMD64, source_id=None), (AMD64,), {"force": True}, "publish", {"linux/amd64": "build"}),
        (standing(AMD64, source_id=OTHER), (AMD64,), {"force": True}, "publish", {"linux/amd64": "build"}),
        (standing(AMD64), (AMD64,), {"force": True}, "nothing", {"linux/amd64": "keep"}),
    ],
)
def test_the_decision_follows_from_the_existing_image_and_the_flags(existing, wanted, flags, action, expected):
    decision = decide(wanted=wanted, existing=existing, source_id=SOURCE, reference=TAG, **flags)
    assert decision.action == action
    assert steps(decision) == expected


@pytest.mark.parametrize("flags", [{}, {"rebuild": True}])
def test_another_sources_image_is_not_replaced_unless_forced(flags):
    with pytest.raises(InvalidVersion, match="--force"):
        decide(wanted=(AMD64,), existing=standing(AMD64, source_id=OTHER), source_id=SOURCE, reference=TAG, **flags)


def test_what_is_kept_is_kept_by_digest():
    existing = standing(AMD64)
    decision = decide(wanted=(AMD64, ARM64), existing=existing, source_id=SOURCE, reference=TAG)
    kept = next(step for step in decision.platforms if step.action == "keep")
    assert kept.kept == existing.platforms[AMD64].digest


def version(**changes) -> ModelVersion:
    return ModelVersion(
        **{"name": "m", "version": "1", "created_ms": 1, "source": "runs:/r/m", "run_id": "r", **changes}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "n"},
        {"version": "2"},
        {"created_ms": 2},
        {"source": "runs:/s/m"},
        {"run_id": "s"},
        {"tags": {"MODEL_ENTRY_POINT": "app.py"}},
        {"tags": {"MODEL_BASE_IMAGE": "python:3"}},
    ],
)
def test_inputs_of_a_build_change_the_source_id(changes):
    assert version(**changes).source_id() != version().source_id()


@pytest.mark.parametrize(
    "tag", ["EXTERNAL_TARGET_PLTR_FOUNDRY", "publish.pltr_foundry.state", "MODEL_PLATFORMS", "note"]
)
def test_tags_that_do_not_change_the_image_keep_the_source_id(tag):
    # What we write back must not make a version new, and a platform that is added extends what is there.
    assert version(tags={tag: "true"}).source_id() == version().source_id()


def test_a_versions_own_platforms_win():
    assert wanted_platforms(version(tags={"MODEL_PLATFORMS": "linux/arm64"}), (AMD64,)) == (ARM64,)
    assert wanted_platforms(version(tags={"MODEL_PLATFORMS": " "}), (AMD64,)) == (AMD64,)
    with pytest.raises(InvalidVersion, match="MODEL_PLATFORMS"):
        wanted_platforms(version(tags={"MODEL_PLATFORMS": "arm64"}), (AMD64,))


def test_a_plan_is_read_back_from_the_workspace_unchanged():
    decision = decide(wanted=(AMD64, ARM64), existing=standing(AMD64), source_id=SOURCE, reference=TAG)
    plan = Plan(
        version=version(name='odd "name"\n', tags={"a": "b"}),
        target="t",
        source_id=SOURCE,
        reference=TAG,
        action=decision.action,
        reason=decision.reason,
        observed=Digest.of(b""),
        wanted=(AMD64, ARM64),
        platforms=decision.platforms,
    )
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert plan.builds == (ARM64,)
