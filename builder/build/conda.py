"""What conda.yaml asks of conda itself, as requirements on packages that an index may have: nothing runs conda here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from builder.build.requirement import NAME, Required
from builder.errors import InvalidVersion

_ENTRY = re.compile(r"(?:[^\s:]{1,200}::)?([A-Za-z0-9_][A-Za-z0-9_.-]{0,199})[ \t]{0,9}([^\s\[\]]{0,200})")
_VERSION = r"[0-9]{1,9}(?:\.[0-9A-Za-z]{1,20}){0,9}"
# `=1.2` is any 1.2; with a build behind it, or with `==`, it is that version alone.
_FUZZY = re.compile(rf"=?({_VERSION})(?:\.?\*)?")
_EXACT = re.compile(rf"(?:==({_VERSION})|=?({_VERSION})=[A-Za-z0-9_.]{{1,100}})")
# Packages that have another name where pip looks; the others have the same.
_NAMES = {
    "matplotlib-base": "matplotlib",
    "msgpack-python": "msgpack",
    "opencv": "opencv-python-headless",
    "py-opencv": "opencv-python-headless",
    "py-xgboost": "xgboost",
    "pytables": "tables",
    "python-graphviz": "graphviz",
    "pytorch": "torch",
    "pytorch-cpu": "torch",
    "tensorflow-base": "tensorflow",
}
_MOST_NAMED = 10
_REMEDY = (
    "Install it in a Dockerfile.template of the version's own, whose base image or RUN steps bring it, or name its "
    "wheel in requirements.txt and take it out of conda.yaml."
)


def conda_refused(names: Sequence[str]) -> InvalidVersion:
    """Return the error for packages that only conda could bring.

    Args:
        names: theirs, fit to be shown.
    """
    rest = len(names) - _MOST_NAMED
    what = ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
    message = f"The model's conda.yaml asks conda for {what}; no index has a wheel of it, and conda is not run here."
    return InvalidVersion(message, remedy=_REMEDY)


def conda_package(entry: str) -> Required | None:
    """Return the requirement that stands for an entry of conda.yaml; None for one that none stands for.

    Args:
        entry: `numpy`, `numpy=1.21`, `numpy=1.21.2=py38h1234_0`, `conda-forge::numpy>=1.21,<2`.
    """
    found = _ENTRY.fullmatch(entry.strip())
    name = canonicalize_name(found[1]) if found else ""
    if found is None or not NAME.fullmatch(name):
        return None
    wanted = found[2]
    if exact := _EXACT.fullmatch(wanted):
        wanted = f"=={exact[1] or exact[2]}"
    elif fuzzy := _FUZZY.fullmatch(wanted):
        wanted = f"=={fuzzy[1]}.*"
    try:
        specifier = str(SpecifierSet(wanted))
    except InvalidSpecifier:
        return None
    return Required(name=_NAMES.get(name, name), specifier=specifier)
