"""Events of a version's Job, for those who run `kubectl describe job`: what was asked for, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.cluster.api_server import Cluster, Object
    from builder.errors import BuilderError
    from builder.models import ModelVersion
    from builder.publish.record import Outcome


def tell_submitted(cluster: Cluster, job: Object, version: ModelVersion) -> None:
    """Record that a Job was made for a version."""
    cluster.record_event(job, "Submitted", f"To publish {version}.")


def tell_published(cluster: Cluster, job: Object, image: str) -> None:
    """Record what a Job has published, by its digest reference."""
    cluster.record_event(job, "Published", image)


def tell_failed(cluster: Cluster, job: Object, error: BuilderError) -> None:
    """Record what ended a Job."""
    cluster.record_event(job, "Failed", error.one_line(), warning=True)


def tell_hung(cluster: Cluster, job: Object, error: BuilderError) -> None:
    """Record why a Job was ended that did not go on."""
    cluster.record_event(job, "Ended", error.one_line(), warning=True)


def tell_end(cluster: Cluster, job: Object, outcome: Outcome) -> None:
    """Record how a Job ended, as the version's tags tell; nothing while they tell of no end.

    However often this is called, there is one Event of each kind.

    Args:
        cluster: where the Job is.
        job: the Job, which has ended.
        outcome: what its version's tags say now.
    """
    # The image of an earlier attempt can be there beside the error of the last one.
    if outcome.state == "failed" or (outcome.state == "published" and outcome.error):
        cluster.record_event(job, "Failed", outcome.error, warning=True)
    elif outcome.state == "published":
        tell_published(cluster, job, outcome.image)
    elif outcome.state == "foreign":
        cluster.record_event(job, "Foreign", outcome.error, warning=True)
