"""The entry point, and the only place that ends the process."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import click

from builder import cli
from builder.errors import BuilderError, ExitCode, InvalidSettings, Terminated
from builder.masking import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType


# `import mlflow` leaves a hundred thousand objects that stay, and with Python's 700 they are searched for garbage 250
# times, in vain: a tenth of a publish that has nothing to do. See docs/decisions/0024-start-up.md.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
# Seconds that atexit's functions may take, and after which a request to end that was swallowed is repeated.
_AT_EXIT = 3.0
_AGAIN = 0.05
_MOST_CAUSES = 100


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    code = int(ExitCode.TEMPORARY)
    with suppress(Terminated):  # it came between two statements of `run` that have an answer to it
        code = run(sys.argv[1:], os.environ)
    _end(code)


def _end(code: int) -> NoReturn:
    """End the process without the interpreter's teardown, once atexit's functions have run and all is written.

    The teardown freezes threads wherever they are, and then takes locks that one of them may hold for ever: logging's,
    or stderr's. It would also search all that was imported for garbage: 0.2 s with MLflow. Whatever needs to be closed
    is closed by now; threads that still work do so in vain.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # A request to end is answered already.
        with suppress(Terminated):
            signal.signal(number, signal.SIG_IGN)
    # Of a library's functions at exit nobody knows how long they take.
    limit = threading.Timer(_AT_EXIT, os._exit, [code])
    limit.daemon = True
    limit.start()
    # Nor should one of them search all that was imported for garbage.
    gc.freeze()
    try:
        atexit._run_exitfuncs()  # noqa: SLF001  # CPython's own way to run them early; a test holds it to that
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever read it has gone
                stream.flush()
    finally:
        os._exit(code)


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command and return the exit code (sysexits).

    Args:
        arguments: the command line, without the program's name.
        environ: the environment.
    """
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, _terminated)
    sys.unraisablehook = _unraisable
    context = cli.Invocation(environ=environ)
    try:
        code = cli.builder.main(list(arguments), prog_name="builder", standalone_mode=False, obj=context)
    except click.UsageError as error:
        said = io.StringIO()
        error.show(said)
        click.echo(shown(said.getvalue()), nl=False, err=True)
        return ExitCode.USAGE
    except (Terminated, click.Abort):
        return _asked_to_end(context)
    except BuilderError as error:
        problems = error.problems if isinstance(error, InvalidSettings) else ()
        context.about |= error.about
        context.failed(type(error).__name__, error.what, error.remedy, error.exit_code, problems)
        return error.exit_code
    except SystemExit:
        # click's way to say that whoever read our stdout has gone; there is nobody to tell.
        return ExitCode.TEMPORARY
    except Exception as error:  # noqa: BLE001 - whatever was not caught is a defect of ours, and says so
        if _comes_of_a_request(error):
            return _asked_to_end(context)
        context.defect(error)
        return ExitCode.SOFTWARE
    return int(code or 0)


def _asked_to_end(context: cli.Invocation) -> int:
    context.failed("Terminated", "The process was asked to end.", "Run the command again.", ExitCode.TEMPORARY)
    return ExitCode.TEMPORARY


def _comes_of_a_request(error: BaseException | None) -> bool:
    """Return whether an error was raised for a request to end, by what wraps whatever it meets.

    Python 3.11 does so while a class is being made (`__set_name__`), as those of an import are.
    """
    for _ in range(_MOST_CAUSES):
        if error is None:
            return False
        if isinstance(error, Terminated):
            return True
        error = error.__cause__ or error.__context__
    return False


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    # A second signal while the child is being ended must not interrupt that.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Terminated


def _unraisable(event: sys.UnraisableHookArgs) -> None:
    """Repeat a request to end that came in a destructor or another place that can raise nothing."""
    if isinstance(event.exc_value, Terminated):
        # Once this hook has returned: it can raise nothing either. Not by a timer of the system's: a deadline has that.
        signal.signal(signal.SIGTERM, _terminated)
        again = threading.Timer(_AGAIN, os.kill, [os.getpid(), signal.SIGTERM])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(event)


if __name__ == "__main__":
    main()
