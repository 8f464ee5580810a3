"""Commands for the listener: it, and the webhook that tells it of versions."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from builder.cli.invocation import Invocation
from builder.cli.options import Group, command, epilog, in_namespace, output_option, pass_invocation
from builder.errors import ExitCode
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from builder.models.webhooks import Webhooks
    from builder.settings import CatalogSettings


@command(
    epilog=epilog(
        "builder listen",
        "WEBHOOK_SECRET=… builder webhook create https://builder.example.com   have MLflow deliver there",
        codes="0 asked to end; 78 a setting or a certificate cannot be used; see builder --help for the others.",
    )
)
@in_namespace
@pass_invocation
def listen(invocation: Invocation, *, namespace: str, context: str) -> None:
    """Make a version's Job as soon as MLflow says that it was tagged.

    MLflow's webhook delivers to LISTEN_PORT, path /webhook; the paths /publish and /outcome are for `builder submit
    --via` and `builder hook`. Metrics and health checks are on METRICS_PORT. It goes on until it is asked to end. A
    sweep does what it misses.
    """
    from builder.cluster.api_server import Cluster
    from builder.listener.server import listen as run
    from builder.settings import ListenSettings

    settings = invocation.settings(ListenSettings)
    with closing(Cluster(namespace, context=context)) as cluster:
        run(settings, cluster)


@click.group(
    cls=Group,
    epilog=epilog(
        "builder webhook create https://builder.example.com",
        "builder webhook list",
        "builder webhook test builder",
        "builder webhook delete builder",
    ),
)
def webhook() -> None:
    """Have MLflow's server tell the listener what happens to versions.

    MLFLOW_TRACKING_URI names the server; MLflow 3.3 or newer with a database is needed. What its server refuses by
    default is in docs/kubernetes.md.
    """


@contextmanager
def _webhooks(settings: CatalogSettings) -> Iterator[Webhooks]:
    from builder.domino import restored
    from builder.models.catalog import MlflowCatalog
    from builder.models.webhooks import Webhooks

    with restored():
        yield Webhooks(MlflowCatalog.from_settings(settings))


@webhook.command(epilog=epilog("builder webhook create https://builder.example.com --name builder"))
@click.argument("url")
@click.option("--name", default="builder", show_default=True, help="Its name, for people.")
@pass_invocation
def create(invocation: Invocation, url: str, name: str) -> None:
    """Register a webhook that delivers to the listener at URL, signed with WEBHOOK_SECRET.

    Its id is printed. MLflow may stay silent for a minute (MLFLOW_WEBHOOK_CACHE_TTL on its server).
    """
    from builder.models.webhooks import address_of
    from builder.settings import WebhookSettings, several

    settings = invocation.settings(WebhookSettings, ("WEBHOOK_SECRET",))
    secret = several(settings.webhook_secret)[0]
    with _webhooks(settings) as webhooks:
        made = webhooks.create(name, address_of(url), secret)
    invocation.log.info("MLflow delivers from now on, or within a minute", url=made.url, events=list(made.events))
    invocation.product(made.id)


@webhook.command("list", epilog=epilog("builder webhook list -o json"))
@output_option
@pass_invocation
def list_webhooks(invocation: Invocation, output: str) -> None:
    """Print the webhooks that MLflow's server has."""
    from builder import report
    from builder.settings import WebhookSettings

    with _webhooks(invocation.settings(WebhookSettings)) as webhooks:
        found = list(webhooks.all())
    invocation.product(report.as_json(found) if output == "json" else report.webhooks(found))


@webhook.command(epilog=epilog("builder webhook test builder", codes="69 the listener did not take it."))
@click.argument("webhook_id", metavar="ID")
@pass_invocation
def test(invocation: Invocation, webhook_id: str) -> int:
    """Have MLflow's server deliver an example, and say what became of it. ID is an id or a name."""
    from builder.settings import WebhookSettings

    with _webhooks(invocation.settings(WebhookSettings)) as webhooks:
        done = webhooks.test(webhooks.find(webhook_id).id)
    if done.delivered:
        invocation.log.info("delivered", status=done.status)
        return 0
    what = f"The listener did not take the example: {done.status or 'no answer'} {one_line(done.detail, 500)}".rstrip()
    invocation.failed("NotDelivered", f"{what}.", done.remedy, ExitCode.UNAVAILABLE)
    return ExitCode.UNAVAILABLE


@webhook.command(epilog=epilog("builder webhook delete builder"))
@click.argument("webhook_id", metavar="ID")
@pass_invocation
def delete(invocation: Invocation, webhook_id: str) -> None:
    """Delete a webhook. ID is an id or a name."""
    from builder.settings import WebhookSettings

    with _webhooks(invocation.settings(WebhookSettings)) as webhooks:
        found = webhooks.find(webhook_id)
        webhooks.delete(found.id)
    invocation.log.info("deleted", id=found.id, url=found.url)
