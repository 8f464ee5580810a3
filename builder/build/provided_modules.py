"""Whether a model's environment has the modules that are imported when it is loaded.

A wrong refusal is worse than none: the image is run before its tag moves wherever that is possible. So a module is
missing only where every wheel of the lock was looked into, and none has anything of its first name. Of a wheel that
is not here the list of files is read, which stands at its end.
"""

from __future__ import annotations

import os
import sys
import tempfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Collection, Iterable, Mapping

from packaging.utils import canonicalize_name

from builder.build.environment import MLMODEL
from builder.build.index import IndexClient
from builder.build.locked import Lock, LockedWheel
from builder.build.mlflow_release import BROUGHT
from builder.build.wheel_directory import BadArchive, read_directory, refuse
from builder.crew import side_by_side
from builder.errors import BuilderError, InvalidVersion
from builder.log import get_logger

_log = get_logger("wheels")
_LOOKING = 16
_SECONDS = 60.0
# The directory of most wheels, and of the largest.
_TAILS = (64 << 10, 4 << 20)
_LARGEST = 16 << 30
# Modules of this Python and of others from 3.6 on, and those of Python 2 that pickle replaces.
_STDLIB = {name.partition(".")[0] for name in (*IMPORT_MAPPING, *(name for name, _ in NAME_MAPPING))} | {
    *sys.stdlib_module_names,
    *("aifc", "annotationlib", "asynchat", "asyncore", "audioop", "binhex", "cgi", "cgitb"),
    *("chunk", "compression", "crypt", "distutils", "dummy_threading", "formatter", "imghdr", "imp"),
    *("lib2to3", "macpath", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "parser", "pipes", "smtpd"),
    *("sndhdr", "spwd", "sunau", "symbol", "telnetlib", "uu", "xdrlib"),
}
# Distributions that are not called as their modules; every other one is looked into.
_CALLED = {**BROUGHT, "mlflow": "mlflow-skinny", "yaml": "pyyaml", "imblearn": "imbalanced-learn"}
# A .pth file can make anything importable, but for those that setuptools writes.
_HARMLESS = ("-nspkg.pth", "distutils-precedence.pth")
_ANYTHING = "*"
_ARCHIVES = (".zip", ".egg", ".whl")


def check_provided(
    loaded: Mapping[str, str], own: Collection[str], lock: Lock, client: IndexClient, *, code: str | None = None
) -> None:
    """Refuse a model for whose loading a module is missing.

    Args:
        loaded: the modules that are imported, each with the file that names it.
        own: paths of the version's own files.
        lock: the wheels of its environment.
        client: has the wheels.
        code: the folder of them that MLmodel's loader is imported from; empty for none, None where nobody can tell.

    Raises:
        InvalidVersion: a module is neither the version's own, nor Python's, nor in a wheel.
    """
    ours = _parts(own)
    found_by_mlflow = ours
    if code is not None:
        # The folder that the model's stands in is the working directory.
        found_by_mlflow = _parts(path.partition("/")[0] for path in own)
        found_by_mlflow |= _parts(path.removeprefix(f"{code}/") for path in own if code and path.startswith(f"{code}/"))
    packages = lock.versions.keys()
    # What begins with an underscore is an extension's or a program's own, and in no folder of that name.
    missing = {
        top: module
        for module in loaded
        if not (top := module.partition(".")[0]).startswith("_")
        and top not in _STDLIB
        and top not in (found_by_mlflow if _is_loader(loaded[module]) else ours)
        and canonicalize_name(top) not in packages
        and _CALLED.get(top) not in packages
    }
    # Code that brings an archive can put it on its path.
    if not missing or any(path.endswith(_ARCHIVES) and "code" in path.split("/")[:-1] for path in own):
        return
    found = _together(lock, client)
    there = {top for _, tops in found for top in tops}
    missing = {top: module for top, module in missing.items() if top not in there}
    if not missing:
        return
    if unknown := [wheel.filename for wheel, tops in found if _ANYTHING in tops]:
        _log.info("whether a module is there cannot be told", modules=sorted(missing), wheel=unknown[0])
        return
    module = min(missing.values())
    place = "the folder that its `code` names" if _is_loader(loaded[module]) else "the model's files"
    message = f"{loaded[module]} names the module {module!r}, and nothing of that name is in {place} or in a "
    message += f"package of its environment for {lock.platform}."
    remedy = "Log the module with the model (code_paths), or name its package in the requirements, and register again."
    raise InvalidVersion(message, remedy=remedy)


def _parts(paths: Iterable[str]) -> set[str]:
    return {part.partition(".")[0] for path in paths for part in path.split("/")}


def _is_loader(file: str) -> bool:
    """Return whether a module that a file names is the one that MLflow itself imports."""
    return file.rpartition("/")[2] == MLMODEL


def _together(lock: Lock, client: IndexClient) -> list[tuple[LockedWheel, set[str]]]:
    """Return the first names in each wheel. To the end: a thread that still reads would outlive its client."""

    def one(wheel: LockedWheel) -> tuple[LockedWheel, set[str]]:
        return wheel, _modules(wheel, client)

    results = side_by_side(one, lock.wheels, threads=_LOOKING, every=_SECONDS)
    return [result for result in results if result is not None]


def _modules(wheel: LockedWheel, client: IndexClient) -> set[str]:
    """Return the first names of what can be imported from a wheel; `*` is among them where that cannot be told."""
    for size in _TAILS:
        try:
            tail, whole = client.tail(wheel, size)
            return {top for name in _names(tail, whole) if (top := _top(name))}
        except (BadArchive, OSError) as error:
            _log.debug("a wheel's list of files cannot be read", wheel=wheel.filename, why=str(error))
        except BuilderError as error:
            _log.debug("a wheel cannot be looked into", wheel=wheel.filename, why=error.what)
            break
    return {_ANYTHING}


def _names(tail: bytes, whole: int) -> list[str]:
    """Return the names in an archive of which the end is known: all before it is a hole."""
    if not len(tail) <= whole <= _LARGEST:
        refuse("its size is none")
    with tempfile.TemporaryFile() as file:
        file.truncate(whole)
        os.pwrite(file.fileno(), tail, whole - len(tail))
        return [entry.name for entry in read_directory(file.fileno())[0]]


def _top(name: str) -> str:
    """Return the first name that a file of a wheel can be imported by; empty for none."""
    top, _, rest = name.partition("/")
    if top.endswith(".data"):
        kind, _, name = rest.partition("/")
        if kind not in {"purelib", "platlib"}:
            return _ANYTHING if "site-packages" in rest else ""
        top, _, rest = name.partition("/")
    if rest:
        return "" if top.endswith(".dist-info") else top
    if top.endswith(".pth"):
        return "" if top.endswith(_HARMLESS) else _ANYTHING
    return top.partition(".")[0]
