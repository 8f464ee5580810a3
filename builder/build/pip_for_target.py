"""Runs pip for an interpreter that is not this one: `python -m builder.build.pip_for_target MARKERS ARGUMENTS…`.

`pip install --platform` chooses wheels for the target, but evaluates environment markers for the interpreter it runs in
(https://github.com/pypa/pip/issues/11664). Here they are those of the target.

`--only-binary` is about what indexes have. What a wheel requires by an address is another matter: pip would go there,
and build what it finds to learn what that requires, which runs it. Here pip does neither.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

# What pip says where it was led to an address, before the requirement.
ADDRESS = "A package requires what is at an address"


def main(arguments: list[str]) -> int:
    """Run pip with the markers of the first argument, a JSON object, and return its exit code."""
    environment = json.loads(arguments[0])
    from pip._internal.cli import req_command
    from pip._internal.cli.main import main as pip
    from pip._internal.distributions.sdist import SourceDistribution
    from pip._internal.exceptions import InstallationError
    from pip._internal.req import constructors
    from pip._vendor.packaging import markers

    parse = constructors.install_req_from_req_string

    def of_an_index(text: str, *arguments: Any, **options: Any) -> Any:  # as pip's own
        required = parse(text, *arguments, **options)
        if required.link is not None:
            message = f"{ADDRESS}: {text}"
            raise InstallationError(message)
        return required

    def never(*_: object, **__: object) -> NoReturn:
        message = "Only wheels are taken, and this is source."
        raise InstallationError(message)

    # pip has no option for it. A report names the environment that it was made for, and the caller compares it.
    setattr(markers, "default_environment", lambda: dict(environment))  # noqa: B010  # typed as what it replaces
    # Nor for this; the first is what dependencies are read with, requirements of the file are read in another way.
    setattr(req_command, "install_req_from_req_string", of_an_index)  # noqa: B010
    setattr(SourceDistribution, "prepare_distribution_metadata", never)  # noqa: B010
    return pip(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
