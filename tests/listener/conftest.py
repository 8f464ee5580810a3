"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from builder.cluster.api_server import Object
from builder.cluster.job_watch import JobWatch
from builder.listener.overview import Overview
from tests.listener.site import Cluster, Versions
from tests.servers.mlflow import MlflowServer
from tests.waiting import until


@pytest.fixture
def versions(mlflow_server: MlflowServer) -> Versions:
    """Versions of a target of the test's own."""
    return Versions(uri=mlflow_server.uri)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Overview], Overview]]:
    """Start overviews, which are closed at the end."""
    # After a listing that was slow the next one is near, too.
    monkeypatch.setattr("builder.listener.overview._SHARE", 2)
    made: list[Overview] = []

    def start(overview: Overview) -> Overview:
        # The first listing does not wait for the Jobs for long.
        until(lambda: overview._watch is None or overview._watch.synced)
        overview.start()
        made.append(overview)
        until(lambda: overview.synced and overview.sources()[0].answered)
        return overview

    yield start
    for each in made:
        each.close()


@dataclass(kw_only=True)
class Listener:
    """What a listener knows, of versions on a real MLflow and of Jobs in a cluster that is none."""

    versions: Versions
    cluster: Cluster
    watch: JobWatch
    overview: Overview

    def state(self, name: str) -> str:
        """Return the state of the version of a model; empty where it is not shown."""
        named = self.versions.name(name)
        return next((row.status.state for row in self.overview.rows() if row.status.model == named), "")


@pytest.fixture
def listener(versions: Versions) -> Iterator[Listener]:
    """A listener without its network; its threads are started by `watch.start` and `overview.start`."""
    cluster = Cluster(versions.settings)

    def changed(job: Object, deleted: bool) -> None:
        overview.changed(job, deleted)

    watch = JobWatch(cluster, versions.settings.target, changed=changed)
    overview = Overview(versions.settings, versions.catalog, cluster, watch)
    yield Listener(versions=versions, cluster=cluster, watch=watch, overview=overview)
    watch.close()
    cluster.cut()
    overview.close()
