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
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, NoReturn, cast

import click

from builder.cli import builder
from builder.cli.invocation import Invocation
from builder.errors import BuilderError, ExitCode, InvalidSettings, Terminated
from builder.masking import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType


# `import mlflow` leaves a hundred thousand objects that stay, and with Python's 700 they are searched for garbage 250
# times, without result: a tenth of a publish that has nothing to do. See docs/decisions/0024-start-up.md.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
# What `import mlflow` imports and no request of ours needs: two fifths of its time, FastAPI among it.
_POSTPONED = frozenset({"mlflow.gateway", "mlflow.genai"})
# Seconds that atexit's functions may take, and seconds after which a swallowed signal is repeated.
_AT_EXIT = 3.0
_AGAIN = 0.05
_MOST_CAUSES = 100


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    postpone()
    code = int(ExitCode.TEMPORARY)
    with suppress(Terminated):  # it came between two statements of `run` that handle it
        code = run(sys.argv[1:], os.environ)
    _end(code)


def postpone() -> None:
    """Have some modules run in this process when something of them is first used, rather than when they are imported.

    See docs/decisions/0024-start-up.md.
    """
    sys.meta_path.insert(0, _Postponed)


class _Postponed:
    """Finds modules of `_POSTPONED`, and loads them without running them.

    The standard library's LazyLoader would run such a package as soon as a module in it is imported.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return how a module is loaded; None for any other module, which is found as ever."""
        spec = PathFinder.find_spec(name, path, target) if name in _POSTPONED else None
        if spec and spec.loader:
            spec.loader = cast("Loader", cls(spec.loader))
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Make the module, empty."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module empty until an attribute of it is missing."""

        def first_use(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            del module.__dict__["__getattr__"]
            try:
                self._loader.exec_module(module)
            except BaseException:
                module.__dict__["__getattr__"] = first_use
                raise
            return getattr(module, name)

        module.__dict__["__getattr__"] = first_use


def _end(code: int) -> NoReturn:
    """End the process without the interpreter's teardown, once atexit's functions have run and all is written.

    The teardown freezes threads wherever they are, and then takes locks that one of them may hold for ever: logging's,
    or stderr's. It would also search all that was imported for garbage: 0.2 s with MLflow. Everything that has to be
    closed is closed by now; threads that still run are abandoned.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        # The process is ending already.
        with suppress(Terminated):
            signal.signal(number, signal.SIG_IGN)
    # A library's functions at exit may take any time.
    limit = threading.Timer(_AT_EXIT, os._exit, [code])
    limit.daemon = True
    limit.start()
    # Nor should one of them search all that was imported for garbage.
    gc.freeze()
    try:
        atexit._run_exitfuncs()  # noqa: SLF001  # CPython's own way to run them early; a test checks that
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # its reader is gone
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
    context = Invocation(environ=environ)
    try:
        code = builder.main(list(arguments), prog_name="builder", standalone_mode=False, obj=context)
    except click.UsageError as error:
        message = io.StringIO()
        error.show(message)
        click.echo(shown(message.getvalue()), nl=False, err=True)
        return ExitCode.USAGE
    except (Terminated, click.Abort):
        return _ended_by_signal(context)
    except BuilderError as error:
        problems = error.problems if isinstance(error, InvalidSettings) else ()
        context.about |= error.about
        context.failed(type(error).__name__, error.what, error.remedy, error.exit_code, problems)
        return error.exit_code
    except SystemExit:
        # click raises it if the reader of our stdout is gone, so there is nowhere to report it.
        return ExitCode.TEMPORARY
    except Exception as error:  # noqa: BLE001 - any other exception is reported as a defect of ours
        if _wraps_signal(error):
            return _ended_by_signal(context)
        context.defect(error)
        return ExitCode.SOFTWARE
    return int(code or 0)


def _ended_by_signal(context: Invocation) -> int:
    context.failed("Terminated", "The process was ended by a signal.", "Run the command again.", ExitCode.TEMPORARY)
    return ExitCode.TEMPORARY


def _wraps_signal(error: BaseException | None) -> bool:
    """Return whether an error is, or wraps, the `Terminated` of a signal.

    Python 3.11 wraps exceptions raised while a class is made (`__set_name__`), as during an import.
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
    """Repeat a signal whose exception was lost in a destructor or another place that cannot raise."""
    if isinstance(event.exc_value, Terminated):
        # Once this hook has returned, since it cannot raise either. Not by a system timer, which a deadline uses.
        signal.signal(signal.SIGTERM, _terminated)
        again = threading.Timer(_AGAIN, os.kill, [os.getpid(), signal.SIGTERM])
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(event)


if __name__ == "__main__":
    main()
