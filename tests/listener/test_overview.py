"""What the listener knows of versions and Jobs, and how soon."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from builder.cluster.job import job_name
from builder.cluster.status import status
from builder.errors import PermissionRefused, VersionNotFound
from builder.listener.overview import Overview, Row
from tests.listener.site import DIGEST, Away, moment, pod, running, terminated
from tests.waiting import HANG, until


def by_key(overview: Overview) -> dict[tuple[str, str], Row]:
    return {row.key: row for row in overview.rows()}


def test_rows_are_what_builder_status_shows(versions, opened):
    versions.published("pump")
    versions.published("pump", platforms=("linux/amd64", "linux/arm64"))
    versions.failed("valve")
    versions.register("fan")
    versions.register("ignored", selected=False)
    overview = opened(Overview(versions.settings, versions.catalog))
    found = sorted((row.status for row in overview.rows()), key=lambda each: (each.model, each.version))
    shown = status(versions.settings, versions.catalog, None)
    assert found == sorted(shown, key=lambda each: (each.model, each.version))
    assert [(each.model, each.state) for each in found] == [
        (versions.name("fan"), "new"),
        (versions.name("pump"), "published"),
        (versions.name("pump"), "published"),
        (versions.name("valve"), "failed"),
    ]
    assert by_key(overview)[versions.name("pump"), "1"].image == f"registry.example.com/models/model@{DIGEST}"


def test_a_version_that_loses_its_tag_disappears(versions, opened):
    kept, left = versions.published("kept"), versions.published("left")
    overview = opened(Overview(versions.settings, versions.catalog))
    revision = overview.revision
    versions.client.set_model_version_tag(left.name, left.version, versions.tag, "false")
    until(lambda: (left.name, left.version) not in by_key(overview))
    changes = overview.changes_since(revision)
    assert (changes.rows, changes.removed, changes.complete) == ([], [(left.name, left.version)], False)
    assert by_key(overview).keys() == {(kept.name, kept.version)}


def test_a_version_is_read_again_when_asked(versions, opened):
    versions.settings = versions.settings.model_copy(update={"overview_interval": 3600})
    overview = opened(Overview(versions.settings, versions.catalog))
    version = versions.published("pump")
    overview.look_again(version.name, version.version)
    until(lambda: by_key(overview).keys() == {(version.name, "1")})
    versions.client.delete_model_version(version.name, version.version)
    overview.look_again(version.name, version.version)
    until(lambda: not overview.rows())


def test_changes_are_waited_for(versions, opened):
    # Not listed meanwhile: that would find the version before it has all its tags.
    settings = versions.settings.model_copy(update={"overview_interval": 3600})
    overview = opened(Overview(settings, versions.catalog))
    began = time.monotonic()
    assert overview.changes_since(overview.revision, wait=0.05).rows == []
    assert time.monotonic() - began >= 0.05
    found = []
    reader = threading.Thread(target=lambda: found.append(overview.changes_since(0, wait=HANG)))
    reader.start()
    version = versions.published("pump")
    overview.look_again(version.name, version.version)
    reader.join(HANG)
    (changes,) = found
    assert [row.key for row in changes.rows] == [(version.name, "1")]
    assert overview.changes_since(changes.revision).rows == []
    # A revision of another process, or of before a restart.
    assert overview.changes_since(changes.revision + 1000).complete
    assert overview.changes_since(0).complete


def test_closing_ends_the_wait(versions, opened):
    overview = opened(Overview(versions.settings, versions.catalog))
    waiting = threading.Thread(target=lambda: overview.changes_since(overview.revision, wait=HANG))
    waiting.start()
    overview.close()
    waiting.join(HANG / 2)
    assert not waiting.is_alive()


def test_what_is_known_stays_while_mlflow_is_away(versions, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._AWAY", 0.05)
    versions.published("pump")
    catalog = Away(versions.catalog)
    overview = opened(Overview(versions.settings, catalog))
    (before,) = overview.sources()
    assert (before.failing_since, before.error) == (None, "")
    catalog.away, since = True, time.time()
    (failing,) = until(lambda: [each for each in overview.sources() if each.error])
    assert failing.error == "ServiceUnavailable: MLflow is away. Try again."
    assert since <= failing.failing_since <= time.time()
    # Later failures do not move the beginning.
    asked = catalog.asked
    until(lambda: catalog.asked > asked + 2)
    assert overview.sources()[0].failing_since == failing.failing_since
    assert [row.status.state for row in overview.rows()] == ["published"]
    late = versions.published("fan")
    overview.look_again(late.name, late.version)
    catalog.away = False
    until(lambda: (late.name, "1") in by_key(overview))
    until(lambda: overview.sources()[0].failing_since is None)


def test_what_is_known_stays_while_mlflow_refuses_the_credential(versions, opened):
    version = versions.published("pump")
    catalog = Refusing(versions.catalog)
    overview = opened(Overview(versions.settings.model_copy(update={"overview_interval": 3600}), catalog))
    catalog.refuses = True
    overview.look_again(version.name, version.version)
    until(lambda: catalog.asked)
    catalog.refuses = False
    other = versions.failed("valve")
    overview.look_again(other.name, other.version)
    # It was read after the refused one.
    until(lambda: (other.name, "1") in by_key(overview))
    assert by_key(overview)[version.name, "1"].status.state == "published"


class Refusing:
    """A catalog whose server can refuse the credential."""

    def __init__(self, catalog):
        self.catalog, self.refuses, self.asked = catalog, False, 0
        self.tagged = catalog.tagged

    def find(self, name, version):
        if self.refuses:
            self.asked += 1
            message = "MLflow refuses the credential."
            raise PermissionRefused(message)
        return self.catalog.find(name, version)


class Slow:
    """A catalog whose listing takes a while, and has nothing."""

    def __init__(self, seconds):
        self.seconds, self.began = seconds, []

    def tagged(self, _tag):
        self.began.append(time.monotonic())
        time.sleep(self.seconds)
        return []


def test_a_slow_listing_takes_a_tenth_of_the_time(versions, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._SHARE", 10)
    catalog = Slow(0.3)
    opened(Overview(versions.settings, catalog))
    until(lambda: len(catalog.began) == 3)
    first, second, third = catalog.began
    assert second - first >= 3.0
    assert third - second >= 3.0


class Paused:
    """A catalog whose listing, once it was made, waits before it is handed on."""

    def __init__(self, catalog):
        self.catalog, self.listed, self.go = catalog, threading.Event(), threading.Event()

    def tagged(self, tag):
        found = list(self.catalog.tagged(tag))
        self.listed.set()
        assert self.go.wait(HANG)
        yield from found

    def find(self, name, version):
        return self.catalog.find(name, version)


def test_an_old_listing_does_not_replace_what_was_read_since(versions, opened):
    old, new = versions.published("old"), versions.register("new", selected=False)
    catalog = Paused(versions.catalog)
    overview = Overview(versions.settings.model_copy(update={"overview_interval": 3600}), catalog)
    try:
        overview.start()
        assert catalog.listed.wait(HANG)
        versions.record(old, state="failed", error="InvalidVersion: since then.")
        versions.client.set_model_version_tag(new.name, new.version, versions.tag, "true")
        for version in (old, new):
            overview.look_again(version.name, version.version)
        until(lambda: len(overview.rows()) == 2)
        catalog.go.set()
        until(lambda: overview.synced)
        assert {row.status.model: row.status.state for row in overview.rows()} == {old.name: "failed", new.name: "new"}
    finally:
        catalog.go.set()
        overview.close()


def test_texts_of_others_are_short_and_safe(versions, opened):
    name = f"<img src=x onerror=alert(1)> {'n' * 150}"
    version = versions.failed(name, error=f"\u202e\x1b[31m{'e' * 5000}", image="x@sha256:" + "z" * 64)
    for tag, text in (("finished", "soon"), ("log", "javascript:alert(1)")):
        versions.client.set_model_version_tag(version.name, "1", f"publish.{versions.settings.target}.{tag}", text)
    (row,) = opened(Overview(versions.settings, versions.catalog)).rows()
    assert row.key == (version.name, "1")
    assert len(row.status.error) <= 1000
    assert "\u202e" not in row.status.error
    assert (row.status.digest, row.status.since, row.image, row.status.log) == ("", "", "", "")


def test_a_link_to_the_log_is_kept(versions, opened):
    version = versions.published("pump")
    tag = f"publish.{versions.settings.target}.log"
    versions.client.set_model_version_tag(version.name, version.version, tag, "https://logs.example.com/?job=a&b=c")
    (row,) = opened(Overview(versions.settings, versions.catalog)).rows()
    assert row.status.log == "https://logs.example.com/?job=a&b=c"


def test_a_job_that_changes_shows_at_once(listener, opened):
    listener.versions.settings = listener.versions.settings.model_copy(update={"overview_interval": 3600})
    listener.overview._settings = listener.versions.settings
    version = listener.versions.register("pump")
    listener.watch.start()
    opened(listener.overview)
    assert listener.state("pump") == "new"
    name = listener.cluster.start(version, pod=pod("Running", publish=running()))
    until(lambda: listener.state("pump") == "running")
    (row,) = listener.overview.rows()
    assert (row.status.job, row.status.method) == (name, "wheels")
    listener.versions.record(version, state="published", image=f"r/m@{DIGEST}", finished=moment())
    listener.cluster.end(name)
    until(lambda: listener.state("pump") == "published")
    listener.cluster.delete(name)
    until(lambda: listener.overview.rows()[0].status.job == "")


def test_a_pod_that_begins_late_shows_although_its_job_does_not_change(listener, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._SOON", 0.1)
    listener.overview._settings = listener.versions.settings.model_copy(update={"overview_interval": 3600})
    version = listener.versions.register("pump")
    waiting = {"waiting": {"reason": "PodInitializing"}}
    first = pod("Pending", fetch=waiting, build=waiting, push=waiting)
    listener.watch.start()
    opened(listener.overview)
    listener.cluster.start(version, "dockerfile", pod=first)
    until(lambda: listener.state("pump") == "pending")
    first["status"]["initContainerStatuses"][0]["state"] = running()
    until(lambda: listener.state("pump") == "running")


def test_jobs_that_were_there_cost_no_request_each(listener, opened):
    """A listener that starts lists the versions once; it does not read each that has a Job."""
    version = listener.versions.register("pump")
    listener.cluster.start(version, pod=pod("Running", publish=running()))
    found = []
    real = listener.versions.catalog.find
    listener.overview._catalog = listener.versions.catalog
    listener.overview._settings = listener.versions.settings.model_copy(update={"overview_interval": 3600})
    listener.versions.catalog.find = lambda *key: (found.append(key), real(*key))[1]
    listener.watch.start()
    opened(listener.overview)
    assert listener.state("pump") == "running"
    other = listener.versions.register("fan")
    del found[:]
    # After a gap the watch tells of every Job again.
    listener.cluster.cut()
    until(lambda: listener.cluster.listings == 2 and listener.watch.error is None)
    listener.overview.look_again(other.name, other.version)
    until(lambda: listener.state("fan") == "new")
    assert found == [(other.name, "1")]


def test_each_end_is_told_once_with_its_pods(listener, opened):
    ends = []
    listener.overview.on_end(lambda job, pods: ends.append((job["metadata"]["name"], len(pods))))
    before, after = listener.versions.published("before"), listener.versions.register("after")
    listener.cluster.end(listener.cluster.start(before))
    listener.watch.start()
    opened(listener.overview)
    name = listener.cluster.start(after)
    listener.cluster.end(name, pod=pod("Succeeded", publish=terminated()))
    until(lambda: ends)
    listener.cluster.cut()
    until(lambda: listener.cluster.listings == 2 and listener.watch.error is None)
    again = listener.cluster.start(listener.versions.register("again"))
    listener.cluster.end(again)
    until(lambda: len(ends) == 2)
    assert ends == [(name, 1), (again, 0)]


def test_an_end_is_told_once_the_cluster_answers(listener, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._AWAY", 0.05)
    ends = []
    listener.overview.on_end(lambda job, pods: ends.append(job["metadata"]["name"]))
    listener.watch.start()
    opened(listener.overview)
    name = listener.cluster.start(listener.versions.register("pump"))
    listener.cluster.away = True
    listener.cluster.end(name)
    failing = until(lambda: [each for each in listener.overview.sources() if each.error])
    assert [(each.name, each.failing_since is not None) for each in failing] == [("Kubernetes", True)]
    assert ends == []
    listener.cluster.away = False
    until(lambda: ends == [name])


def test_the_cluster_answers_again_although_no_version_that_is_listed_has_a_job(listener, opened, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._AWAY", 0.05)
    listener.watch.start()
    opened(listener.overview)
    name = listener.cluster.start(listener.versions.register("pump", selected=False))
    listener.cluster.away = True
    listener.cluster.end(name)
    until(lambda: [each for each in listener.overview.sources() if each.error])
    listener.cluster.away = False
    until(lambda: not [each for each in listener.overview.sources() if each.error])


def test_what_is_known_stays_while_the_cluster_is_away(listener, opened):
    version = listener.versions.register("pump")
    listener.cluster.start(version, pod=pod("Running", publish=running()))
    listener.watch.start()
    opened(listener.overview)
    listener.cluster.away = True
    listener.cluster.cut()
    until(lambda: "is away" in listener.overview.sources()[1].error)
    assert listener.overview.sources()[1].failing_since is not None
    listed = listener.overview.sources()[0].answered
    until(lambda: listener.overview.sources()[0].answered > listed)
    assert listener.state("pump") == "running"
    listener.cluster.away = False
    until(lambda: not [each for each in listener.overview.sources() if each.error])


def test_a_version_waits_since_it_was_seen_or_registered(listener, opened):
    old = listener.versions.register("old")
    old_created = old.created_ms / 1000
    listener.watch.start()
    opened(listener.overview)
    new = listener.versions.register("new")
    listener.overview.look_again(new.name, new.version)
    until(lambda: (new.name, "1") in by_key(listener.overview))
    rows = by_key(listener.overview)
    # The listener did not see how long it had waited before.
    assert rows[old.name, "1"].waiting_since == max(old_created, listener.overview._began)
    assert rows[new.name, "1"].waiting_since >= rows[old.name, "1"].waiting_since
    since = rows[new.name, "1"].waiting_since
    listener.cluster.start(new, pod=pod("Running", publish=running()))
    until(lambda: listener.state("new") == "running")
    assert by_key(listener.overview)[new.name, "1"].waiting_since <= since
    listener.versions.record(new, state="published", image=f"r/m@{DIGEST}", finished=moment())
    listener.cluster.end(job_name(listener.versions.settings.target, new))
    until(lambda: by_key(listener.overview)[new.name, "1"].waiting_since is None)


def test_a_version_that_was_killed_too_often_waits_for_nobody(versions, opened):
    killed = versions.register("killed", state="running", attempts=3)
    again = versions.register("again", state="running", attempts=2)
    rows = by_key(opened(Overview(versions.settings, versions.catalog)))
    assert rows[killed.name, "1"].waiting_since is None
    assert rows[again.name, "1"].waiting_since is not None


def test_many_versions_take_little_memory_and_no_tags(versions, monkeypatch):
    """10,000 versions with outcomes and long tags of their own."""
    import tracemalloc

    first = versions.published("many")
    tags = {**first.tags, "notes": "n" * 5000}

    class Many:
        def tagged(self, _tag):
            for number in range(1, 10_001):
                yield first.model_copy(update={"version": str(number), "tags": {**tags, "notes": f"{number}" * 1000}})

        def find(self, name, version):
            raise VersionNotFound(name + version)

    overview = Overview(versions.settings, Many())
    tracemalloc.start()
    try:
        overview._list()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(overview.rows()) == 10_000
    assert held < 30 << 20
    assert overview.changes_since(overview.revision - 3).rows == overview.rows()[-3:]


def test_removed_rows_are_forgotten_in_time(versions, monkeypatch):
    monkeypatch.setattr("builder.listener.overview._MOST_REMOVED", 2)
    overview = Overview(versions.settings, versions.catalog)
    row = Row(status=status_of("m"))
    for number in range(5):
        overview._put(("m", str(number)), replace(row, status=replace(row.status, version=str(number))))
    revision = overview.revision
    for number in range(3):
        overview._put(("m", str(number)), None)
    assert overview.changes_since(revision).complete
    recent = overview.changes_since(revision + 1)
    assert not recent.complete
    assert sorted(recent.removed) == [("m", "1"), ("m", "2")]


def status_of(model: str):
    from builder.cluster.status import Status

    return Status(model=model, version="1", state="new")


@pytest.mark.parametrize("closed_first", [True, False])
def test_a_closed_overview_ends_its_threads(versions, closed_first):
    overview = Overview(versions.settings, versions.catalog)
    if closed_first:
        overview.close()
    overview.start()
    overview.close()
    until(lambda: not [each for each in threading.enumerate() if each.name.startswith("overview-")])
