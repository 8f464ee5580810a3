"""All checks, in the order of the table."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from builder.doctor import Check, Finding, diagnose, images, machine, receiver, rights, versions
from builder.doctor.surroundings import surroundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from builder.doctor.surroundings import Surroundings
    from builder.settings import DoctorSettings

CHECKS: tuple[tuple[str, Callable[[Surroundings], Finding]], ...] = (
    ("MLflow", versions.server),
    ("tags", versions.tags),
    ("credential", images.credential),
    ("push", images.push),
    ("mount", images.mount),
    ("base image", images.base_image),
    ("package index", machine.package_index),
    ("clock", machine.clock),
    ("engine", machine.engine),
    ("smoke test", machine.smoke_test),
    ("cluster", rights.account),
    ("rights", rights.rights),
    ("templates", rights.templates),
    ("policies", rights.policies),
    ("webhook", receiver.webhook),
    ("listener", receiver.listener),
)


def examine(
    settings: DoctorSettings, *, in_pod: bool = False, namespace: str = "", context: str = "", seconds: float = 30
) -> list[Finding]:
    """Return what all checks find.

    Args:
        settings: what the environment says; MODEL_NAME names a model whose repository is checked too.
        in_pod: whether this is a Pod whose account may use the Kubernetes API.
        namespace: of the Jobs; empty for the usual one.
        context: of the kubeconfig; empty for its current one.
        seconds: that each check may take; they run side by side.
    """
    with surroundings(settings, in_pod=in_pod, namespace=namespace, context=context) as around:
        return diagnose([Check(name=name, look=partial(look, around)) for name, look in CHECKS], seconds=seconds)
