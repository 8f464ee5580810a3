"""The public face: all that a notebook, an Airflow task or a test of somebody else's imports; see docs/api.md.

Every name is imported from its module when it is first used, so that `import builder.api` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from builder.batch import Result
    from builder.batch.download import download_all as download
    from builder.batch.sweep import Options as SweepOptions
    from builder.batch.sweep import sweep
    from builder.batch.warm import Check, Warmed, warm, warm_requirements
    from builder.cluster import Jobs, Submitted
    from builder.cluster.api_server import Cluster
    from builder.cluster.follow import Ended, follow
    from builder.cluster.pods import MissedDeadline, PodLost, PodNotStarted
    from builder.cluster.reconcile import reconcile
    from builder.cluster.status import Status, status
    from builder.errors import (
        BuilderError,
        BuildFailed,
        Defect,
        EngineKilled,
        ExitCode,
        InvalidSettings,
        InvalidVersion,
        OverBudget,
        PermissionRefused,
        RootRefused,
        ServiceUnavailable,
        StillRunning,
        StoreNotSupported,
        Terminated,
        TryAgain,
        UsageError,
        VersionCrashed,
        VersionNotFound,
    )
    from builder.log import configure as configure_log
    from builder.models import Artifact, ModelVersion
    from builder.models.catalog import MlflowCatalog as Catalog
    from builder.plan import Plan
    from builder.publish import Published, plan, publish
    from builder.publish.record import Outcome
    from builder.reference import Digest, Platform, Reference, Repository
    from builder.settings import CatalogSettings, Settings
    from builder.smoke import SmokeTestFailed

__all__ = [
    "Artifact",
    "BuildFailed",
    "BuilderError",
    "Catalog",
    "CatalogSettings",
    "Check",
    "Cluster",
    "Defect",
    "Digest",
    "Ended",
    "EngineKilled",
    "ExitCode",
    "InvalidSettings",
    "InvalidVersion",
    "Jobs",
    "MissedDeadline",
    "ModelVersion",
    "Outcome",
    "OverBudget",
    "PermissionRefused",
    "Plan",
    "Platform",
    "PodLost",
    "PodNotStarted",
    "Published",
    "Reference",
    "Repository",
    "Result",
    "RootRefused",
    "ServiceUnavailable",
    "Settings",
    "SmokeTestFailed",
    "Status",
    "StillRunning",
    "StoreNotSupported",
    "Submitted",
    "SweepOptions",
    "Terminated",
    "TryAgain",
    "UsageError",
    "VersionCrashed",
    "VersionNotFound",
    "Warmed",
    "configure_log",
    "download",
    "follow",
    "plan",
    "publish",
    "reconcile",
    "register",
    "status",
    "sweep",
    "warm",
    "warm_requirements",
]

# Module of each name, and its name there where that is another one. Errors are in `builder.errors`.
_WHERE = {
    "Artifact": "builder.models",
    "Catalog": "builder.models.catalog:MlflowCatalog",
    "CatalogSettings": "builder.settings",
    "Check": "builder.batch.warm",
    "Cluster": "builder.cluster.api_server",
    "Digest": "builder.reference",
    "Ended": "builder.cluster.follow",
    "Jobs": "builder.cluster",
    "MissedDeadline": "builder.cluster.pods",
    "ModelVersion": "builder.models",
    "Outcome": "builder.publish.record",
    "Plan": "builder.plan",
    "Platform": "builder.reference",
    "PodLost": "builder.cluster.pods",
    "PodNotStarted": "builder.cluster.pods",
    "Published": "builder.publish",
    "Reference": "builder.reference",
    "Repository": "builder.reference",
    "Result": "builder.batch",
    "Settings": "builder.settings",
    "SmokeTestFailed": "builder.smoke",
    "Status": "builder.cluster.status",
    "Submitted": "builder.cluster",
    "SweepOptions": "builder.batch.sweep:Options",
    "Warmed": "builder.batch.warm",
    "configure_log": "builder.log:configure",
    "download": "builder.batch.download:download_all",
    "follow": "builder.cluster.follow",
    "plan": "builder.publish",
    "publish": "builder.publish",
    "reconcile": "builder.cluster.reconcile",
    "status": "builder.cluster.status",
    "sweep": "builder.batch.sweep",
    "warm": "builder.batch.warm",
    "warm_requirements": "builder.batch.warm",
}


def __getattr__(name: str) -> Any:  # a module's attribute has any type
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    module, _, there = _WHERE.get(name, "builder.errors").partition(":")
    value = globals()[name] = getattr(import_module(module), there or name)
    return value


def __dir__() -> list[str]:
    return __all__


def register(settings: CatalogSettings, model: Path, *, name: str, **options: Any) -> ModelVersion:
    """Register a saved model, ready to be published, and return the version.

    Its templates are rendered once before anything is sent, so that a misspelt variable is found here and not in a
    build.

    Args:
        settings: what the environment says.
        model: the folder that holds MLmodel.
        name: the registered model; it is made where it does not exist.
        options: client, templates, entry_point, command_line, platforms, base_image, experiment, select; as
            `builder register --help` explains them.

    Raises:
        InvalidVersion: the model could not be published like that; nothing was sent.
        BuilderError: MLflow is away, or refuses.
    """
    from builder.dockerfile.template import rendered
    from builder.models.register import register

    def check_templates(version: ModelVersion, folder: Path) -> object:
        return rendered(settings, version, folder)

    return register(settings, model, name=name, check_templates=check_templates, **options)
