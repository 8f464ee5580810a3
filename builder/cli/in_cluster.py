"""Commands for the Jobs of a cluster, and for all that they need."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Literal

import click

from builder.cli.invocation import Invocation
from builder.cli.options import (
    MODEL,
    again_options,
    command,
    epilog,
    in_namespace,
    model_arguments,
    output_option,
    pass_invocation,
)
from builder.masking import masked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.cluster import Jobs, Submitted
    from builder.cluster.status import Status
    from builder.models import ModelVersion

# Seconds until `status --watch` looks again while no Job changes.
_WATCH = 30


@command(
    epilog=epilog(
        "builder submit pump_alarm 3",
        "builder submit pump_alarm @champion --wait",
        "builder submit pump_alarm 3 --via https://builder.example.com --wait",
        codes="with --wait those of the publisher; see builder --help.",
    )
)
@model_arguments
@click.option("--wait", is_flag=True, help="Show the logs, and exit as the publisher does.")
@click.option("--method", type=click.Choice(["wheels", "dockerfile"]), help="The template, whatever the version has.")
@click.option("--via", metavar="URL", help="Ask the listener there, with SUBMIT_SECRET, and not the Kubernetes API.")
@in_namespace
@again_options
@pass_invocation
def submit(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    wait: bool,
    via: str | None,
    method: Literal["wheels", "dockerfile"] | None,
    namespace: str,
    context: str,
    force: bool,
    rebuild: bool,
) -> int:
    """Publish one model version in the cluster, by a Job of its own.

    The Job is a copy of the template builder-publish-wheels or builder-publish-dockerfile. Its name is made from
    target, model and version: while it runs, nothing else is made, and --wait follows it. The Job's name is printed;
    with --wait, the image's digest reference.

    With --via, the listener makes the Job: neither a kubeconfig nor MLFLOW_TRACKING_URI nor REGISTRY_URL is needed.
    """
    if via is not None:
        if force or rebuild or method or namespace or context:
            message = (
                "--force, --rebuild, --method, --namespace and --context do not go with --via: the listener has an "
                "account that can replace no image of others, and chooses template and namespace itself. Leave out "
                "--via to use them with a kubeconfig."
            )
            raise click.UsageError(message)
        return _submitted_via(invocation, name, version, via, wait=wait)
    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        made = jobs.submit(found, method=method, force=force, rebuild=rebuild)
        if not made.created and (force or rebuild or method):
            invocation.log.warning(
                "--force, --rebuild and --method have no effect on a Job that is there", job=made.name
            )
        return _submitted(invocation, jobs, found, made, wait=wait)


def _submitted(invocation: Invocation, jobs: Jobs, version: ModelVersion, made: Submitted, *, wait: bool) -> int:
    """Print the name of a Job; or wait, print its image, or say what ended it. Return the exit code."""
    from builder.cluster.follow import follow

    if not made.created:
        invocation.log.info("the version has a Job that runs already", job=made.name)
    if not wait:
        invocation.product(made.name)
        return 0
    ended = follow(jobs, version, made.job)
    if ended.image:
        invocation.product(ended.image)
    if ended.error:
        error = ended.error
        invocation.failed(type(error).__name__, error.what, error.remedy, ended.code)
    return ended.code


def _submitted_via(invocation: Invocation, name: str | None, version: str | None, via: str, *, wait: bool) -> int:
    """Have a listener make a version's Job, as `_submitted` does with the Kubernetes API."""
    from builder.remote import Listener
    from builder.settings import RemoteSettings

    # The empty LISTENER_URL would count as not given.
    if not via:
        message = "--via needs the listener's address, such as https://builder.example.com."
        raise click.UsageError(message)
    settings = invocation.settings(
        RemoteSettings, MODEL, MODEL_NAME=name, MODEL_VERSION=version, LISTENER_URL=via
    )  # fmt: skip
    with Listener.from_settings(settings) as listener:
        accepted = listener.publish(settings.model_name, settings.model_version)
        if not accepted.created:
            invocation.log.info("the version has a Job that runs already", job=accepted.job)
        if not wait:
            invocation.product(accepted.job)
            return 0
        outcome = listener.follow(accepted)
    if error := outcome.failure():
        raise error
    if outcome.state == "published":
        invocation.product(outcome.image)
    return 0


@contextmanager
def _in_cluster(
    invocation: Invocation, name: str | None, version: str | None, *, namespace: str, context: str
) -> Iterator[tuple[Jobs, ModelVersion]]:
    """Give the Jobs, and the version that is named."""
    from builder.cluster import Jobs
    from builder.cluster.api_server import Cluster
    from builder.models.catalog import MlflowCatalog
    from builder.settings import Settings

    settings = invocation.settings(Settings, MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with closing(Cluster(namespace, context=context)) as cluster:
        catalog = MlflowCatalog.from_settings(settings)
        found = catalog.find(settings.model_name, settings.model_version)
        yield Jobs(settings=settings, cluster=cluster, catalog=catalog), found


@command(
    epilog=epilog(
        "builder status",
        "builder status pump_alarm 3 -o json | jq -r '.[0].digest'",
        "builder status --watch",
    )
)
@model_arguments
@click.option("--watch", is_flag=True, help="Print what changes, until interrupted.")
@output_option
@in_namespace
@pass_invocation
def status(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    watch: bool,
    output: str,
    namespace: str,
    context: str,
) -> None:
    """Print what is known of each tagged version, of one model's, or of one version.

    It is read from the versions' tags and, where there is a cluster, from their Jobs: state, method, platforms, digest,
    failed attempts, since when, when a sweep tries again, the Job, and the error.
    """
    from builder import report
    from builder.cluster.api_server import Cluster
    from builder.cluster.job import selector
    from builder.cluster.status import status as read
    from builder.errors import BuilderError
    from builder.models.catalog import MlflowCatalog
    from builder.settings import Settings

    settings = invocation.settings(Settings, MODEL_NAME=name, MODEL_VERSION=version)
    catalog = MlflowCatalog.from_settings(settings)
    with ExitStack() as stack:
        cluster = None
        try:
            cluster = stack.enter_context(closing(Cluster(namespace, context=context)))
            # Whatever cluster a kubeconfig happens to name may be away, or none of ours: the tags tell without it.
            next(cluster.jobs(selector(settings.target)), None)
        except BuilderError as error:
            if watch or namespace or context:
                raise
            cluster = None
            invocation.log.info("Jobs are not shown", why=error.what)
        before: list[Status] = []
        while True:
            found = read(settings, catalog, cluster, settings.model_name, settings.model_version)
            changed = [each for each in found if each not in before]
            if output == "json":
                if changed or not watch:
                    invocation.product(report.as_json(found))
            elif changed or not before:
                invocation.product(report.statuses(changed or found, heading=not before))
            if not watch or cluster is None:
                return
            before = found
            invocation.stdout.flush()
            cluster.await_change(selector(settings.target), seconds=_WATCH)


@command(
    epilog=epilog(
        "builder doctor",
        "builder doctor pump_alarm        may the credential push to that model's repository?",
        "builder doctor -o json | jq -r '.[] | select(.state == \"fail\") | .check'",
        "kubectl -n builder exec deploy/builder-listener -- builder doctor",
        codes="0 nothing failed; else the highest of what failed, such as 69, 77 or 78.",
    )
)
@click.argument("name", required=False, metavar="[NAME]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=30,
    show_default=True,
    help="Seconds after which a check that has not ended is given up.",
)
@output_option
@in_namespace
@pass_invocation
def doctor(
    invocation: Invocation, name: str | None, *, timeout: float, output: str, namespace: str, context: str
) -> int:
    """Check all that a publish needs, and say what to do.

    MLflow, the registry, the base image, the package index, credentials, clocks, this machine, the cluster, webhook and
    listener are looked at side by side, with the settings of this environment. Nothing is changed: an upload is opened
    and cancelled. What cannot be seen from here is skipped, with the reason.
    """
    from builder import report
    from builder.cluster.api_server import in_cluster
    from builder.doctor import exit_code
    from builder.doctor.checklist import examine
    from builder.settings import DoctorSettings

    # What is tried again, and why, is for those who ask: the table says what came of it.
    level = invocation.environ.get("LOG_LEVEL") or "error"
    settings = invocation.settings(DoctorSettings, MODEL_NAME=name, LOG_LEVEL=level)
    found = examine(
        settings, in_pod=in_cluster(invocation.environ), namespace=namespace, context=context, seconds=timeout
    )
    invocation.product(report.as_json(found) if output == "json" else report.findings(found))
    return exit_code(found)


@command(epilog=epilog("builder logs pump_alarm 3", "builder logs pump_alarm 3 --follow"))
@model_arguments
@click.option("-f", "--follow", is_flag=True, help="Go on until the Job ends.")
@in_namespace
@pass_invocation
def logs(
    invocation: Invocation, name: str | None, version: str | None, *, follow: bool, namespace: str, context: str
) -> None:
    """Print the logs of a version's Job: those of all its containers, in the order they run."""
    from builder.cluster.follow import log_of

    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        for container, line in log_of(jobs, found, follow=follow):
            invocation.product(f"[{container}] {masked(line)}")
            invocation.stdout.flush()


@command(
    epilog=epilog(
        "builder retry pump_alarm 3", "builder retry pump_alarm 3 --wait", codes="as those of builder submit."
    )
)
@model_arguments
@click.option("--wait", is_flag=True, help="Show the logs, and exit as the publisher does.")
@in_namespace
@pass_invocation
def retry(
    invocation: Invocation, name: str | None, version: str | None, *, wait: bool, namespace: str, context: str
) -> int:  # fmt: skip
    """Publish a version again that has failed too often: earlier attempts no longer count."""
    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        return _submitted(invocation, jobs, found, jobs.retry(found), wait=wait)
