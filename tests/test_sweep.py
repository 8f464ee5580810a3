"""The sweep over a registry with published, new, broken, foreign and deleted versions."""

from __future__ import annotations

import pytest

from builder.publish import publish
from builder.settings import Settings
from builder.sweep import Options, sweep
from tests.versions import register, seed_layout

COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"


@pytest.fixture
def target(request):
    """A target of the test's own, so that other tests' versions are none of its business."""
    return f"EXTERNAL_TARGET_{abs(hash(request.node.nodeid)):X}"


@pytest.fixture
def settings(mlflow_server, registry, target):
    def make(**changes):
        environ = {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": f"{registry.host}/swept",
            "TARGET_TAG": target,
        }
        return Settings.from_environ({**environ, **changes})

    return make


@pytest.fixture
def new(mlflow_server, base_image, target):
    def make(dockerfile=COPIES, select="true", **options):
        tags = {"EXTERNAL_TARGET_PLTR_FOUNDRY": "false", target: select, **options.pop("tags", {})}
        return register(mlflow_server.uri, seed_layout(base_image, dockerfile), tags, **options)

    return make


def states(results):
    return {f"{result.version.name}:{result.version.version}": result.state for result in results}


def test_a_sweep_over_everything(settings, new, crane, base_image, registry):
    published = new(select="True")
    publish(settings(MODEL_NAME=published.name, MODEL_VERSION=published.version))
    second = new(name=published.name, select="TRUE")
    gap = new(name=published.name)
    third = new(name=published.name)
    gap.client.delete_model_version(gap.name, gap.version)
    broken = new("FROM {base}\nCOPY nowhere /\n")
    bad_tag = new(tags={"MODEL_PLATFORMS": "nonsense"})
    foreign = new()
    crane("copy", "--platform", "linux/amd64", base_image, f"{registry.host}/swept/{foreign.name}:v1")
    unselected = new(select="false")

    results = list(sweep(settings()))
    assert states(results) == {
        f"{published.name}:1": "current",
        f"{second.name}:2": "published",
        f"{third.name}:4": "published",
        f"{broken.name}:1": "failed",
        f"{bad_tag.name}:1": "failed",
        f"{foreign.name}:1": "foreign",
    }
    assert unselected.outcome(settings().target) == {}
    assert {result.exit_code for result in results} == {0, 65, 73}
    for result in results:
        if result.state == "published":
            crane("validate", "--remote", str(result.reference))

    again = list(sweep(settings()))
    assert {result.state for result in again} == {"current", "failed", "foreign"}


def test_what_is_published_costs_no_request_beyond_the_listing(settings, new, registry, mlflow_server):
    for _ in range(3):
        new()
    assert {result.state for result in sweep(settings())} == {"published"}
    # Neither can the registry be asked, nor anything of a version be read: only the listing works.
    away = settings(REGISTRY_URL="127.0.0.1:1/swept")
    assert {result.state for result in sweep(away)} == {"current"}


def test_check_asks_the_registry(settings, new, crane, registry):
    model = new()
    (result,) = sweep(settings())
    crane("delete", str(result.reference))
    assert states(sweep(settings())) == {f"{model.name}:1": "current"}
    assert states(sweep(settings(), Options(check=True))) == {f"{model.name}:1": "published"}


def test_a_platform_that_is_wanted_now_is_added(settings, new):
    model = new()
    list(sweep(settings()))
    (result,) = sweep(settings(TARGET_PLATFORMS="linux/amd64,linux/arm64"))
    assert (result.state, result.detail) == ("published", "linux/amd64, linux/arm64")
    assert model.outcome(settings().target)["platforms"] == "linux/amd64,linux/arm64"


def test_what_fails_too_often_waits_for_a_change(settings, new):
    model = new("FROM {base}\nCOPY nowhere /\n")
    quick = settings(SWEEP_ATTEMPTS="2")
    assert [next(iter(sweep(quick))).state for _ in range(3)] == ["failed", "failed", "waiting"]
    assert next(iter(sweep(quick, Options(retry_failed=True)))).state == "failed"
    model.set_tag("MODEL_ENTRY_POINT", "other.py")
    assert next(iter(sweep(quick))).state == "failed"
    assert model.outcome(quick.target)["attempts"] == "1"
