"""A wheel: its metadata, and the destinations of its files."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from posixpath import relpath

from installer.records import Hash, InvalidRecordEntry, RecordEntry, parse_record_file
from installer.scripts import Script
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version

from builder.errors import InvalidVersion
from builder.wheels.zip import LONGEST_NAME, MOST_MEMBERS, Archive, BadArchive, Member, check_path, refuse

MOST_WHEEL, MOST_METADATA, MOST_ENTRY_POINTS, MOST_RECORD = 64 << 10, 8 << 20, 1 << 20, 16 << 20
# Old METADATA has its description among the headers.
_MOST_HEADERS, _MOST_HEADER_LINES = 2 << 20, 20_000
_MOST_REQUIRED = 5_000
# Shorter than the longest number that Python reads.
LONGEST_VALUE = 4_096
_DEEPEST_MARKER = 40
_MOST_SCRIPTS = 10_000
_BLANK_LINE = re.compile(r"(?:\r\n|\r(?!\n)|\n)(?=[\r\n])")
# Some RECORDs list the bytecode, too, that an installer will make.
_MOST_ROWS = 2 * MOST_MEMBERS
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SECTIONS = {"console_scripts": "console", "gui_scripts": "gui"}


def headers(text: str, what: str) -> Message:
    """Return the headers of METADATA or WHEEL, up to the first blank line.

    Raises:
        BadArchive: they are too many, or too long.
    """
    end = _BLANK_LINE.search(text)
    head = text[: end.end()] if end else text
    if len(head) > _MOST_HEADERS or head.count("\n") + head.count("\r") > _MOST_HEADER_LINES:
        refuse(f"the headers of {what} have more than {_MOST_HEADER_LINES:,} lines or {_MOST_HEADERS >> 20} MiB")
    return HeaderParser().parsestr(head)


def value(message: Message, name: str) -> str:
    """Return a header's value; the text `None` for a header that is missing.

    Raises:
        BadArchive: it is too long.
    """
    found = str(message[name])
    if len(found) > LONGEST_VALUE:
        refuse(f"its {name} has {len(found):,} characters")
    return found


def required(message: Message) -> tuple[str, ...]:
    """Return the values of METADATA's Requires-Dist.

    Raises:
        BadArchive: there are too many, or one is too long or too deep.
    """
    lines = tuple(str(line) for line in message.get_all("Requires-Dist", []))
    if len(lines) > _MOST_REQUIRED:
        refuse(f"its METADATA has {len(lines):,} requirements; {_MOST_REQUIRED:,} are the most")
    for line in lines:
        if len(line) > LONGEST_VALUE or _depth(line) > _DEEPEST_MARKER:
            refuse(f"a requirement in its METADATA is too long, or too deep: {line[:60]!r}…")
    return lines


def _depth(text: str) -> int:
    """Return the depth of nested parentheses."""
    depth = deepest = 0
    for bracket in re.findall(r"[()]", text):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def scripts(text: str) -> tuple[Script, ...]:
    """Return the scripts in entry_points.txt, read as pip reads them, by `importlib.metadata`.

    Raises:
        BadArchive: one is not `name = module:attribute`, or occurs twice, or there are too many.
    """
    found: dict[str, Script] = {}
    section = ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            section = line[1:-1].strip()
            continue
        if not section:
            refuse(f"its entry points cannot be read: {line[:60]!r} is in no section")
        if section not in _SECTIONS:
            continue
        script = _script(line, _SECTIONS[section])
        check_path(script.name)
        if "/" in script.name or script.name in found:
            refuse(f"its entry point {script.name!r} occurs twice, or is a path")
        found[script.name] = script
        if len(found) > _MOST_SCRIPTS:
            refuse(f"it has more than {_MOST_SCRIPTS:,} entry points")
    return tuple(found.values())


def _script(line: str, section: str) -> Script:
    name, _, target = (part.strip() for part in line.partition("="))
    called = target.partition("[")[0] if target.endswith("]") else target
    module, _, attribute = (part.strip() for part in called.partition(":"))
    if len(line) > LONGEST_VALUE or not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        refuse(f"its entry points cannot be read: {line[:60]!r} is not name = module:function")
    return Script(name, module, attribute, "gui" if section == "gui" else "console")


def record(text: str) -> dict[str, RecordEntry]:
    """Return RECORD's entries by path.

    Raises:
        BadArchive: a row is malformed or occurs twice, or there are too many.
    """
    # A line may end in two of them.
    if sum(text.count(end) for end in _LINE_ENDS) > 2 * _MOST_ROWS:
        refuse(f"its RECORD has more than {_MOST_ROWS:,} rows")
    found: dict[str, RecordEntry] = {}
    try:
        for row in parse_record_file(text.splitlines()):
            entry = RecordEntry.from_elements(*row)
            if entry.path in found:
                refuse(f"RECORD lists {entry.path!r} twice")
            found[entry.path] = entry
            if len(found) > _MOST_ROWS:
                refuse(f"its RECORD has more than {_MOST_ROWS:,} rows")
    except (InvalidRecordEntry, csv.Error, ValueError) as error:
        message = f"its RECORD cannot be read ({str(error)[:200]})"
        raise BadArchive(message) from error
    return found


# The specification wants "sha256 or better".
_HASHES = frozenset({"sha256", "sha384", "sha512"})
# Signatures of RECORD, which it cannot list.
_SIGNATURES = frozenset({"RECORD.jws", "RECORD.p7s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """A wheel's metadata.

    Attributes:
        name: of the distribution, normalised.
        version: of the distribution.
        dist_info: name of the .dist-info directory.
        purelib: whether the archive's root goes to purelib.
        record: RECORD's entries by path.
        scripts: the scripts of its entry points.
        requires: its requirements, one line of PEP 508 each, unchanged.
    """

    name: str
    version: Version
    dist_info: str
    purelib: bool
    record: Mapping[str, RecordEntry]
    scripts: tuple[Script, ...]
    requires: tuple[str, ...] = ()


def read_metadata(archive: Archive, filename: str) -> Metadata:
    """Return a wheel's metadata, if its parts agree.

    Raises:
        BadArchive: a part is missing or malformed, or two of them contradict each other.
    """
    if len(filename) > LONGEST_NAME:
        refuse(f"its file's name has more than {LONGEST_NAME} characters")
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except (InvalidWheelFilename, NotAVersion) as error:
        message = f"its file's name is not that of a wheel ({error})"
        raise BadArchive(message) from error
    members = {member.name: member for member in archive.members}
    dist_info = _dist_info(members, name, version)

    def text(part: str, limit: int) -> str:
        member = members.get(f"{dist_info}/{part}")
        if member is None:
            refuse(f"it has no {dist_info}/{part}")
        try:
            return archive.read(member, limit).decode()
        except UnicodeDecodeError as error:
            message = f"{dist_info}/{part} is not UTF-8"
            raise BadArchive(message) from error

    wheel = headers(text("WHEEL", MOST_WHEEL), "WHEEL")
    its_format = value(wheel, "Wheel-Version")
    if its_format.strip().partition(".")[0] != "1":
        refuse(f"its format is version {its_format[:60]}; only 1.x is known")
    requires = _requires(text("METADATA", MOST_METADATA), name, version)
    found: tuple[Script, ...] = ()
    if f"{dist_info}/entry_points.txt" in members:
        found = scripts(text("entry_points.txt", MOST_ENTRY_POINTS))
    return Metadata(
        name=name,
        version=version,
        dist_info=dist_info,
        purelib=value(wheel, "Root-Is-Purelib").strip().lower() == "true",
        record=_record(text("RECORD", MOST_RECORD), archive.members, dist_info),
        scripts=found,
        requires=requires,
    )


class Fingerprint:
    """Hashes a file's content piece by piece, and compares it with RECORD's entry.

    Args:
        entry: RECORD's entry; None for a file that RECORD cannot list.
    """

    def __init__(self, entry: RecordEntry | None) -> None:
        self._entry = entry
        self._expected = entry.hash_ if entry else None
        self._algorithm = self._expected.name if self._expected else "sha256"
        self._state = hashlib.new(self._algorithm)
        self.update = self._state.update

    def found(self) -> Hash:
        """Return the hash of the content so far, by RECORD's algorithm."""
        return Hash(self._algorithm, encoded(self._state.digest()))

    def differs(self, size: int) -> bool:
        """Return whether the content, `size` bytes, differs from RECORD's entry."""
        if self._entry is None or self._expected is None:
            return False
        other_size = self._entry.size is not None and self._entry.size != size
        return other_size or self.found().value != self._expected.value.rstrip("=")


def encoded(digest: bytes) -> str:
    """Return a digest in RECORD's form."""
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _dist_info(names: Iterable[str], name: str, version: Version) -> str:
    """Return the one .dist-info directory, whose name must be the distribution's."""
    found = {top for top, slash, _ in (path.partition("/") for path in names) if slash and top.endswith(".dist-info")}
    if len(found) != 1:
        refuse(f"it has {len(found)} .dist-info directories, not one")
    (directory,) = found
    its_name, _, its_version = directory.removesuffix(".dist-info").partition("-")
    try:
        same = canonicalize_name(its_name) == name and Version(its_version) == version
    except NotAVersion:
        same = False
    if not same:
        refuse(f"its directory {directory!r} belongs to another distribution or version")
    return directory


def _requires(metadata: str, name: str, version: Version) -> tuple[str, ...]:
    """Return the requirements in METADATA, if it belongs to the distribution."""
    message = headers(metadata, "METADATA")
    its_name, its_version = value(message, "Name"), value(message, "Version")
    try:
        same = canonicalize_name(its_name) == name and Version(its_version) == version
    except NotAVersion:
        same = False
    if not same:
        refuse(f"its METADATA names {its_name[:60]} {its_version[:60]}")
    return required(message)


def _record(text: str, members: Iterable[Member], dist_info: str) -> Mapping[str, RecordEntry]:
    """Return RECORD's entries by path, if each of the archive's files has one with a hash.

    A wheel with a wrong hash or size can be installed: see `WheelLayer.misrecorded`.
    """
    listed = record(text)
    for member in members:
        folder, _, last = member.name.rpartition("/")
        if folder == dist_info and last in _SIGNATURES | {"RECORD"}:
            continue
        entry = listed.get(member.name)
        if entry is None or entry.hash_ is None:
            refuse(f"RECORD has no hash of {member.name!r}")
        if entry.hash_.name not in _HASHES:
            refuse(f"RECORD has only a weak hash ({entry.hash_.name[:60]}) of {member.name!r}")
    return listed


class InvalidWheel(InvalidVersion):
    """A wheel cannot be installed: it is hostile, broken, or of an unknown format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel with a checked list of files and checked metadata; its content is checked while it is read.

    Attributes:
        path: its file; must not change.
        filename: its name on the index.
        metadata: its metadata.
        members: its files, in the order of the archive.
        size: bytes of the file.
    """

    path: Path
    filename: str
    metadata: Metadata
    members: tuple[Member, ...]
    size: int

    @property
    def name(self) -> str:
        """The distribution's normalised name."""
        return self.metadata.name

    @property
    def version(self) -> str:
        """The distribution's version."""
        return str(self.metadata.version)


def open_wheel(path: Path, *, filename: str = "") -> Wheel:
    """Return a wheel, if it can be installed.

    Args:
        path: its file; the caller checks its hash.
        filename: its name on the index; empty for the name of the file.

    Raises:
        InvalidWheel: a path leaves its directory; a file is a link, encrypted, listed twice or not listed in RECORD;
            the archive can be read in two ways or is a bomb; the metadata is missing or another wheel's.
    """
    filename = filename or path.name
    with named(filename), opened(path) as file:
        archive = Archive(file)
        return Wheel(
            path=path,
            filename=filename,
            metadata=read_metadata(archive, filename),
            members=archive.members,
            size=archive.size,
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Give a descriptor of a wheel's file."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def named(filename: str) -> Iterator[None]:
    """Turn an invalid archive into an invalid wheel of that name."""
    remedy = "Pin another version of it, or ask its author for a new build."
    try:
        yield
    except BadArchive as error:
        message = f"The wheel {filename} cannot be used: {error}."
        raise InvalidWheel(message, remedy=remedy) from error


ENVIRONMENT = "opt/model"
INTERPRETER = f"/{ENVIRONMENT}/bin/python"
# The files that make a folder an environment; a wheel with its own would replace the interpreter of all others. Python
# reads a pyvenv.cfg beside its program before the one above it, and a ._pth file there in place of every other path, on
# every system (CPython, Modules/getpath.py).
_VENV = re.compile(rf"{ENVIRONMENT}/((bin/)?pyvenv\.cfg|bin/python(3(\.[0-9]+)?)?|bin/[^/]*\._pth)(/.*)?")
# The directories that all wheels share; a file of that name would hide what the others have there.
_SHARED = re.compile(
    rf"{ENVIRONMENT}/(bin|etc|share|include(/site(/python[0-9.]+)?)?|lib|lib64|lib(64)?/python[0-9.]+(/site-packages)?)"
)
# Written by the installer; a wheel's own would be replaced.
_OURS = frozenset({"RECORD", "INSTALLER"})
_TEST_FOLDERS = frozenset({"test", "tests"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The destination of a file.

    Attributes:
        path: in the layer: `opt/model/lib/python3.11/site-packages/…`.
        record: the path in RECORD, relative to the directory of the .dist-info.
        script: whether it is one of the wheel's own scripts, with a first line that may have to be changed.
        importable: whether Python imports from its directory.
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
        """Whether Python imports it; False for tests inside packages."""
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
        """Return the destination of a file of a scheme's key.

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
        """Return the destination of a file of the archive; None for a file that the installer writes or leaves out.

        Raises:
            BadArchive: it is in another distribution's .data directory, or below an unknown key.
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
            refuse(f"{member.name!r} has no destination: {top!r} may have {', '.join(sorted(self._folders))}")
        if key == "scripts" and self._wraps(path):
            return None
        return self.place(key, path, member=member, executable=member.executable)

    def _wraps(self, path: str) -> bool:
        """Return whether a script is old setuptools' wrapper of an entry point, which gets a new one."""
        name = re.sub(r"(\.exe|-script\.py|\.pya)$", "", path.rpartition("/")[2], flags=re.IGNORECASE)
        return name in self._scripts


def places(scheme: Scheme, members: tuple[Member, ...], metadata: Metadata) -> tuple[Place, ...]:
    """Return the destinations of a wheel's files, its scripts included, in the order of their paths.

    Raises:
        BadArchive: a file has no destination, two have the same, a file is another's directory, a file would replace a
            part of the environment, or there are too many directories.
    """
    found: dict[str, Place] = {}
    # Directories of every environment, whether or not this wheel has a file there.
    folders = set(scheme.folders)
    for place in _all(scheme, members, metadata):
        # The archive's path was checked, but not the longer one in the environment.
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
