"""What is done about a version whose Job has just ended; the Jobs themselves are made in tests/cluster/."""

from __future__ import annotations

import json

import pytest

from builder.cluster import Jobs
from builder.cluster.reconcile import reconcile_one
from builder.cluster.status import with_job
from builder.errors import InvalidSettings
from builder.listener import Listener, _gone
from builder.listener.deliveries import Event
from builder.publish.record import Outcome
from tests.listener.site import pod, terminated
from tests.waiting import until


@pytest.fixture
def ended(listener):
    """Return the Jobs, and a version whose Job has published it for linux/amd64; its author names some platforms."""

    def make(platforms):
        versions = listener.versions
        found = versions.published("pump")
        if platforms:
            versions.client.set_model_version_tag(found.name, found.version, "MODEL_PLATFORMS", platforms)
        listener.cluster.end(listener.cluster.start(found))
        # Its artifacts are not looked at then, and there are none.
        settings = versions.settings.model_copy(update={"build_method": "wheels"})
        jobs = Jobs(settings=settings, cluster=listener.cluster, catalog=versions.catalog)
        return jobs, versions.catalog.find(found.name, found.version)

    return make


@pytest.mark.parametrize("platforms", ["", "linux/amd64", "no platform"])
def test_what_is_published_has_no_other_job(ended, platforms):
    assert reconcile_one(*ended(platforms), after_its_job=True).state == "current"


def test_platforms_that_were_added_while_it_ran_have_another(ended):
    with pytest.raises(InvalidSettings, match="no template builder-publish-wheels"):
        reconcile_one(*ended("linux/amd64,linux/arm64"), after_its_job=True)


def test_a_job_that_was_replaced_before_the_watch_has_told_it_is_not_recorded_once_more(listener):
    versions, cluster = listener.versions, listener.cluster
    version = versions.register("pump")
    jobs = Jobs(settings=versions.settings, cluster=cluster, catalog=versions.catalog)
    serving = Listener(settings=versions.settings, jobs=jobs)
    try:
        serving.watch.start()
        name = cluster.start(version)
        cluster.end(name, "Failed")
        until(lambda: serving.watch.job(name) and serving.watch.job(name)["status"].get("failed"))
        cluster.replace(name)
        assert serving.work(Event(kind="look", name=version.name, version=version.version)).state == "running"
        assert Outcome.of(versions.catalog.find(version.name, version.version), versions.settings.target).state == ""
    finally:
        serving.watch.close()
        cluster.cut()


def test_who_heard_of_an_end_from_the_pod_hears_of_it_when_the_job_has_been_replaced(listener):
    versions, cluster = listener.versions, listener.cluster
    version = versions.published("pump")
    jobs = Jobs(settings=versions.settings, cluster=cluster, catalog=versions.catalog)
    serving = Listener(settings=versions.settings, jobs=jobs)
    message = json.dumps({"state": "published", "image": "registry.example.com/pump@sha256:1"})
    # The Job itself does not tell yet.
    name = cluster.start(version, pod=pod("Succeeded", publish=terminated(message)))
    identity = cluster.job(name)["metadata"]["uid"]
    first = serving.tell(version.name, version.version, name, identity)
    assert first.state == "published"
    cluster.replace(name)
    assert serving.tell(version.name, version.version, name, identity) == first


def test_status_tells_what_a_pod_has_recorded_before_its_job_has_ended(listener):
    versions, cluster = listener.versions, listener.cluster
    version = versions.published("pump")
    jobs = Jobs(settings=versions.settings, cluster=cluster, catalog=versions.catalog)
    name = cluster.start(version, pod=pod("Succeeded", publish=terminated("{}")))
    assert with_job(jobs, version, cluster.job(name)).state == "published"


@pytest.mark.parametrize("state", ["published", "failed"])
def test_an_attempt_that_failed_and_is_gone_has_failed_though_an_image_is_there(state):
    outcome = Outcome(
        target="pltr_foundry", state=state, image="registry/pump@sha256:1", error="It broke.", attempt="1"
    )
    told = _gone(outcome, "publish-pump-v1", "1")
    assert (told.state, told.error, told.exit_code) == ("failed", "It broke.", 75)
