"""What the statuses of Pods say of their end, where a cluster of the tests does not bring it about."""

from __future__ import annotations

import pytest

from builder.cluster.pods import PodLost, ending
from builder.errors import OverBudget

JOB = {"metadata": {"name": "publish-pump-v1"}, "spec": {}, "status": {}}


def evicted(message):
    return {
        "metadata": {"name": "publish-pump-v1-x7k2p"},
        "spec": {"containers": [{"name": "publish"}]},
        "status": {"phase": "Failed", "reason": "Evicted", "message": message},
    }


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Pod ephemeral local storage usage exceeds the total limit of containers 32Mi. ", OverBudget),
        ('Container publish exceeded its local ephemeral storage limit "32Mi". ', OverBudget),
        ('Usage of EmptyDir volume "scratch" exceeds the limit "32Mi". ', OverBudget),
        (
            (
                "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi. Container "
                "publish was using 100Mi, request is 16Mi, has larger consumption of ephemeral-storage. "
            ),
            PodLost,
        ),
        (
            (
                "The node was low on resource: ephemeral-storage. Container publish was using 100Mi, which exceeds its "
                "request of 0. "
            ),
            PodLost,
        ),
        ("The node was low on resource: memory. ", PodLost),
    ],
)
def test_a_pod_that_exceeds_its_limits_is_told_from_one_on_a_full_node(message, kind):
    assert type(ending(JOB, [evicted(message)])) is kind
