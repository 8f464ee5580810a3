"""The cluster: who asks, what it may do, the templates, and the policies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builder.cluster.job import TEMPLATES, WARM_TEMPLATE
from builder.doctor import Finding, ok, skipped, warn
from builder.errors import BuilderError, InvalidSettings, PermissionRefused, ServiceUnavailable

if TYPE_CHECKING:
    from builder.cluster.api_server import Cluster
    from builder.doctor.surroundings import Surroundings

# What the role builder-sweep allows (k8s/base/accounts.yaml): group, resource, name, verbs.
NEEDED = (
    ("batch", "cronjobs", TEMPLATES["wheels"], ("get",)),
    ("batch", "cronjobs", TEMPLATES["dockerfile"], ("get",)),
    ("batch", "jobs", "", ("create", "get", "list", "watch", "delete")),
    ("", "pods", "", ("get", "list", "watch")),
    ("", "pods/log", "", ("get",)),
    ("", "events", "", ("get", "list", "watch")),
)
# Without these, Jobs of versions are made all the same.
USEFUL = (("batch", "cronjobs", WARM_TEMPLATE, ("get",)), ("", "events", "", ("create",)))
# By this the policies know whom to hold to copies, beside the account builder-sweep; there is no such resource.
HELD = (("builder", "template-copies", "", ("create",)),)
# What makes the sweep's account unable to start anything but a copy of a template.
POLICIES = (
    ("validatingadmissionpolicies", "builder-job-methods"),
    ("validatingadmissionpolicies", "builder-jobs"),
    ("validatingadmissionpolicybindings", "builder-job-methods"),
    ("validatingadmissionpolicybindings", "builder-jobs-wheels"),
    ("validatingadmissionpolicybindings", "builder-jobs-dockerfile"),
    ("validatingadmissionpolicybindings", "builder-jobs-warm"),
)
_INSTALL = "Install the base: kubectl apply -k k8s/base."


def account(around: Surroundings) -> Finding:
    """See as whom the API server knows this program."""
    try:
        cluster = around.cluster()
    except InvalidSettings as error:
        if around.needs_cluster:
            raise
        return skipped(f"{error.what} Without one, `builder sweep` publishes in its own processes.", error.remedy)
    try:
        name = cluster.account()
    except ServiceUnavailable as error:
        return _as_wanted(around, error)
    return ok(f"The API server knows this as {name}; Jobs are in the namespace {cluster.namespace}.")


def _as_wanted(around: Surroundings, error: BuilderError) -> Finding:
    """Return that something is wrong with the cluster; a warning where a kubeconfig just happens to be there."""
    if around.needs_cluster:
        raise error
    return warn(error.what, f"{error.remedy} If no cluster of this kubeconfig is the builder's, nothing is wrong.")


def _cluster(around: Surroundings) -> Cluster | None:
    """Return the cluster; None where the row of the account says why there is none, or that it does not answer."""
    try:
        around.cluster().account()
        return around.cluster()
    except BuilderError:
        return None


def _lacking(cluster: Cluster, rights: tuple[tuple[str, str, str, tuple[str, ...]], ...]) -> list[str]:
    return [
        f"{verb} {kind}{f' {name}' if name else ''}"
        for group, kind, name, verbs in rights
        for verb in verbs
        if not cluster.may(verb, kind, group=group, name=name)
    ]


def rights(around: Surroundings) -> Finding:
    """See whether the account may do what a sweep does."""
    if not (cluster := _cluster(around)):
        return skipped("No cluster is reached.")
    remedy = f"{_INSTALL} Its role builder-sweep allows this; bind it to the account."
    if lacking := _lacking(cluster, NEEDED):
        message = f"In the namespace {cluster.namespace} the account may not {', '.join(lacking)}."
        return _as_wanted(around, PermissionRefused(message, remedy=remedy))
    if lacking := _lacking(cluster, USEFUL):
        what = f"The account may not {', '.join(lacking)}: Jobs get no Events of the builder's, or layers no warming."
        return warn(what, remedy)
    if _lacking(cluster, HELD) and not cluster.account().endswith(":builder-sweep"):
        what = f"The account may make any Job in {cluster.namespace}, and not only copies of the templates."
        return warn(what, f"{_INSTALL} Its role builder-sweep may create template-copies.builder: see k8s/policies.")
    return ok("The account may read the templates, make, watch and delete Jobs, and read Pods, logs and events.")


def templates(around: Surroundings) -> Finding:
    """See whether the templates of Jobs are there."""
    if not (cluster := _cluster(around)):
        return skipped("No cluster is reached.")
    method = around.settings.build_method
    if around.settings.warm_on_create and cluster.template(WARM_TEMPLATE) is None:
        what = f"WARM_ON_CREATE is set, and the namespace {cluster.namespace} has no template {WARM_TEMPLATE}."
        raise InvalidSettings(what, remedy="Add the component k8s/warm, or unset WARM_ON_CREATE.")
    missing = [each for each, name in TEMPLATES.items() if cluster.template(name) is None]
    needed = ["wheels" if method == "auto" else method]
    if not set(missing) & {*needed, *(("dockerfile",) if method == "auto" else ())}:
        return ok(f"The namespace {cluster.namespace} has the templates that BUILD_METHOD={method} needs.")
    names = " and ".join(TEMPLATES[each] for each in missing)
    message = f"The namespace {cluster.namespace} has no template {names}."
    if set(missing) & set(needed):
        remedy = _INSTALL if "wheels" in needed else "Install it: kubectl apply -k k8s/dockerfile."
        return _as_wanted(around, InvalidSettings(message, remedy=remedy))
    remedy = "Install it: kubectl apply -k k8s/dockerfile. Or set BUILD_METHOD=wheels."
    return warn(f"{message} Versions with a Dockerfile cannot be published here.", remedy)


def policies(around: Surroundings) -> Finding:
    """See whether the policies are there that bound what the sweep's account may start."""
    if not (cluster := _cluster(around)):
        return skipped("No cluster is reached.")
    try:
        missing = [name for kind, name in POLICIES if cluster.policy(kind, name) is None]
    except PermissionRefused:
        remedy = "As an administrator: kubectl get validatingadmissionpolicies builder-jobs builder-job-methods."
        return skipped("This account may not see policies, which belong to the whole cluster.", remedy)
    if missing:
        what = f"Missing: {', '.join(dict.fromkeys(missing))}. The sweep's account can start any Pod of its namespace."
        return warn(what, "Install them as an administrator: kubectl apply -k k8s/policies.")
    return ok("The policies admit nothing but copies of the templates from the sweep's account.")
