"""Runs pip for an interpreter that is not this one: `python -m builder.build.pip_for_target MARKERS ARGUMENTS…`.

`pip install --platform` chooses wheels for the target, but evaluates environment markers for the interpreter it runs in
(https://github.com/pypa/pip/issues/11664). Here they are those of the target.
"""

from __future__ import annotations

import json
import sys


def main(arguments: list[str]) -> int:
    """Run pip with the markers of the first argument, a JSON object, and return its exit code."""
    environment = json.loads(arguments[0])
    from pip._internal.cli.main import main as pip
    from pip._vendor.packaging import markers

    # pip has no option for it. A report names the environment that it was made for, and the caller compares it.
    setattr(markers, "default_environment", lambda: dict(environment))  # noqa: B010  # typed as what it replaces
    return pip(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
