"""The commands: each its help and one call.

Heavy modules are imported where a command needs them, so that `builder --help` answers at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

import click

from builder import __version__
from builder.errors import ExitCode
from builder.masking import indented, json_visible, masked, one_line, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from structlog.stdlib import BoundLogger

    from builder.cluster import Jobs, Submitted
    from builder.cluster.status import Status
    from builder.models import ModelVersion
    from builder.publish import Published
    from builder.settings import CommonSettings

    S = TypeVar("S", bound=CommonSettings)


# A Pod's termination message has at most 4096 bytes.
_MOST_MESSAGE_BYTES = 4096
_MOST_SAID = 10_000
# Seconds until `status --watch` looks again while no Job changes.
_WATCH = 30


@dataclass
class Invocation:
    """One run of the program: its environment, where its product goes, and how it says what failed."""

    environ: Mapping[str, str]
    stdout: TextIO = field(default_factory=lambda: sys.stdout)
    # What the line of the log that says what failed names beside the reason.
    about: dict[str, str] = field(default_factory=dict)
    _logs: bool = False

    @contextmanager
    def reserved_stdout(self) -> Iterator[None]:
        """Keep the process's stdout for the command's product, and send everything else that is printed to stderr.

        A library that prints (MLflow does) must not get between a script and the digest reference it reads.
        """
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            with os.fdopen(os.dup(kept), "w", encoding="utf-8") as self.stdout:
                yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)

    def settings(self, kind: type[S], require: tuple[str, ...] = (), **overrides: object) -> S:
        """Return the settings of one kind, and send logs where they say."""
        from builder import log

        settings = kind.from_environ(self.environ, require, **overrides)
        log.configure(settings.log_format, settings.log_level)
        self._logs = True
        of_version = {"model": getattr(settings, "model_name", ""), "version": getattr(settings, "model_version", "")}
        self.about = {key: value for key, value in of_version.items() if value}
        return settings

    def product(self, text: str) -> None:
        """Print lines on stdout. What other people wrote in them is masked before: a reference must stay as it is."""
        self.stdout.write("\n".join(visible(line) for line in text.split("\n")) + "\n")

    def failed(
        self,
        kind: str,
        what: str,
        remedy: str,
        code: int,
        problems: Sequence[str] = (),
        *,
        defect: Exception | None = None,
    ) -> None:
        """Say on stderr what failed and what to do, and leave it as a Pod's termination message.

        On a terminal, and where LOG_FORMAT is `text`, that is for people; elsewhere it is a line of the log.

        Args:
            kind: the error's name.
            what: what failed.
            remedy: what to do about it.
            code: the exit code.
            problems: what `what` lists after a colon, if it does: for people, a line for each.
            defect: what is shown with its traceback.
        """
        what, remedy = one_line(what, _MOST_SAID), one_line(remedy, _MOST_SAID)
        if sys.stderr.isatty() or self.environ.get("LOG_FORMAT") == "text":
            if defect:
                click.echo(indented("".join(traceback.format_exception(defect))), err=True)
            said = f"{what.partition(':')[0]}:" if len(problems) > 1 else what
            click.echo(f"{click.style('error:', fg='red', bold=True)} {said}", err=True)
            for problem in problems if len(problems) > 1 else ():
                click.echo(f"  - {one_line(problem, _MOST_SAID)}", err=True)
            if remedy:
                click.echo(f"  {click.style('what to do:', bold=True)} {remedy}", err=True)
        else:
            facts = {**self.about, "error": kind, "what": what, "remedy": remedy, "exit_code": int(code)}
            if self._logs:
                from builder import log

                log.get_logger("cli").error("failed", **facts, exc_info=defect)
            else:
                # As lines of the log are. It is not there yet, and cannot be had where a request to end broke off its
                # import: what that leaves of modules is not imported again.
                when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
                line = {**facts, "event": "failed", "level": "error", "timestamp": when}
                if defect:
                    line["exception"] = masked("".join(traceback.format_exception(defect)))
                click.echo(json.dumps(line), err=True)
        self.leave_message({"state": "failed", "error": one_line(f"{kind}: {what} {remedy}"), "exit_code": int(code)})

    def defect(self, error: Exception) -> None:
        """Say on stderr that this program is at fault, with where."""
        what = f"{type(error).__name__}: {one_line(str(error), 300)}"
        remedy = "This is a defect of the builder, not of your input. Please report it with the lines above."
        self.failed("Defect", what, remedy, ExitCode.SOFTWARE, defect=error)

    def leave_message(self, message: Mapping[str, object]) -> None:
        """Write the outcome to the termination log, where that file exists; long texts are cut to what it may hold."""
        path = Path(self.environ.get("TERMINATION_LOG") or "/dev/termination-log")
        limit = _MOST_MESSAGE_BYTES
        while len(text := _message(message, limit)) > _MOST_MESSAGE_BYTES and limit > 1:
            limit //= 2
        try:
            if path.is_file():
                path.write_text(text)
        except OSError as error:
            click.echo(visible(f"{path} cannot be written: {error.strerror}"), err=True)


def _message(message: Mapping[str, object], limit: int) -> str:
    """Return a termination message in ASCII, its texts cut to a limit; the image that was published is never masked."""
    whole = {"image", "tag"}
    return json.dumps(
        {
            key: one_line(value, limit) if isinstance(value, str) and key not in whole else value
            for key, value in message.items()
        }
    )


_pass = click.make_pass_decorator(Invocation)


class _Command(click.Command):
    """A command that has stdout for its product alone; its help is printed before that."""

    def invoke(self, ctx: click.Context) -> Any:  # what the command returns
        """Run the command."""
        with ctx.find_object(Invocation).reserved_stdout():  # type: ignore[union-attr] # `run` always gives one
            return super().invoke(ctx)


class _Group(click.Group):
    """A group that lists its commands in the order of a publish, not of the alphabet."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


def _model(command: Callable[..., object]) -> Callable[..., object]:
    command = click.argument("version", required=False, metavar="[VERSION]")(command)
    return click.argument("name", required=False, metavar="[NAME]")(command)


def _in_namespace(command: Callable[..., object]) -> Callable[..., object]:
    command = click.option("--context", default="", help="Context of the kubeconfig, if not its current one.")(command)
    return click.option(
        "-n", "--namespace", default="", help="Namespace of the Jobs, in place of the context's own, or else 'builder'."
    )(command)


_output = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print it."
)


def _again(command: Callable[..., object]) -> Callable[..., object]:
    command = click.option("--rebuild", is_flag=True, help="Make the image again although it is there.")(command)
    return click.option(
        "--force", is_flag=True, help="Replace an image that another source, or somebody else, left under the tag."
    )(command)


_MODEL = ("MODEL_NAME", "MODEL_VERSION")

_EXIT_CODES = """\b
Exit codes:
  0   done, or nothing to do
  64  the command line is wrong
  65  the model version cannot be published as it is
  66  there is no such model, version or alias
  69  a service is away: MLflow, a registry, a package index
  70  a defect of this program
  73  the image could not be built
  75  try again: a lost race, a full disk, a signal
  77  a credential is missing or refused
  78  a setting is missing or wrong"""


def _epilog(*examples: str, codes: str = "see builder --help.") -> str:
    """Return what stands below a command's options: examples, and exit codes."""
    lines = "\n".join(f"  {example}" for example in examples)
    return f"\b\nExamples:\n{lines}\n\nExit codes: {codes}"


_EXAMPLES = """\b
Examples:
  builder plan pump_alarm 3       what a publish would do
  builder publish pump_alarm 3    publish one version
  builder sweep                   publish every version that is tagged"""


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}",
)
@click.version_option(__version__, prog_name="builder", message="%(prog)s %(version)s")
def builder() -> None:
    """Publish registered MLflow models as container images, without a Docker daemon.

    Settings come from the environment; docs/settings.md lists them. MLFLOW_TRACKING_URI has to be set, and
    REGISTRY_URL for all commands but download and register. NAME and VERSION stand for MODEL_NAME and MODEL_VERSION; a
    version is a number, or an alias such as @champion. Only results go to stdout, such as a digest reference; logs go
    to stderr.
    """


@builder.command(
    epilog=_epilog(
        "builder publish pump_alarm 3",
        "builder publish pump_alarm @champion",
        "image=$(MODEL_NAME=pump_alarm MODEL_VERSION=3 builder publish)",
        codes="0 published, or there already; 65 the version cannot be published; see builder --help for the others.",
    )
)
@_model
@_again
@_pass
def publish(invocation: Invocation, name: str | None, version: str | None, *, force: bool, rebuild: bool) -> None:
    """Publish one model version: fetch, build and push.

    The image's digest reference is printed. Where the image is there already, nothing is changed.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings, _MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with progress() as of_artifacts:
        published = story.publish(
            settings,
            force=force or settings.publish_force,
            rebuild=rebuild or settings.publish_rebuild,
            progress=of_artifacts,
        )
    _tell(invocation, published)


@builder.command(
    epilog=_epilog(
        "builder plan pump_alarm 3",
        "builder plan pump_alarm @champion --check-push",
        "builder plan pump_alarm 3 -o json | jq .action",
        codes="those that a publish would end with, as far as they can be seen beforehand.",
    )
)
@_model
@click.option("--json", "output", flag_value="json", help="The same as -o json.")
@_output
@click.option("--check-push", is_flag=True, help="Open an upload and cancel it, to see if the credential may push.")
@_again
@_pass
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

    settings = invocation.settings(Settings, _MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    planned = plan_version(settings, force=force, rebuild=rebuild, check_push=check_push)
    if output == "json":
        invocation.product(json_visible(masked(planned.model_dump_json(indent=2))))
    else:
        tested = SmokeTests(settings).describe(planned.all_platforms)
        engine = engine_here(settings)
        invocation.product(report.plan(planned, engine=engine, push_checked=check_push, smoke_test=tested))


@builder.command(epilog=_epilog("builder preflight pump_alarm 3", codes="77 the credential may not push."))
@_model
@_pass
def preflight(invocation: Invocation, name: str | None, version: str | None) -> None:
    """Phase 0: see whether the credential may push, before anything is built.

    An upload is opened in the version's repository, and cancelled. A refusal is recorded on the model version.
    """
    from builder import publish as story
    from builder.settings import Settings

    story.run_preflight(invocation.settings(Settings, _MODEL, MODEL_NAME=name, MODEL_VERSION=version))


@builder.command(
    epilog=_epilog(
        "export BUILDER_WORKSPACE=/workspace",
        "builder fetch pump_alarm 3 && builder build && builder push",
    )
)
@_model
@_again
@_pass
def fetch(invocation: Invocation, name: str | None, version: str | None, *, force: bool, rebuild: bool) -> None:
    """Phase 1: fetch what the image needs, and write the plan.

    Artifacts, Dockerfile or locks, and the plan are written to BUILDER_WORKSPACE, the folder that the three phases
    share. MLflow is needed, and the registry for reading.
    """
    from builder import publish as story
    from builder.report import progress
    from builder.settings import Settings

    settings = invocation.settings(Settings, _MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with progress() as of_artifacts:
        story.run_fetch(
            settings,
            force=force or settings.publish_force,
            rebuild=rebuild or settings.publish_rebuild,
            progress=of_artifacts,
        )


@builder.command(
    epilog=_epilog(
        "BUILDER_WORKSPACE=/workspace builder build",
        codes="0 also where the Dockerfile fails: push reports it. 75 the engine was killed. Others: builder --help.",
    )
)
@_pass
def build(invocation: Invocation) -> None:
    """Phase 2: run the Dockerfile, if there is one.

    It runs once for each platform, and leaves an OCI image layout for each in the workspace. A version that is made of
    wheel layers needs no build. The failure of a Dockerfile is written to the workspace, and push records and reports
    it. No credential is needed.
    """
    from builder import publish as story
    from builder.settings import BuildSettings

    story.run_build(invocation.settings(BuildSettings))


@builder.command(
    epilog=_epilog(
        "BUILDER_WORKSPACE=/workspace builder candidate",
        codes="73 the build had failed; see builder --help for the others.",
    )
)
@_pass
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


@builder.command(
    epilog=_epilog(
        "BUILDER_WORKSPACE=/workspace builder push",
        codes="73 the build had failed; see builder --help for the others.",
    )
)
@_pass
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
    message = {"state": state, "image": str(published.reference or ""), "tag": str(published.tag)}
    invocation.leave_message({**message, "platforms": published.platforms, "changed": published.changed})
    if published.reference is not None:
        invocation.product(str(published.reference))


@builder.command(
    epilog=_epilog(
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
@_output
@_again
@_pass
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


@builder.command(
    epilog=_epilog(
        "builder submit pump_alarm 3",
        "builder submit pump_alarm @champion --wait",
        codes="with --wait those of the publisher; see builder --help.",
    )
)
@_model
@click.option("--wait", is_flag=True, help="Show the logs, and exit as the publisher does.")
@click.option("--method", type=click.Choice(["wheels", "dockerfile"]), help="The template, whatever the version has.")
@_in_namespace
@_again
@_pass
def submit(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    wait: bool,
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
    """
    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        made = jobs.submit(found, method=method, force=force, rebuild=rebuild)
        if not made.created and (force or rebuild or method):
            _lines().warning("--force, --rebuild and --method have no effect on a Job that is there", job=made.name)
        return _submitted(invocation, jobs, found, made, wait=wait)


def _submitted(invocation: Invocation, jobs: Jobs, version: ModelVersion, made: Submitted, *, wait: bool) -> int:
    """Print the name of a Job; or wait, print its image, or say what ended it. Return the exit code."""
    from builder.cluster.follow import follow

    if not made.created:
        _lines().info("the version has a Job that runs already", job=made.name)
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


def _lines() -> BoundLogger:
    from builder import log

    return log.get_logger("cli")


@contextmanager
def _in_cluster(
    invocation: Invocation, name: str | None, version: str | None, *, namespace: str, context: str
) -> Iterator[tuple[Jobs, ModelVersion]]:
    """Give the Jobs, and the version that is named."""
    from builder.cluster import Jobs
    from builder.cluster.api_server import Cluster
    from builder.models.catalog import MlflowCatalog
    from builder.settings import Settings

    settings = invocation.settings(Settings, _MODEL, MODEL_NAME=name, MODEL_VERSION=version)
    with closing(Cluster(namespace, context=context)) as cluster:
        catalog = MlflowCatalog.from_settings(settings)
        found = catalog.find(settings.model_name, settings.model_version)
        yield Jobs(settings=settings, cluster=cluster, catalog=catalog), found


@builder.command(
    epilog=_epilog(
        "builder status",
        "builder status pump_alarm 3 -o json | jq -r '.[0].digest'",
        "builder status --watch",
    )
)
@_model
@click.option("--watch", is_flag=True, help="Print what changes, until interrupted.")
@_output
@_in_namespace
@_pass
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
            _lines().info("Jobs are not shown", why=error.what)
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


@builder.command(epilog=_epilog("builder logs pump_alarm 3", "builder logs pump_alarm 3 --follow"))
@_model
@click.option("-f", "--follow", is_flag=True, help="Go on until the Job ends.")
@_in_namespace
@_pass
def logs(
    invocation: Invocation, name: str | None, version: str | None, *, follow: bool, namespace: str, context: str
) -> None:
    """Print the logs of a version's Job: those of all its containers, in the order they run."""
    from builder.cluster.follow import log_of

    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        for container, line in log_of(jobs, found, follow=follow):
            invocation.product(f"[{container}] {masked(line)}")
            invocation.stdout.flush()


@builder.command(
    epilog=_epilog(
        "builder retry pump_alarm 3", "builder retry pump_alarm 3 --wait", codes="as those of builder submit."
    )
)
@_model
@click.option("--wait", is_flag=True, help="Show the logs, and exit as the publisher does.")
@_in_namespace
@_pass
def retry(
    invocation: Invocation, name: str | None, version: str | None, *, wait: bool, namespace: str, context: str
) -> int:  # fmt: skip
    """Publish a version again that has failed too often: earlier attempts no longer count."""
    with _in_cluster(invocation, name, version, namespace=namespace, context=context) as (jobs, found):
        return _submitted(invocation, jobs, found, jobs.retry(found), wait=wait)


@builder.command(
    epilog=_epilog(
        "builder warm",
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
@_output
@_pass
def warm(
    invocation: Invocation, requirements: Path | None, python: str, platforms: str | None, *, verify: bool, output: str
) -> int:  # fmt: skip
    """Make wheel layers and locks ahead of time.

    They are those of every version that carries the target tag, unless --requirements names a file. A publish then
    finds them in WHEEL_LAYERS, and neither downloads nor builds any. With --verify, the layers and locks that are
    stored there are rebuilt from wheels and base images, and compared.
    """
    from builder import report
    from builder.batch import warm as story
    from builder.settings import Settings

    if bool(requirements) != bool(python) or (python and not re.fullmatch(r"3\.[0-9]{1,2}", python)):
        message = "--requirements and --python go together: --requirements requirements.txt --python 3.11."
        raise click.UsageError(message)
    settings = invocation.settings(Settings, TARGET_PLATFORMS=platforms)
    if requirements:
        results = [story.warm_requirements(settings, requirements, python=python, verify=verify)]
    else:
        results = list(story.warm(settings, verify=verify))
    if output == "json":
        invocation.product(report.as_json(results))
    report.warmed(results)
    states = dict(Counter(result.state for result in results))
    wrong = "; ".join(f"{result.name}: {result.detail}" for result in results if result.exit_code)
    invocation.leave_message({"state": "failed" if wrong else "warmed", "environments": states, "error": wrong})
    return max((result.exit_code for result in results), default=0)


@builder.command(
    epilog=_epilog(
        "builder download /srv/models",
        "builder download /srv/models --model pump_alarm --version 3",
        codes="that of a version that could not be downloaded, the highest of several; see builder --help.",
    )
)
@click.argument("destination", type=click.Path(file_okay=False, path_type=Path))
@click.option("--model", "name", help="Only this registered model.")
@click.option("--version", "version", help="Only this version of it; it need not carry the target tag.")
@_output
@_pass
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


@builder.command(
    epilog=_epilog(
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
@_pass
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
