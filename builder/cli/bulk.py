"""Commands for many versions: publish them, make their layers, download them."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path

import click

from builder.cli.invocation import Invocation
from builder.cli.options import again_options, command, epilog, model_arguments, output_option, pass_invocation


@command(
    epilog=epilog(
        "builder sweep",
        "builder sweep --inline --check   also look for images that are missing",
        "builder sweep --retry-failed     after a correction of the settings",
        codes="69, 70, 75, 77 or 78 where the publisher itself was hindered; 65, 66 or 73, of a version, with --strict "
        "alone; else 0.",
    )
)
@click.option("--inline", is_flag=True, help="Publish in this process, also in a cluster.")
@click.option("--check", is_flag=True, help="Look at the registry for published versions, too; inline only.")
@click.option("--retry-failed", is_flag=True, help="Try versions again that have failed too often.")
@click.option("--strict", is_flag=True, help="Exit with the code of a version that cannot be published, too.")
@output_option
@again_options
@pass_invocation
def sweep(
    invocation: Invocation,
    *,
    inline: bool,
    check: bool,
    retry_failed: bool,
    strict: bool,
    output: str,
    force: bool,
    rebuild: bool,
) -> int:
    """Publish every version that carries the target tag.

    The tag is EXTERNAL_TARGET_PLTR_FOUNDRY=true unless TARGET_TAG names another. In a Pod with a service account, a Job
    is made for each version, and SWEEP_PARALLEL of them run at once; elsewhere, and with --inline, each version is
    published in a process of its own, and the digest references of new images are printed. A version that fails stops
    no other: its error is on the version, in the log and in the summary.
    """
    from builder import report
    from builder.batch.sweep import Options
    from builder.batch.sweep import sweep as run
    from builder.cluster.api_server import Cluster, in_cluster
    from builder.settings import Settings

    settings = invocation.settings(Settings)
    swept = []
    options = Options(check=check, retry_failed=retry_failed, force=force, rebuild=rebuild)
    with ExitStack() as stack:
        if inline or not in_cluster(invocation.environ):
            found = run(settings, options)
        else:
            from builder.cluster.reconcile import reconcile

            if options.queries_registry:
                message = "--check, --force and --rebuild need the registry, for which a sweep that makes Jobs has no "
                message += "credential. Use --inline, or builder submit for a version."
                raise click.UsageError(message)
            cluster = stack.enter_context(closing(Cluster()))
            found = reconcile(settings, cluster, retry_failed=retry_failed)
        for result in found:
            swept.append(result)
            if result.reference is not None and output != "json":
                invocation.product(str(result.reference))
    if output == "json":
        invocation.product(report.as_json(swept))
    report.results("swept", swept)
    states = dict(Counter(result.state for result in swept))
    failed = [f"{result.name}: {result.detail}" for result in swept if result.state == "failed"]
    code = max((result.exit_code for result in swept if strict or not result.own_fault), default=0)
    invocation.leave_message({"state": "failed" if code else "swept", "versions": states, "error": "; ".join(failed)})
    return code


@command(
    epilog=epilog(
        "builder warm",
        "builder warm pump_alarm 3",
        "builder warm --requirements common.txt --python 3.11",
        "builder warm --verify",
        codes="65 --verify found a difference; 73 a layer cannot be rebuilt; see builder --help for the others.",
    )
)
@click.option(
    "--requirements",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A requirements file, in place of the tagged versions.",
)
@click.option("--python", default="", metavar="X.Y", help="The Python version for --requirements, such as 3.11.")
@click.option("--platforms", help="Platforms, separated by commas, in place of TARGET_PLATFORMS.")
@click.option("--verify", is_flag=True, help="Write nothing: rebuild what is stored, and compare.")
@output_option
@model_arguments
@pass_invocation
def warm(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    requirements: Path | None,
    python: str,
    platforms: str | None,
    verify: bool,
    output: str,
) -> int:
    """Make wheel layers and locks ahead of time.

    They are those of one version, or else of every version that carries the target tag, unless --requirements names a
    file. A publish then finds them in WHEEL_LAYERS, and neither downloads nor builds any. With --verify, the layers and
    locks that are stored there are rebuilt from wheels and base images, and compared.
    """
    from builder import report
    from builder.batch import warm as story
    from builder.settings import Settings

    if bool(requirements) != bool(python) or (python and not re.fullmatch(r"3\.[0-9]{1,2}", python)):
        message = "--requirements and --python go together: --requirements requirements.txt --python 3.11."
        raise click.UsageError(message)
    settings = invocation.settings(Settings, TARGET_PLATFORMS=platforms, MODEL_NAME=name, MODEL_VERSION=version)
    if bool(settings.model_name) != bool(settings.model_version):
        message = "NAME and VERSION go together, as do MODEL_NAME and MODEL_VERSION."
        raise click.UsageError(message)
    if requirements:
        results = [story.warm_requirements(settings, requirements, python=python, verify=verify)]
    else:
        one = {"name": settings.model_name, "version": settings.model_version}
        results = list(story.warm(settings, **one, verify=verify))
    if output == "json":
        invocation.product(report.as_json(results))
    report.warmed(results)
    states = dict(Counter(result.state for result in results))
    wrong = "; ".join(f"{result.name}: {result.detail}" for result in results if result.exit_code)
    invocation.leave_message({"state": "failed" if wrong else "warmed", "environments": states, "error": wrong})
    return max((result.exit_code for result in results), default=0)


@command(
    epilog=epilog(
        "builder download /srv/models",
        "builder download /srv/models --model pump_alarm --version 3",
        codes="that of a version that could not be downloaded, the highest of several; see builder --help.",
    )
)
@click.argument("destination", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "name", help="Only this registered model.")
@click.option("--version", "version", help="Only this version of it; it need not carry the target tag.")
@output_option
@pass_invocation
def download(invocation: Invocation, destination: Path, name: str | None, version: str | None, *, output: str) -> int:
    """Download tagged versions to a folder.

    Each version becomes DESTINATION/<model>/v<N>, whole or not at all, with its templates rendered. Only new and
    changed versions are downloaded. The folders that were written are printed. No registry is needed.
    """
    from builder import report
    from builder.batch.download import download_all
    from builder.settings import CatalogSettings

    if version and not name:
        message = "--version needs --model, since versions are numbered for each model."
        raise click.UsageError(message)
    settings = invocation.settings(CatalogSettings)
    if not name:
        name, version = invocation.environ.get("MODEL_NAME"), invocation.environ.get("MODEL_VERSION")
    results = []
    for result in download_all(settings, destination, name=name or "", version=version or ""):
        results.append(result)
        if result.state in {"new", "changed"} and output != "json":
            invocation.product(str(result.folder))
    if output == "json":
        invocation.product(report.as_json(results))
    report.results("downloaded", results)
    return max((result.exit_code for result in results), default=0)
