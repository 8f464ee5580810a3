"""The commands: each its help and one call.

Heavy modules are imported where a command needs them, so that `builder --help` answers at once.
"""

from __future__ import annotations

import click

from builder import __version__
from builder.cli import bulk, domino_jobs, in_cluster, listen, phases
from builder.cli.options import Group

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

_EXAMPLES = """\b
Examples:
  builder plan pump_alarm 3       what a publish would do
  builder publish pump_alarm 3    publish one version
  builder sweep                   publish every version that is tagged"""


@click.group(
    cls=Group,
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


# In the order of the help.
for _command in (
    phases.publish,
    phases.plan,
    phases.preflight,
    phases.fetch,
    phases.build,
    phases.candidate,
    phases.push,
    bulk.sweep,
    in_cluster.submit,
    in_cluster.status,
    in_cluster.doctor,
    in_cluster.logs,
    in_cluster.retry,
    listen.listen,
    listen.webhook,
    bulk.warm,
    bulk.download,
    phases.register,
    domino_jobs.hook,
    domino_jobs.domino,
):
    builder.add_command(_command)
