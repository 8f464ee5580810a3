"""Where a wheel's files go in the model's environment, a venv under /opt/model.

The rules are the specification's ("Installing a wheel") as pip carries them out; where the specification leaves a
choice, what pip installs is what the tests compare with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from posixpath import relpath

from packaging.utils import canonicalize_name

from builder.build.wheel_directory import MOST_MEMBERS, check_path, refuse
from builder.build.wheel_metadata import Metadata
from builder.build.wheel_zip import Member

ENVIRONMENT = "opt/model"
INTERPRETER = f"/{ENVIRONMENT}/bin/python"
# What makes the environment one; a wheel that brings its own would replace the interpreter of all others. Python reads
# a pyvenv.cfg beside its program before the one above it, and a ._pth file there in place of every other path, on
# every system (CPython, Modules/getpath.py).
_VENV = re.compile(rf"{ENVIRONMENT}/((bin/)?pyvenv\.cfg|bin/python(3(\.[0-9]+)?)?|bin/[^/]*\._pth)(/.*)?")
# The directories that all wheels share; a file of that name would hide what the others have there.
_SHARED = re.compile(
    rf"{ENVIRONMENT}/(bin|etc|share|include(/site(/python[0-9.]+)?)?|lib|lib64|lib(64)?/python[0-9.]+(/site-packages)?)"
)
# What the installer writes; a wheel's own would be replaced.
_OURS = frozenset({"RECORD", "INSTALLER"})
_TEST_FOLDERS = frozenset({"test", "tests"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one file goes.

    Attributes:
        path: in the layer: `opt/model/lib/python3.11/site-packages/…`.
        record: as RECORD names it, relative to the directory that holds the .dist-info.
        script: whether it is one of the wheel's own scripts, whose first line may have to be changed.
        importable: whether it goes where Python imports from.
        member: the file in the archive; None for one that the installer writes.
        executable: whether its mode is 0755.
    """

    path: str
    record: str
    script: bool
    importable: bool
    member: Member | None
    executable: bool

    @property
    def wants_bytecode(self) -> bool:
        """Whether Python will import it, tests inside of packages apart."""
        folders = self.path.split("/")[:-1]
        return self.importable and self.path.endswith(".py") and _TEST_FOLDERS.isdisjoint(folders)


class Scheme:
    """The directories of the environment for one distribution.

    Args:
        python: the model's Python, `3.11`.
        metadata: the distribution's.
    """

    def __init__(self, python: str, metadata: Metadata) -> None:
        library = f"{ENVIRONMENT}/lib/python{python}/site-packages"
        self._metadata = metadata
        self._scripts = frozenset(script.name for script in metadata.scripts)
        self._folders: Mapping[str, str] = {
            "purelib": library,
            "platlib": library,
            # As pip in a venv, where sysconfig has no such directory.
            "headers": f"{ENVIRONMENT}/include/site/python{python}/{metadata.name}",
            "scripts": f"{ENVIRONMENT}/bin",
            "data": ENVIRONMENT,
        }
        self.root = self._folders["purelib"]

    @property
    def folders(self) -> Iterator[str]:
        """Every directory of the environment, with those that they lie in."""
        for folder in {*self._folders.values(), f"{ENVIRONMENT}/lib64"}:
            above = folder
            while above:
                yield above
                above = above.rpartition("/")[0]

    def place(self, key: str, path: str, *, member: Member | None = None, executable: bool = False) -> Place:
        """Return where a file of a scheme's key goes.

        Args:
            key: purelib, platlib, headers, scripts or data.
            path: below that key's directory.
            member: the file in the archive.
            executable: whether its mode is 0755.
        """
        folder = self._folders[key]
        prefix = "" if folder == self.root else f"{relpath(folder, self.root)}/"
        return Place(
            path=f"{folder}/{path}",
            record=f"{prefix}{path}",
            script=key == "scripts",
            importable=folder == self.root,
            member=member,
            executable=executable,
        )

    def member(self, member: Member) -> Place | None:
        """Return where a file of the archive goes; None for one that the installer writes itself, or leaves away.

        Raises:
            BadArchive: it lies in a .data directory that is not the distribution's, or below a key that is none.
        """
        top, slash, rest = member.name.partition("/")
        if not slash or not top.endswith(".data"):
            if top == self._metadata.dist_info and rest in _OURS:
                return None
            key = "purelib" if self._metadata.purelib else "platlib"
            return self.place(key, member.name, member=member, executable=member.executable)
        if canonicalize_name(top.partition("-")[0]) != self._metadata.name:
            refuse(f"its directory {top!r} belongs to another distribution")
        key, slash, path = rest.partition("/")
        if key not in self._folders or not slash:
            refuse(f"{member.name!r} goes nowhere: below {top!r} stand {', '.join(sorted(self._folders))}")
        if key == "scripts" and self._wraps(path):
            return None
        return self.place(key, path, member=member, executable=member.executable)

    def _wraps(self, path: str) -> bool:
        """Return whether a script is what old setuptools made of an entry point, from which it is made anew."""
        name = re.sub(r"(\.exe|-script\.py|\.pya)$", "", path.rpartition("/")[2], flags=re.IGNORECASE)
        return name in self._scripts


def places(scheme: Scheme, members: tuple[Member, ...], metadata: Metadata) -> tuple[Place, ...]:
    """Return where a wheel's files go, its scripts included, in the order of their paths.

    Raises:
        BadArchive: a file goes nowhere, two go to the same place, one lies where another wants a directory, one would
            replace a part of the environment, or there are too many directories.
    """
    found: dict[str, Place] = {}
    # Where no wheel puts a file, whether or not this one has any below.
    folders = set(scheme.folders)
    for place in _all(scheme, members, metadata):
        # Deeper in the environment the archive's own paths have been checked, but not what they make together.
        check_path(place.path)
        if place.path in found:
            refuse(f"two of its files go to {place.path!r}")
        if _VENV.fullmatch(place.path) or _SHARED.fullmatch(place.path):
            what = repr(place.member.name) if place.member else "a script of its entry points"
            refuse(f"{what} would replace {place.path!r}, a part of the environment itself")
        found[place.path] = place
        above = place.path.rpartition("/")[0]
        while above and above not in folders:
            folders.add(above)
            above = above.rpartition("/")[0]
        if len(folders) > MOST_MEMBERS:
            refuse(f"it has more than {MOST_MEMBERS:,} directories")
    if both := folders & found.keys():
        refuse(f"{min(both)!r} is a file and a directory")
    return tuple(found[path] for path in sorted(found))


def _all(scheme: Scheme, members: tuple[Member, ...], metadata: Metadata) -> Iterator[Place]:
    for member in members:
        if place := scheme.member(member):
            yield place
    for script in metadata.scripts:
        yield scheme.place("scripts", script.name, executable=True)
