"""A sweep of a large catalogue: what it asks of MLflow and of the API server, and which Jobs it makes in which order."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import pytest

from builder.cluster.job import job_name
from builder.settings import Settings
from tests.catalogue import insert, published, versions
from tests.servers.forwarding import forwarding

PAGE = 500
SEARCH = "model-versions/search"


@pytest.fixture
def mlflow(cluster_mlflow, cluster):
    """A proxy before MLflow: what goes through it is this test's own, whatever runs beside it."""
    with forwarding(cluster_mlflow.uri.removeprefix("http://"), address=cluster.address) as proxy:
        yield proxy


@pytest.fixture
def site(new_site, mlflow):
    return new_site(settings={"MLFLOW_TRACKING_URI": f"http://{mlflow.host}"})


class Asked:
    """What the sweep of a site asks MLflow and the API server for, from here on."""

    def __init__(self, site, mlflow):
        self._site, self._mlflow = site, mlflow
        self._before = len(mlflow.seen), len(site.cluster.requests())

    def mlflow(self):
        """Return method and path of each request, with its parameters."""
        return [(each.method, each.path) for each in self._mlflow.seen[self._before[0] :]]

    def kubernetes(self):
        """Return the requests of the sweep's account."""
        account = f"system:serviceaccount:{self._site.namespace}:builder-sweep"
        return [each for each in self.everybody() if each["user"]["username"] == account]

    def everybody(self):
        """Return all requests to the API server that it has served."""
        made = self._site.cluster.requests()[self._before[1] :]
        return [each for each in made if status(each) < 500]


def catalogue(site, mlflow, count, *, new=0):
    """Write a catalogue of published versions and of new ones, which are registered last; return both."""
    settings = Settings.from_environ(site.environ)
    made = list(versions(count + new, target_tag=settings.target_tag, prefix=site.namespace))
    there = [published(version, settings) for version in made[:count]]
    insert(Path(mlflow.artifacts).parent / "mlflow.db", [*there, *made[count:]])
    return there, made[count:]


def test_what_is_published_costs_the_listing_and_nothing_else(site, mlflow, cluster_mlflow):
    count = 2 * PAGE + 100
    catalogue(site, cluster_mlflow, count)
    asked = Asked(site, mlflow)
    assert f'"current": {count}' in site.sweep()
    requests = asked.mlflow()
    assert len(requests) == math.ceil(count / PAGE)
    assert all(SEARCH in path for _, path in requests), requests
    (listing,) = asked.kubernetes()
    assert (listing["verb"], listing["objectRef"]["resource"]) == ("list", "jobs")


def test_new_versions_are_submitted_oldest_first_and_only_so_many_at_once(site, mlflow, cluster_mlflow):
    new, most = 30, 4
    site.patch_settings(SWEEP_PARALLEL=str(most), SWEEP_WAIT="3000")
    # The Jobs are this test's to end: Kubernetes makes no Pod of them.
    managed = {"op": "add", "path": "/spec/jobTemplate/spec/managedBy", "value": "example.com/test"}
    site.patch_template("wheels", managed)
    there, queued = catalogue(site, cluster_mlflow, 50, new=new)
    asked = Asked(site, mlflow)
    site.kubectl("create", "job", "sweep", "--from=cronjob/builder-sweep")
    ended = end_jobs(site, new, most)
    assert site.ended("sweep") == "Complete", site.log_of("sweep")
    log = site.log_of("sweep")
    assert f'"submitted": {new}' in log, log

    target = Settings.from_environ(site.environ).target
    assert ended == [job_name(target, version) for version in queued]
    assert [each["objectRef"]["name"] for each in made(asked.kubernetes())] == ended
    assert most_at_once(asked) == most
    requests = asked.mlflow()
    assert sum(SEARCH in path for _, path in requests) == 1
    # Each is read once more before its Job is made, and gets two tags.
    assert len(requests) == 1 + 3 * new
    names = {version.name for version in there}
    assert not [path for _, path in requests if SEARCH not in path and any(f"name={name}" in path for name in names)]


def test_jobs_that_others_have_made_hold_no_sweep_back(site, cluster_mlflow):
    site.patch_settings(SWEEP_PARALLEL="1", SWEEP_WAIT="1")
    managed = {"op": "add", "path": "/spec/jobTemplate/spec/managedBy", "value": "example.com/test"}
    site.patch_template("wheels", managed)
    _, (asked_for, *_) = catalogue(site, cluster_mlflow, 0, new=3)
    done = site.builder("submit", asked_for.name, asked_for.version, "-n", site.namespace)
    assert done.code == 0, done.stderr
    # Unless all of them share one candidate.
    registry = site.environ["REGISTRY_URL"].partition("/")[0]
    site.patch_settings(SMOKE_TEST_CANDIDATE=f"{registry}/candidates:pod")
    log = site.sweep("shared")
    assert all(text in log for text in ('"running": 1', '"queued": 2')), log
    site.patch_settings(SMOKE_TEST_CANDIDATE="")
    log = site.sweep()
    assert all(text in log for text in ('"running": 1', '"submitted": 1', '"queued": 1')), log
    # Its own does.
    log = site.sweep("again")
    assert all(text in log for text in ('"running": 2', '"queued": 1')), log


def status(request):
    return request.get("responseStatus", {}).get("code", 500)


def made(requests):
    return [
        each
        for each in requests
        if (each["verb"], each["objectRef"]["resource"], status(each)) == ("create", "jobs", 201)
    ]


def end_jobs(site, count, most):
    """Let Jobs of versions succeed, the first of them each time as many run as may; return their names in order."""
    names, ended = [], []
    what = ("jobs", "-l", "app.kubernetes.io/component=publish", "-o", "name")
    with closing(site.cluster.changes(*what, namespace=site.namespace)) as lines:
        for line in lines:
            name = line.strip().partition("/")[2]
            if name not in names:
                names.append(name)
            while (len(names) == count and len(ended) < count) or len(names) - len(ended) == most:
                succeed(site, names[len(ended)])
                ended.append(names[len(ended)])
            if len(ended) == count:
                break
    return ended


def succeed(site, name):
    """Do what the Job controller does when a Job's Pod has succeeded."""
    now = "2026-01-02T03:04:05Z"
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("SuccessCriteriaMet", "Complete")
    ]
    status = {"startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions}
    patch = json.dumps({"status": status})
    site.kubectl("patch", "job", name, "--subresource=status", "--type=merge", "-p", patch)


def most_at_once(asked):
    """Return how many Jobs ran at once at most, by when each was surely made, and when it was asked to end."""
    moments = [(each["stageTimestamp"], 1) for each in made(asked.kubernetes())]
    moments += [
        (each["requestReceivedTimestamp"], -1)
        for each in asked.everybody()
        if each["verb"] == "patch" and each["objectRef"].get("subresource") == "status"
    ]
    running, most = 0, 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most
