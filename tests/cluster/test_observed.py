"""What operators see of a real cluster: each number is that of MLflow, or of kubectl."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from datetime import datetime
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from builder.listener.overview import STATES
from tests.cluster.listening import STATUS_TOKEN, Listening, fetched, listening
from tests.cluster.site import Site, outcome, tagged
from tests.listener.site import events
from tests.waiting import LONG_HANG, until

Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture
def observed(new_site):
    """Two Pods that listen, with a status page."""
    # A version that failed is not tried again: two ends of it would be counted, and one Job be there.
    settings = {"STATUS_ACCESS": "token", "OVERVIEW_INTERVAL": "2", "SWEEP_BACKOFF": "3600"}
    with listening(new_site(settings=settings), replicas=2) as running:
        yield running


def metrics(pod: dict[str, Any]) -> Samples:
    """Return what a Pod of the listener exposes, by name."""
    text = fetched(f"http://{pod['status']['podIP']}:9090/metrics", headers={"Accept": "text/plain"})[1]
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples of a metric that have some labels."""
    return sum(value for of, value in found.get(name, ()) if labels.items() <= of.items())


def statuses(site: Site) -> list[dict[str, Any]]:
    """Return what `builder status` prints of all versions."""
    done = site.builder("status", "-n", site.namespace, "-o", "json")
    assert done.code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def ends(site: Site) -> Counter[str]:
    """Return how many Jobs of versions have ended, by how: Complete or Failed."""
    conditions = [each for job in site.jobs() for each in job["status"].get("conditions") or ()]
    return Counter(
        each["type"] for each in conditions if each["status"] == "True" and each["type"] in {"Complete", "Failed"}
    )


def test_metrics_and_page_are_those_of_mlflow_and_the_cluster(observed: Listening, new_pump):
    site = observed.site
    good = [tagged(new_pump, site) for _ in range(2)]
    bad = tagged(new_pump, site, MODEL_FOLDER="absent")
    tagged(new_pump, site, **{site.environ["TARGET_TAG"]: "false"})
    until(lambda: [outcome(site, each).get("state") for each in good] == ["published"] * 2, LONG_HANG)
    until(lambda: outcome(site, bad).get("state") == "failed", LONG_HANG)
    # It stays: the last sweep is that of a Job that is there.
    site.kubectl("create", "job", "observed-sweep", "--from=cronjob/builder-sweep")
    assert site.ended("observed-sweep") == "Complete"
    until(lambda: sum(ends(site).values()) == len(site.jobs()))

    for each in observed.pods():
        until(lambda pod=each: differences(site, metrics(pod)) == [])
        found = metrics(each)
        assert total(found, "builder_source_up", source="mlflow") == 1
        assert total(found, "builder_source_up", source="kubernetes") == 1
        assert total(found, "builder_publish_sent_bytes_total") > 0
        seconds = total(found, "builder_publish_phase_seconds_sum", phase="push")
        assert 0 < seconds < total(found, "builder_publish_seconds_sum")
    everywhere = [metrics(each) for each in observed.pods()]
    # Each delivery goes to one of them: three tags that select, and the publishers' own, which are of no interest.
    assert sum(total(each, "builder_deliveries_total", outcome="taken") for each in everywhere) >= 3
    # What was refused came too slowly, on a machine that has much else to do.
    slow = len(re.findall("its body took too long|its body was cut off", observed.log()))
    assert sum(total(each, "builder_deliveries_total", outcome="refused") for each in everywhere) <= slow

    assert fetched(f"{observed.url}/status")[0] == 401
    _, page = fetched(f"{observed.url}/status", auth=("x", STATUS_TOKEN))
    assert "Published models" in page

    def agree() -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return shown(observed) == expected(site)
        return False

    until(agree)


def differences(site: Site, found: Samples) -> list[str]:
    """Return where metrics differ from what MLflow and the cluster say."""
    by_state = Counter(each["state"] for each in statuses(site))
    ended = ends(site)
    sweep = site.get("job/observed-sweep")["status"]["completionTime"]
    swept = datetime.fromisoformat(sweep).timestamp()
    pairs = [(f"versions {state}", total(found, "builder_versions", state=state), by_state[state]) for state in STATES]
    pairs += [
        ("failed", total(found, "builder_publishes_total", outcome="failed"), ended["Failed"]),
        ("ended", total(found, "builder_publishes_total"), sum(ended.values())),
        ("waiting", total(found, "builder_jobs", state="waiting"), 0),
        ("running", total(found, "builder_jobs", state="running"), 0),
        ("age", total(found, "builder_waiting_age_seconds"), 0),
        ("sweep", total(found, "builder_sweep_last_success_timestamp_seconds"), swept),
    ]
    return [f"{name}: {ours}, and not {theirs}" for name, ours, theirs in pairs if ours != theirs]


def shown(observed: Listening) -> list[tuple[object, ...]]:
    """Return what the page's stream says of each version."""
    rows = [row for name, data in events(observed.url, password=STATUS_TOKEN) if name == "rows" for row in data["rows"]]
    return sorted(facts(row, row.get("platforms", []), row.get("digest", ""), row.get("error", "")) for row in rows)


def expected(site: Site) -> list[tuple[object, ...]]:
    """Return what `builder status` says of each version."""
    return sorted(facts(each, each["platforms"], each["digest"], each["error"]) for each in statuses(site))


def facts(row: dict[str, Any], platforms: list[str], digest: str, error: str) -> tuple[object, ...]:
    return (
        row["model"],
        row["version"],
        row["state"],
        tuple(platforms),
        digest,
        row.get("attempts", 0),
        row.get("job", ""),
        error,
    )
