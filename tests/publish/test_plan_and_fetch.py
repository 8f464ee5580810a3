"""What `builder plan` says and what fetch plans are the same, whatever MLflow and the registry have."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from builder.clients import connected
from builder.errors import BuilderError, InvalidVersion
from builder.models.context import listing_digest
from builder.oci import OCI_INDEX
from builder.oci.manifest import ARTIFACTS_DIGEST, SOURCE_ID, index
from builder.publish import fetch, plan, publish, workspace_of
from builder.publish.inspect import existing_image, find, reference_of
from builder.reference import Digest, Platform
from builder.settings import Settings
from tests.versions import register, seed_layout

COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"
MISSPELT = "FROM {base}\nCOPY ${{modle_folder}} /\n"
AMD64, ARM64 = "linux/amd64", "linux/arm64"
_numbers = itertools.count()


@dataclass(frozen=True)
class State:
    """What a version is, and what the registry has of it."""

    template: str
    wanted: str
    there: tuple[str, ...]
    source: str
    artifacts: str
    force: bool
    rebuild: bool
    most_files: int


# The usual more often than the odd, so that some examples are odd in one respect alone.
states = st.builds(
    State,
    template=st.sampled_from([COPIES] * 7 + [MISSPELT]),
    wanted=st.sampled_from([f"{AMD64},{ARM64}"] * 4 + [AMD64, AMD64, ARM64, "linux"]),
    there=st.sampled_from([(AMD64,), (AMD64,), (AMD64, ARM64), ()]),
    source=st.sampled_from(["same"] * 6 + ["another", "somebody's"]),
    artifacts=st.sampled_from(["same", "changed", "unknown"]),
    force=st.booleans(),
    rebuild=st.sampled_from([False, False, False, True]),
    most_files=st.sampled_from([1000] * 7 + [2]),
)


@pytest.fixture
def environ(mlflow_server, registry, tmp_path):
    def make(model) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": f"{registry.host}/plans{next(_numbers)}",
            "MODEL_NAME": model.name,
            "MODEL_VERSION": model.version,
            "BUILDER_WORKSPACE": str(tmp_path / "workspace"),
        }

    return make


@pytest.fixture
def models(mlflow_server, base_image):
    return {template: register(mlflow_server.uri, seed_layout(base_image, template)) for template in (COPIES, MISSPELT)}


def place(services, state: State, base_image: str, crane) -> None:
    """Give the version's tag the images of the state, which are the base's, under an index of our making."""
    version = find(services)
    reference = reference_of(services.settings, version)
    for platform in state.there:
        crane("copy", "--platform", platform, base_image, f"{reference.repository}:{platform.rpartition('/')[2]}")
    if not state.there:
        return
    registry = services.registries.for_host(reference.repository.host)
    images = []
    for platform in state.there:
        found = existing_image(services, reference.repository.tag(platform.rpartition("/")[2]))
        images.append(found.platforms[Platform.parse(platform)])
    notes = {}
    if state.source != "somebody's":
        notes[SOURCE_ID] = version.source_id() if state.source == "same" else "b" * 64
    if state.artifacts != "unknown":
        listed = str(listing_digest(services.catalog.artifacts(version)))
        notes[ARTIFACTS_DIGEST] = listed if state.artifacts == "same" else f"sha256:{'c' * 64}"
    content = index(images, annotations=notes)
    registry.put_manifest(reference.repository, content, OCI_INDEX, Digest.of(content))
    registry.put_manifest(reference.repository, content, OCI_INDEX, reference.tag)


def outcome(act) -> object:
    """Return the plan, without what only one of the two can know; or what was refused, and how."""
    try:
        made = act()
    except BuilderError as error:
        return type(error).__name__, str(error)
    return made.model_copy(update={"content_digest": None})


@hypothesis_settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(state=states)
def test_plan_says_what_fetch_does(models, environ, base_image, crane, state):
    model = models[state.template]
    model.set_tag("MODEL_PLATFORMS", state.wanted)
    settings = Settings.from_environ({**environ(model), "VERSION_FILES": str(state.most_files)})
    flags = {"force": state.force, "rebuild": state.rebuild}
    with connected(settings) as services:
        place(services, state, base_image, crane)
    said = outcome(lambda: plan(settings, **flags))

    def fetched():
        with connected(settings) as services, workspace_of(settings) as workspace:
            return fetch(services, workspace, find(services), **flags)

    assert outcome(fetched) == said


def test_a_platform_of_changed_artifacts_is_refused_by_plan_as_by_publish(models, environ, base_image, crane):
    model = models[COPIES]
    model.set_tag("MODEL_PLATFORMS", AMD64)
    settings = Settings.from_environ(environ(model))
    state = State(COPIES, AMD64, (AMD64,), "same", "changed", force=False, rebuild=False, most_files=1000)
    with connected(settings) as services:
        place(services, state, base_image, crane)
    assert plan(settings).changes == (
        "the artifacts have changed since this version was published; --rebuild uses the new ones",
    )
    model.set_tag("MODEL_PLATFORMS", f"{AMD64},{ARM64}")
    with connected(settings) as services:
        # Platforms are no part of the source.
        place(services, state, base_image, crane)
    for act in (plan, publish):
        with pytest.raises(InvalidVersion, match="have changed since its image was made"):
            act(settings)
