"""Runs pip for an interpreter that is not this one: `python -m builder.wheels.pip_for_target MARKERS ARGUMENTS…`.

`pip install --platform` chooses wheels for the target, but evaluates environment markers for the interpreter it runs in
(https://github.com/pypa/pip/issues/11664). Here they are those of the target.

`--only-binary` is about what indexes have. What a wheel requires by an address is another matter: pip would go there,
and build what it finds to learn what that requires, which runs it. Here pip does neither.

pip has no option for any of this, so parts of it are replaced. Another release may not use them: what is replaced is
tried or looked for before pip starts, and where it is not what it was, pip does not start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

# What pip says where it was led to an address, before the requirement.
ADDRESS = "A package requires what is at an address"
# The exit code where this pip is not the one that is known here; pip itself has none above 23.
UNKNOWN_PIP = 70
_PROBE = "no-machine-is-called-this"


class UnknownPip(Exception):
    """A part of pip is not what it was; never leaves this module."""


def main(arguments: list[str]) -> int:
    """Run pip with the markers of the first argument, a JSON object, and return its exit code."""
    try:
        _use_markers(json.loads(arguments[0]))
        _refuse_addresses()
        _build_nothing()
        from pip._internal.cli.main import main as pip
    except (UnknownPip, ImportError, AttributeError, TypeError) as error:
        sys.stderr.write(f"{error}\n")
        return UNKNOWN_PIP
    return pip(arguments[1:])


def _use_markers(environment: dict[str, str]) -> None:
    """Evaluate markers for an environment. A report names the one that it was made for; the caller compares it."""
    from pip._vendor.packaging import markers

    seen = {**environment, "platform_machine": _PROBE}
    _replace(markers, "default_environment", lambda: dict(seen))
    if not markers.Marker(f"platform_machine == '{_PROBE}'").evaluate():
        message = "Marker.evaluate does not ask default_environment"
        raise UnknownPip(message)
    seen.update(environment)


def _refuse_addresses() -> None:
    """Refuse a requirement of a package that names an address; those of the file are read in another way."""
    from pip._internal.cli import req_command
    from pip._internal.exceptions import InstallationError
    from pip._internal.req import constructors

    name = "install_req_from_req_string"
    parse = getattr(constructors, name)

    def of_an_index(text: str, *arguments: Any, **options: Any) -> Any:  # as pip's own
        required = parse(text, *arguments, **options)
        if required.link is not None:
            message = f"{ADDRESS}: {text}"
            raise InstallationError(message)
        return required

    _replace(req_command, name, of_an_index)
    _check_asks(req_command.RequirementCommand.make_resolver, name)
    of_an_index("probe==1")
    try:
        of_an_index("probe @ https://probe.invalid/probe-1-py3-none-any.whl")
    except InstallationError:
        return
    message = f"what {name} returns does not know the requirement's address"
    raise UnknownPip(message)


def _build_nothing() -> None:
    """Refuse to build source, or to ask it for what it requires."""
    from pip._internal import distributions
    from pip._internal.distributions.sdist import SourceDistribution
    from pip._internal.exceptions import InstallationError
    from pip._internal.operations import prepare

    def never(*_: object, **__: object) -> NoReturn:
        message = "Only wheels are taken, and this is source."
        raise InstallationError(message)

    name = "prepare_distribution_metadata"
    _replace(SourceDistribution, name, never)
    _check_asks(prepare._get_prepared_distribution, name)  # noqa: SLF001  # the one that calls what is replaced
    _check_asks(distributions.make_distribution_for_install_requirement, SourceDistribution.__name__)


def _replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
    """Replace a function of a module or class that has one."""
    if not callable(vars(owner).get(name)):
        message = f"{owner.__name__} has no function {name}"
        raise UnknownPip(message)
    setattr(owner, name, by)


def _check_asks(function: Callable[..., Any], name: str) -> None:
    """Raise UnknownPip unless a function looks a name up when it runs."""
    if name not in function.__code__.co_names:
        message = f"{function.__qualname__} does not use {name}"
        raise UnknownPip(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
