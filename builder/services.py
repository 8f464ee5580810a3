"""The servers that a command talks to: MLflow and the registries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from builder.images.registries import Registries
from builder.images.retry import Patience
from builder.models.catalog import Catalog
from builder.models.mlflow_catalog import MlflowCatalog
from builder.settings import Settings
from builder.smoke.policy import SmokeTests


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The clients that everything here talks through.

    Attributes:
        catalog: the model registry.
        registries: where images go, and what stands there.
        bases: the registries of base images, which an engine may reach another way: they are not waited for.
        smoke_tests: runs images before their tags move.
    """

    catalog: Catalog
    registries: Registries
    bases: Registries
    smoke_tests: SmokeTests


@contextmanager
def connected(settings: Settings) -> Iterator[Services]:
    """Give clients for MLflow and for registries, and close them afterwards."""
    with ExitStack() as stack:
        registries = stack.enter_context(Registries.from_settings(settings))
        bases = stack.enter_context(Registries.from_settings(settings, patience=Patience(attempts=2, deadline=20)))
        catalog = MlflowCatalog.from_settings(settings)
        yield Services(catalog=catalog, registries=registries, bases=bases, smoke_tests=SmokeTests(settings))
