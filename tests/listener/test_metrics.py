"""The numbers of the listener, as Prometheus reads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from builder.cluster.status import status
from builder.listener.metrics import Metrics
from builder.listener.overview import STATES, Overview
from scripts.launch import clean_environ
from tests.listener.site import moment, pod, running, terminated
from tests.waiting import HANG, until

PLAIN = "text/plain;version=0.0.4"


def samples(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Return the values of metrics by name and by the values of their labels but the target, in alphabetical order."""
    text, content_type = metrics.render(PLAIN)
    assert content_type.startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "target")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


@pytest.fixture
def observed(listener, opened):
    """Metrics of a listener that runs."""
    metrics = Metrics(listener.versions.settings, listener.overview, listener.watch)

    def start() -> Metrics:
        listener.watch.start()
        opened(listener.overview)
        return metrics

    return start


def test_versions_by_state_are_those_of_mlflow(versions, opened):
    for _ in range(3):
        versions.published("pump")
    versions.failed("valve")
    versions.register("fan")
    versions.register("fan", state="foreign", error="not ours", finished=moment())
    versions.register("none", selected=False)
    found = samples(Metrics(versions.settings, opened(Overview(versions.settings, versions.catalog))))
    shown = Counter(each.state for each in status(versions.settings, versions.catalog, None))
    assert shown == {"published": 3, "failed": 1, "new": 1, "foreign": 1}
    assert found["builder_versions"] == {(state,): shown.get(state, 0) for state in STATES}
    assert found["builder_source_up"] == {("mlflow",): 1}
    assert found["builder_overview_synced"][()] == 1


def test_no_model_is_a_label_unless_asked_for(versions, opened):
    versions.published("pump")
    versions.published("a\nb\u202e")
    overview = opened(Overview(versions.settings, versions.catalog))
    text, _ = Metrics(versions.settings, overview).render(PLAIN)
    assert versions.name("pump").encode() not in text
    by_model = versions.settings.model_copy(update={"metrics_by_model": True})
    found = samples(Metrics(by_model, overview))["builder_versions"]
    assert found == {(versions.name("pump"), "published"): 1, (versions.name(r"a b\u202e"), "published"): 1}


def test_the_oldest_version_that_waits(listener, observed):
    metrics = observed()
    assert samples(metrics)["builder_waiting_age_seconds"] == {(): 0}
    version = listener.versions.register("pump")
    listener.overview.look_again(version.name, version.version)
    until(lambda: listener.state("pump") == "new")
    until(lambda: samples(metrics)["builder_waiting_age_seconds"][()] > 0.1)
    assert samples(metrics)["builder_waiting_age_seconds"][()] < HANG
    listener.versions.record(version, state="failed", error="InvalidVersion: no.", finished=moment())
    listener.overview.look_again(version.name, version.version)
    until(lambda: listener.state("pump") == "failed")
    assert samples(metrics)["builder_waiting_age_seconds"] == {(): 0}


def test_jobs_that_wait_and_run(listener, observed):
    waiting, runs, both = (listener.versions.register(name) for name in ("waiting", "runs", "untagged"))
    metrics = observed()
    assert samples(metrics)["builder_jobs"] == {("waiting",): 0, ("running",): 0}
    listener.cluster.start(waiting)
    listener.cluster.start(runs, pod=pod("Running", publish=running()))
    listener.cluster.start(both)
    until(lambda: samples(metrics)["builder_jobs"] == {("waiting",): 2, ("running",): 1})


def test_a_publish_is_counted_with_what_its_pod_left(listener, observed):
    metrics = observed()
    told = {"state": "published", "changed": True, "method": "wheels", "sent": 1000, "saved": 500_000}
    message = json.dumps({**told, "seconds": {"fetch": 1.5, "push": 4.25, "../x": 1, "build": "long"}})
    name = listener.cluster.start(listener.versions.register("pump"))
    listener.cluster.end(name, pod=pod("Succeeded", publish=terminated(message)))
    until(lambda: samples(metrics)["builder_publishes_total"]["0", "wheels", "published"] == 1)
    found = samples(metrics)
    assert sum(found["builder_publishes_total"].values()) == 1
    assert found["builder_publish_sent_bytes_total"] == {("wheels",): 1000, ("dockerfile",): 0}
    assert found["builder_publish_saved_bytes_total"] == {("wheels",): 500_000, ("dockerfile",): 0}
    assert found["builder_publish_phase_seconds_sum"] == {
        ("wheels", "fetch"): 1.5, ("wheels", "push"): 4.25, ("wheels", "start"): 10,
    }  # fmt: skip
    assert found["builder_publish_seconds_count"] == {("wheels", "published"): 1}


def test_phases_of_a_version_with_a_dockerfile_are_those_of_its_containers(listener, observed):
    metrics = observed()
    name = listener.cluster.start(listener.versions.register("pump"), "dockerfile")
    forged = json.dumps({"sent": 10**30, "seconds": {"push": 99}})
    phases = {
        "preflight": terminated(began=-50, ended=-49),
        "fetch": terminated(began=-49, ended=-40),
        "build": terminated(forged, began=-40, ended=-10),
        "push": terminated(json.dumps({"state": "published", "changed": False, "sent": 10**30}), began=-10, ended=-8),
    }
    listener.cluster.end(name, pod=pod("Succeeded", **phases))
    until(lambda: samples(metrics)["builder_publishes_total"].get(("0", "dockerfile", "unchanged")) == 1)
    found = samples(metrics)
    seconds = {phase: value for (_, phase), value in found["builder_publish_phase_seconds_sum"].items()}
    assert seconds == {"start": 10, "preflight": 1, "fetch": 9, "build": 30, "push": 2}
    assert found["builder_publish_sent_bytes_total"]["dockerfile",] == 0


@pytest.mark.parametrize(
    ("code", "container", "counted"),
    [(65, "publish", "65"), (77, "publish", "77"), (75, "publish", "75"), (1, "publish", "65")],
)
def test_a_failure_is_counted_with_its_exit_code(listener, observed, code, container, counted):
    metrics = observed()
    name = listener.cluster.start(listener.versions.register("pump"))
    left = json.dumps({"state": "failed", "error": "InvalidVersion: no.", "exit_code": code})
    listener.cluster.end(name, "Failed", pod=pod("Failed", **{container: terminated(left, code)}))
    until(lambda: samples(metrics)["builder_publishes_total"][counted, "wheels", "failed"] == 1)
    assert sum(samples(metrics)["builder_publishes_total"].values()) == 1


def test_a_job_is_counted_once_though_the_watch_restarts(listener, observed):
    before = listener.versions.register("before")
    listener.cluster.end(listener.cluster.start(before))
    metrics = observed()
    name = listener.cluster.start(listener.versions.register("pump"))
    listener.cluster.end(name, "Failed")
    until(lambda: samples(metrics)["builder_publishes_total"]["75", "wheels", "failed"] == 1)
    listener.cluster.cut()
    until(lambda: listener.cluster.listings == 2 and listener.watch.error is None)
    listener.cluster.end(listener.cluster.start(listener.versions.register("after")))
    until(lambda: samples(metrics)["builder_publishes_total"]["0", "wheels", "published"] == 1)
    # What had ended before the listener began is in no counter of it.
    assert sum(samples(metrics)["builder_publishes_total"].values()) == 2


def test_sweeps(listener, observed):
    metrics = observed()
    none = samples(metrics)
    assert none["builder_sweep_last_success_timestamp_seconds"] == {(): 0}
    assert none["builder_sweep_last_succeeded"] == {(): 0}
    listener.cluster.sweep("Complete", when=moment(-900))
    until(lambda: samples(metrics)["builder_sweep_last_succeeded"] == {(): 1})
    listener.cluster.sweep("Failed", when=moment(-60))
    listener.cluster.sweep()
    until(lambda: samples(metrics)["builder_sweep_last_succeeded"] == {(): 0})
    found = samples(metrics)
    assert found["builder_sweep_last_success_timestamp_seconds"][()] == pytest.approx(time.time() - 900, abs=HANG)
    assert found["builder_sweep_last_end_timestamp_seconds"][()] == pytest.approx(time.time() - 60, abs=HANG)
    # Sweeps are no publishes.
    assert sum(found["builder_publishes_total"].values()) == 0


def test_deliveries(versions):
    metrics = Metrics(versions.settings, Overview(versions.settings, versions.catalog))
    assert set(samples(metrics)["builder_deliveries_total"].values()) == {0}
    metrics.delivery("taken", 0.02)
    metrics.delivery("refused")
    found = samples(metrics)
    assert {key: value for key, value in found["builder_deliveries_total"].items() if value} == {
        ("taken",): 1, ("refused",): 1,
    }  # fmt: skip
    assert (found["builder_delivery_seconds_count"][()], found["builder_delivery_seconds_sum"][()]) == (1, 0.02)


def test_what_does_not_answer(listener, observed):
    metrics = observed()
    until(lambda: samples(metrics)["builder_source_up"] == {("mlflow",): 1, ("kubernetes",): 1})
    listener.cluster.away = True
    listener.cluster.cut()
    until(lambda: samples(metrics)["builder_source_up"] == {("mlflow",): 1, ("kubernetes",): 0})
    listener.cluster.away = False
    until(lambda: samples(metrics)["builder_source_up"]["kubernetes",] == 1)


def test_openmetrics_for_those_who_accept_it(versions):
    metrics = Metrics(versions.settings, Overview(versions.settings, versions.catalog))
    text, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_prometheus_finds_nothing_to_correct(listener, observed):
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    metrics = observed()
    listener.cluster.end(listener.cluster.start(listener.versions.register("pump")), "Failed")
    until(lambda: samples(metrics)["builder_publishes_total"]["75", "wheels", "failed"] == 1)
    text, _ = metrics.render(PLAIN)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, check=False, env=clean_environ()
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
