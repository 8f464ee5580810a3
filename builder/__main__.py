"""The entry point, and the only place that ends the process."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from builder import cli
from builder.errors import BuilderError, ExitCode, Terminated
from builder.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType


# `import mlflow` leaves a hundred thousand objects that stay, and with Python's 700 they are searched for garbage 250
# times, in vain: a tenth of a publish that has nothing to do. See docs/decisions/0024-start-up.md.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        code = run(sys.argv[1:], os.environ)
    finally:
        # Python would end by searching all that was imported for garbage: 0.2 s with MLflow, for memory that goes
        # anyway. What needs to be closed is closed by now, and atexit's functions still run.
        gc.freeze()
    sys.exit(code)


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command and return the exit code (sysexits).

    Args:
        arguments: the command line, without the program's name.
        environ: the environment.
    """
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _terminated)
    context = cli.Invocation(environ=environ)
    try:
        code = cli.builder.main(list(arguments), prog_name="builder", standalone_mode=False, obj=context)
    except click.UsageError as error:
        said = io.StringIO()
        error.show(said)
        click.echo(shown(said.getvalue()), nl=False, err=True)
        return ExitCode.USAGE
    except (Terminated, click.Abort):
        context.failed("Terminated", "The process was asked to end.", "Run the command again.", ExitCode.TEMPORARY)
        return ExitCode.TEMPORARY
    except BuilderError as error:
        context.failed(type(error).__name__, error.what, error.remedy, error.exit_code)
        return error.exit_code
    except SystemExit:
        # click's way to say that whoever read our stdout has gone; there is nobody to tell.
        return ExitCode.TEMPORARY
    except Exception as error:  # noqa: BLE001 - whatever was not caught is a defect of ours, and says so
        context.defect(error)
        return ExitCode.SOFTWARE
    return int(code or 0)


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    # A second signal while the child is being ended must not interrupt that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Terminated


if __name__ == "__main__":
    main()
