"""Commands for jobs of Domino's: what they run, and what starts one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from builder.cli.invocation import Invocation
from builder.cli.options import Group, command, epilog, in_namespace, model_arguments, pass_invocation
from builder.masking import one_line


@command(
    epilog=epilog(
        "builder hook",
        "builder hook pump_alarm 3 --how listener",
        "builder hook pump_alarm @champion --result published.json",
        codes="those of the publisher; 66 this run registered no selected version; 75 the Job goes on; "
        "see builder --help.",
    )
)
@model_arguments
@click.option(
    "--how",
    type=click.Choice(["here", "listener", "cluster"]),
    help="The only way that may be taken: in this process by wheels, through the listener at LISTENER_URL, or by the "
    "Kubernetes API. Otherwise the first that is possible.",
)
@click.option(
    "--stats",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for Domino's dashboard, in place of dominostats.json in DOMINO_WORKING_DIR.",
)
@click.option("--result", type=click.Path(dir_okay=False, path_type=Path), help="File for what came of it, as JSON.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=7200,
    show_default=True,
    help="Seconds to follow a Job in Kubernetes, which then goes on.",
)
@in_namespace
@pass_invocation
def hook(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    how: Literal["here", "listener", "cluster"] | None,
    stats: Path | None,
    result: Path | None,
    timeout: float,
    namespace: str,
    context: str,
) -> int:
    """Publish one model version out of a Domino run, or of any other job.

    Without NAME and VERSION it is the newest version that carries the target tag and was registered in this run
    (DOMINO_RUN_ID, or MLFLOW_RUN_ID). It is followed to its end, and the image's digest reference is printed. What came
    of it is added to dominostats.json, whose keys are columns of Domino's Jobs dashboard. See docs/domino.md.
    """
    from builder.errors import InvalidSettings
    from builder.hook import Hook, leave_word
    from builder.hook.ways import Result
    from builder.settings import HookSettings

    for path in filter(None, (stats, result)):
        if not os.access(path.parent, os.W_OK):
            message = f"{str(path)!r} cannot be written: its folder does not exist, or is read-only."
            raise click.UsageError(message)
    if invocation.environ.get("DOMINO_RUN_ID") and not invocation.environ.get("LOG_FORMAT"):
        # Domino shows a run's output to people.
        invocation.environ = {**invocation.environ, "LOG_FORMAT": "text"}
    try:
        settings = invocation.settings(HookSettings, MODEL_NAME=name, MODEL_VERSION=version)
    except InvalidSettings as error:
        folder = invocation.environ.get("DOMINO_WORKING_DIR")
        leave_word(Result(state="failed", error=error), stats, result, folder=Path(folder) if folder else None)
        raise
    asked = Hook(
        settings=settings,
        environ=invocation.environ,
        how=how,
        namespace=namespace,
        context=context,
        timeout=timeout,
        stats=stats,
        result=result,
    )
    done = asked.run()
    if done.error:
        raise done.error
    invocation.leave_message({"state": done.state, "image": done.image, "platforms": done.platforms, "how": done.how})
    if done.image:
        invocation.product(done.image)
    return 0


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def domino() -> None:
    """Start jobs in Domino, from outside or from another run; see docs/domino.md."""


@domino.command(
    epilog=epilog(
        "builder domino launch pump_alarm 3",
        "builder domino launch --command 'python publish_hook.py' --no-wait",
        codes="0 the job succeeded; 73 it failed, and its log tells why; 75 it was stopped, or goes on.",
    )
)
@model_arguments
@click.option("--project-id", help="The project, in place of DOMINO_PROJECT_ID.")
@click.option(
    "--command", "run", default="builder hook", show_default=True, help="What the job runs; NAME and VERSION follow it."
)
@click.option("--environment-id", default="", help="The job's environment, if not the project's own.")
@click.option("--hardware-tier-id", default="", help="The job's hardware tier, if not the project's own.")
@click.option("--no-wait", is_flag=True, help="Print the job's id, and do not follow it.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=7200, show_default=True, help="Seconds to follow the job."
)
@pass_invocation
def launch(
    invocation: Invocation,
    name: str | None,
    version: str | None,
    *,
    project_id: str | None,
    run: str,
    environment_id: str,
    hardware_tier_id: str,
    no_wait: bool,
    timeout: float,
) -> int:
    """Start a Domino job that publishes, follow it, and exit with its outcome.

    The job's id is printed. DOMINO_API_HOST is Domino's address, and DOMINO_TOKEN, DOMINO_TOKEN_FILE or
    DOMINO_USER_API_KEY proves who asks; in a Domino run, its proxy does. Domino does not tell a job's exit code.
    """
    import shlex

    from builder.errors import Terminated
    from builder.hook.domino_api import DominoApi, Order
    from builder.settings import HookSettings

    if bool(name) != bool(version):
        message = "NAME and VERSION go together: builder domino launch pump_alarm 3."
        raise click.UsageError(message)
    settings = invocation.settings(HookSettings, ("DOMINO_PROJECT_ID",), DOMINO_PROJECT_ID=project_id)
    command = " ".join([run, *(shlex.quote(word) for word in (name, version) if word)])
    order = Order(
        project=settings.domino_project_id,
        command=command,
        environment=environment_id,
        hardware_tier=hardware_tier_id,
        title=one_line(f"publish {name} version {version}" if name else "publish", 100),
    )
    with DominoApi.from_settings(settings) as api:
        job = api.start(order)
        invocation.log.info("started a Domino job", job=job, command=command)
        invocation.product(job)
        invocation.stdout.flush()
        if no_wait:
            return 0
        try:
            ended = api.follow(job, seconds=timeout)
        except Terminated:
            stop = (
                f"POST {settings.domino_api_host}/v4/jobs/stop with its project and id, or Stop in the Jobs dashboard"
            )
            invocation.log.warning("the Domino job goes on", job=job, to_stop=stop)
            raise
    if error := ended.failure(job):
        raise error
    invocation.log.info("the Domino job succeeded", job=job)
    return 0
