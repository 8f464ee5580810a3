"""The sweep over a registry with published, new, broken, foreign and deleted versions."""

from __future__ import annotations

import logging

import pytest

from builder import report
from builder.batch.sweep import Options, sweep
from builder.models import ModelVersion
from builder.models.catalog import MlflowCatalog
from builder.publish import publish
from builder.settings import Settings
from tests.servers.forwarding import forwarding
from tests.versions import register, seed_layout

COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"


@pytest.fixture
def target(request):
    """A target of the test's own, so that other tests' versions are none of its business."""
    return f"EXTERNAL_TARGET_{abs(hash(request.node.nodeid)):X}"


@pytest.fixture
def settings(mlflow_server, registry, target):
    def make(host=registry.host, **changes):
        environ = {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": f"{host}/swept",
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
    assert all(result.own_fault for result in results if result.exit_code)
    for result in results:
        if result.state == "published":
            crane("validate", "--remote", str(result.reference))

    again = list(sweep(settings()))
    assert {result.state for result in again} == {"current", "failed", "foreign"}


def test_what_is_published_costs_no_request_beyond_the_listing(settings, new, registry, base_image, monkeypatch):
    with forwarding(registry.host) as proxy:
        for _ in range(3):
            new(COPIES.replace("{base}", base_image.replace(registry.host, proxy.host)))
        through = settings(proxy.host)
        assert {result.state for result in sweep(through)} == {"published"}
        assert any("/swept/" in each.path for each in proxy.seen)
        assert any("/swept/" not in each.path for each in proxy.seen)
        proxy.seen.clear()
        monkeypatch.delattr(MlflowCatalog, "find")
        monkeypatch.delattr(MlflowCatalog, "artifacts")
        assert {result.state for result in sweep(through)} == {"current"}
        assert proxy.seen == []


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


def test_another_registry_is_another_place_to_publish_to(settings, new, registry):
    new()
    list(sweep(settings()))
    (result,) = sweep(settings(REGISTRY_URL=f"{registry.host}/moved"))
    assert result.state == "published"


def test_what_killed_the_publisher_comes_last_and_is_given_up(settings, new):
    killer, innocent = new(name="a-killer"), new(name="b-innocent")
    target = settings().target
    ours = killer.client.get_model_version(killer.name, killer.version)
    source = ModelVersion(
        name=killer.name, version="1", created_ms=ours.creation_timestamp, source=ours.source, run_id=killer.run_id,
        tags=dict(ours.tags),
    ).source_id()  # fmt: skip
    for name, value in {"state": "running", "source": source, "attempts": "2", "wanted": "linux/amd64"}.items():
        killer.set_tag(f"publish.{target}.{name}", value)
    order = [result.version.name for result in sweep(settings())]
    assert order == [innocent.name, killer.name]
    killer.set_tag(f"publish.{target}.state", "running")
    killer.set_tag(f"publish.{target}.attempts", "3")
    assert states(sweep(settings()))[f"{killer.name}:1"] == "waiting"


def test_a_registry_that_is_away_gives_up_on_nobody(settings, new):
    new()
    away = settings(REGISTRY_URL="127.0.0.1:1/swept", SWEEP_ATTEMPTS="1")
    assert [result.state for result in sweep(away)] == ["failed"]
    assert next(iter(sweep(settings()))).state == "published"


def test_a_platform_that_cannot_be_built_can_be_left_out(settings, new):
    model = new("FROM {base}\nRUN true\n", tags={"MODEL_PLATFORMS": "linux/amd64,linux/s390x"})
    once = settings(SWEEP_ATTEMPTS="1")
    assert [next(iter(sweep(once))).state for _ in range(2)] == ["failed", "waiting"]
    model.set_tag("MODEL_PLATFORMS", "linux/amd64")
    assert next(iter(sweep(once))).state == "published"


def test_a_withdrawn_tag_is_seen_although_the_listing_had_it(settings, new):
    withdrawn = new()
    changed = new(name=withdrawn.name)
    run = sweep(settings())
    first = next(run)
    last = withdrawn if first.version.version == changed.version else changed
    last.set_tag(settings().target_tag, "false")
    assert [result.state for result in run] == ["gone"]


def test_what_fails_too_often_waits_for_a_change(settings, new):
    model = new("FROM {base}\nCOPY nowhere /\n")
    quick = settings(SWEEP_ATTEMPTS="2")
    assert [next(iter(sweep(quick))).state for _ in range(3)] == ["failed", "failed", "waiting"]
    assert next(iter(sweep(quick, Options(retry_failed=True)))).state == "failed"
    model.set_tag("MODEL_ENTRY_POINT", "other.py")
    assert next(iter(sweep(quick))).state == "failed"
    assert model.outcome(quick.target)["attempts"] == "1"


def test_the_build_method_does_not_change_the_source(settings, new):
    model = new()
    assert [result.state for result in sweep(settings())] == ["published"]
    before = model.outcome(settings().target)
    for method in ("wheels", "dockerfile", "auto"):
        assert [result.state for result in sweep(settings(BUILD_METHOD=method))] == ["current"]
    assert model.outcome(settings().target) == before


def test_a_success_ends_the_count_of_attempts(settings, new):
    model = new()
    for _ in range(3):
        assert [result.state for result in sweep(settings(), Options(rebuild=True))] == ["published"]
    target = settings().target
    assert model.outcome(target)["attempts"] == "0"
    # What a publisher leaves that was killed while it made the image once more.
    model.set_tag(f"publish.{target}.state", "running")
    model.set_tag(f"publish.{target}.attempts", "1")
    assert [result.state for result in sweep(settings(), Options(rebuild=True))] == ["published"]


def test_trouble_of_the_publishers_is_told_from_a_versions_own(settings, new):
    new()
    (result,) = sweep(settings(REGISTRY_URL="127.0.0.1:1/swept"))
    assert (result.state, result.exit_code, result.own_fault) == ("failed", 69, False)


def said(caplog, event):
    """Return what the one line of the log says that has this event."""
    (line,) = [record.msg for record in caplog.records if isinstance(record.msg, dict) and record.msg["event"] == event]
    return line


def test_where_nothing_is_selected_near_misses_are_told(settings, new, target, caplog):
    caplog.set_level(logging.INFO, "builder")
    said_yes = new(select="yes")
    new(select="yes")
    misspelt = new(tags={target: "false", target.lower().replace("target", "traget"): "true"})
    on_model = new(select="false")
    on_model.client.set_registered_model_tag(on_model.name, target, "true")
    assert list(sweep(settings())) == []
    line = said(caplog, "no version carries the target tag")
    assert line["tag"] == target
    assert line["versions"] >= 4
    seen = "\n".join(line["seen"])
    assert f"{target}='yes' on 2 versions, such as model {said_yes.name!r} version 1" in seen
    assert f"{target.lower().replace('target', 'traget')}='true' on 1 version, such as model {misspelt.name!r}" in seen
    assert f"{target}='true' on the registered model {on_model.name!r}" in seen
    assert f"{target}='false'" not in seen


def test_waiting_versions_are_in_the_summary(settings, new, caplog):
    caplog.set_level(logging.INFO, "builder")
    model = new("FROM {base}\nCOPY nowhere /\n")
    once = settings(SWEEP_ATTEMPTS="1")
    assert [result.state for result in sweep(once)] == ["failed"]
    report.results("swept", list(sweep(once)))
    line = said(caplog, "swept")
    assert line["states"] == {"waiting": 1}
    assert line["waiting"] == [f"model {model.name!r} version 1"]
    assert "--retry-failed" in line["remedy"]
