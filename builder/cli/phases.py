"""Commands for one version: publish it, or one phase of that; plan it; register it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from builder.cli.invocation import Invocation
from builder.cli.options import MODEL, again_options, command, epilog, model_arguments, output_option, pass_invocation
from builder.masking import json_visible, masked

if TYPE_CHECKING:
    from builder.publish import Published


@command(
    epilog=epilog(
        "builder publish pump_alarm 3",
        "builder publish pump_alarm @champion",
        "image=$(MODEL_NAME=pump_alarm MODEL_VERSION=3 builder publish)",
        codes="0 published, or there already; 65 the version cannot be published; see builder --help for the others.",
    )
)
@model_arguments
@again_options
@pass_invocation
def publish(invocation: Invocation, name: str | None, version: str | None, *, force: bool, rebuild: bool) -> None:
    """Publish one model version: fetch, build and push.

    The image's digest reference is printed. Where the image is there already, nothing is changed.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings, MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with progress() as of_artifacts:
        published = story.publish(
            settings,
            force=force or settings.publish_force,
            rebuild=rebuild or settings.publish_rebuild,
            progress=of_artifacts,
        )
    _tell(invocation, published)


@command(
    epilog=epilog(
        "builder plan pump_alarm 3",
        "builder plan pump_alarm @champion --check-push",
        "builder plan pump_alarm 3 -o json | jq .action",
        codes="those that a publish would end with, as far as they can be seen beforehand.",
    )
)
@model_arguments
@click.option("--json", "output", flag_value="json", help="The same as -o json.")
@output_option
@click.option("--check-push", is_flag=True, help="Open an upload and cancel it, to see if the credential may push.")
@again_options
@pass_invocation
def plan(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    output: str,
    check_push: bool,
    force: bool,
    rebuild: bool,
) -> None:
    """Print what a publish would do, and change nothing."""
    from builder import report
    from builder.publish import plan as plan_version
    from builder.publish.inspect import engine_here
    from builder.settings import Settings
    from builder.smoke import SmokeTests

    settings = invocation.settings(Settings, MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    planned = plan_version(settings, force=force, rebuild=rebuild, check_push=check_push)
    if output == "json":
        invocation.product(json_visible(masked(planned.model_dump_json(indent=2))))
    else:
        tested = SmokeTests(settings).describe(planned.all_platforms)
        engine = engine_here(settings)
        invocation.product(report.plan(planned, engine=engine, push_checked=check_push, smoke_test=tested))


@command(epilog=epilog("builder preflight pump_alarm 3", codes="77 the credential may not push."))
@model_arguments
@pass_invocation
def preflight(invocation: Invocation, name: str | None, version: str | None) -> None:
    """Phase 0: see whether the credential may push, before anything is built.

    An upload is opened in the version's repository, and cancelled. A refusal is recorded on the model version.
    """
    from builder import publish as story
    from builder.settings import Settings

    story.run_preflight(invocation.settings(Settings, MODEL, MODEL_NAME=name, MODEL_VERSION=version))


@command(
    epilog=epilog(
        "export BUILDER_WORKSPACE=/workspace",
        "builder fetch pump_alarm 3 && builder build && builder push",
    )
)
@model_arguments
@again_options
@pass_invocation
def fetch(invocation: Invocation, name: str | None, version: str | None, *, force: bool, rebuild: bool) -> None:
    """Phase 1: fetch what the image needs, and write the plan.

    Artifacts, Dockerfile or locks, and the plan are written to BUILDER_WORKSPACE, the folder that the three phases
    share. MLflow is needed, and the registry for reading.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings, MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with progress() as of_artifacts:
        story.run_fetch(
            settings,
            force=force or settings.publish_force,
            rebuild=rebuild or settings.publish_rebuild,
            progress=of_artifacts,
        )


@command(
    epilog=epilog(
        "BUILDER_WORKSPACE=/workspace builder build",
        codes="0 also where the Dockerfile fails: push reports it. 75 the engine was killed. Others: builder --help.",
    )
)
@pass_invocation
def build(invocation: Invocation) -> None:
    """Phase 2: run the Dockerfile, if there is one.

    It runs once for each platform, and leaves an OCI image layout for each in the workspace. A version that is made of
    wheel layers needs no build. The failure of a Dockerfile is written to the workspace, and push records and reports
    it. No credential is needed.
    """
    from builder import publish as story
    from builder.settings import BuildSettings

    story.run_build(invocation.settings(BuildSettings))


@command(
    epilog=epilog(
        "BUILDER_WORKSPACE=/workspace builder candidate",
        codes="73 the build had failed; see builder --help for the others.",
    )
)
@pass_invocation
def candidate(invocation: Invocation) -> None:
    """Between phases 2 and 3, in a Pod: make the image that its sidecar runs.

    The images are pushed, and the one for this machine is put under SMOKE_TEST_CANDIDATE, from where the kubelet
    starts the sidecar. The push phase asks that, and moves the tag if it answers. See docs/how-it-works.md.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings)
    with progress():
        story.run_candidate(settings)


@command(
    epilog=epilog(
        "BUILDER_WORKSPACE=/workspace builder push",
        codes="73 the build had failed; see builder --help for the others.",
    )
)
@pass_invocation
def push(invocation: Invocation) -> None:
    """Phase 3: push the images, and move the tag.

    The outcome is recorded on the model version, and the image's digest reference is printed.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings)
    with progress():
        published = story.run_push(settings)
    _tell(invocation, published)


def _tell(invocation: Invocation, published: Published) -> None:
    """Print the digest reference, and leave the outcome as a Pod's termination message."""
    state = "foreign" if published.reference is None else "published"
    message: dict[str, object] = {
        "state": state,
        "image": str(published.reference or ""),
        "tag": str(published.tag),
    }
    facts = {"method": published.method, "seconds": published.seconds, "sent": published.sent, "saved": published.saved}
    message = {**message, "platforms": published.platforms, "changed": published.changed, **facts}
    invocation.leave_message(message)
    if published.reference is not None:
        invocation.product(str(published.reference))


@command(
    epilog=epilog(
        "builder register --name pump_alarm --model mymodel --client client \\\n      --entry-point app.py",
        codes="65 the model could not be published like that, and nothing was sent; see builder --help for the others.",
    )
)
@click.option("--name", required=True, help="The registered model's name; made where it does not exist.")
@click.option(
    "--model", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of a saved MLflow model."
)
@click.option("--client", type=click.Path(file_okay=False, path_type=Path), help="Folder of client programs.")
@click.option("--templates", type=click.Path(file_okay=False, path_type=Path), help="Folder with Dockerfile.template.")
@click.option("--entry-point", default="", help="The client program that the image runs.")
@click.option("--command-line", default="", help="Arguments of the entry point (MODEL_EXECUTE_PATH).")
@click.option("--platforms", default="", help="Platforms of this version, separated by commas.")
@click.option("--base-image", default="", help="Base image of this version.")
@click.option("--experiment", default="", help="Experiment of the run that holds the artifacts.")
@click.option("--select/--no-select", default=True, show_default=True, help="Set the target tag.")
@pass_invocation
def register(invocation: Invocation, /, model: Path, **options: Any) -> None:  # what the options above are named
    """Register a saved model, ready to be published.

    The model, the client and the templates are checked, logged in the layout that publishing reads, and registered with
    the tags that publishing needs. The new version's number is printed.
    """
    from builder.dockerfile.template import rendered
    from builder.models.register import register as run
    from builder.settings import CatalogSettings

    settings = invocation.settings(CatalogSettings)
    version = run(settings, model, check_templates=lambda *found: rendered(settings, *found), **options)
    invocation.product(version.version)
