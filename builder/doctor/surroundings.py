"""What the checks work with: settings and clients, one version to try things on, and the cluster."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from builder.clients import Registries
from builder.cluster.api_server import Cluster, import_client
from builder.doctor import Once
from builder.domino import restored
from builder.errors import BuilderError
from builder.http import RetryPolicy
from builder.models.catalog import MlflowCatalog
from builder.publish.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.models import ModelVersion
    from builder.settings import DoctorSettings

# Few attempts: people wait for the table, and what fails now and then should be seen.
POLICY = RetryPolicy(attempts=2, deadline=20, unanswered=1)
# Tagged versions that are looked at for one that is published.
_MOST_LOOKED_AT = 500


class Surroundings:
    """What the checks work with. Thread-safe.

    Args:
        settings: what the environment says; MODEL_NAME bounds what is tried to that model.
        catalog: MLflow's.
        registries: with their credentials.
        in_pod: whether this is a Pod whose account may use the Kubernetes API, as the listener's and the sweep's.
        namespace: of the Jobs; empty for the usual one.
        context: of the kubeconfig; empty for its current one.
    """

    def __init__(
        self,
        settings: DoctorSettings,
        *,
        catalog: MlflowCatalog,
        registries: Registries,
        in_pod: bool = False,
        namespace: str = "",
        context: str = "",
    ) -> None:
        self.settings, self.catalog, self.registries = settings, catalog, registries
        self.in_pod = in_pod
        # Whether somebody wants a cluster to be there; else a machine without a kubeconfig is nothing wrong.
        self.needs_cluster = in_pod or bool(namespace or context)
        self.cluster = Once(partial(Cluster, namespace, context=context))
        # A tagged version to try things on, a published one if there is one; None if nothing is tagged.
        self.sample = Once(self._look_for_sample)

    def _look_for_sample(self) -> ModelVersion | None:
        name, target = self.settings.model_name, self.settings.target
        tagged = (each for each in self.catalog.tagged(self.settings.target_tag) if name in {"", each.name})
        first = None
        for version in islice(tagged, _MOST_LOOKED_AT):
            first = first or version
            if Outcome.of(version, target).state == "published":
                return version
        return first

    def without_credential(self, host: str) -> bool:
        """Return whether this is a Pod that has no credential for a registry on purpose, as the listener's."""
        with suppress(BuilderError):
            return self.in_pod and not self.registries.credential_of(host)[1]
        return False


@contextmanager
def surroundings(
    settings: DoctorSettings, *, in_pod: bool = False, namespace: str = "", context: str = ""
) -> Iterator[Surroundings]:
    """Give what the checks work with, and close it afterwards.

    Args:
        settings: what the environment says.
        in_pod: whether this is a Pod whose account may use the Kubernetes API.
        namespace: of the Jobs; empty for the usual one.
        context: of the kubeconfig; empty for its current one.
    """
    with restored(), Registries.from_settings(settings, policy=POLICY) as registries:
        catalog = MlflowCatalog.from_settings(settings)
        # Both clients have circles of imports, of which threads that enter them at once get halves of modules.
        import_client()
        with suppress(BuilderError):
            _ = catalog.client
        yield Surroundings(
            settings,
            catalog=catalog,
            registries=registries,
            in_pod=in_pod,
            namespace=namespace,
            context=context,
        )
