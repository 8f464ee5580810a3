"""What a wheel says of itself: its file's name, WHEEL, METADATA, RECORD and entry points.

The source is https://packaging.python.org/en/latest/specifications/binary-distribution-format/; the grammars are those
of `packaging` and `installer`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from installer.records import Hash, RecordEntry
from installer.scripts import Script
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from builder.build.wheel_directory import LONGEST_NAME, BadArchive, refuse
from builder.build.wheel_texts import (
    MOST_ENTRY_POINTS,
    MOST_METADATA,
    MOST_RECORD,
    MOST_WHEEL,
    headers,
    record,
    required,
    scripts,
    value,
)
from builder.build.wheel_zip import Archive, Member

# The specification wants "sha256 or better".
_HASHES = frozenset({"sha256", "sha384", "sha512"})
# Signatures of RECORD, which it cannot list.
_SIGNATURES = frozenset({"RECORD.jws", "RECORD.p7s"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What a wheel says of itself.

    Attributes:
        name: of the distribution, normalised.
        version: of the distribution.
        dist_info: name of the .dist-info directory.
        purelib: whether the archive's root goes to purelib.
        record: what RECORD says of each file.
        scripts: the scripts of its entry points.
        requires: what it requires, one line of PEP 508 each, as it is written.
    """

    name: str
    version: Version
    dist_info: str
    purelib: bool
    record: Mapping[str, RecordEntry]
    scripts: tuple[Script, ...]
    requires: tuple[str, ...] = ()


def read_metadata(archive: Archive, filename: str) -> Metadata:
    """Return what a wheel says of itself, if its parts agree.

    Raises:
        BadArchive: a part is missing or malformed, or two of them contradict each other.
    """
    if len(filename) > LONGEST_NAME:
        refuse(f"its file's name has more than {LONGEST_NAME} characters")
    try:
        name, version, _, _ = parse_wheel_filename(filename)
    except (InvalidWheelFilename, InvalidVersion) as error:
        message = f"its file's name is none that a wheel can have ({error})"
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
    """Hashes a file's content, given piece by piece, and compares it with what RECORD says of it.

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
        """Return the hash of the content that was given, by the algorithm that RECORD takes."""
        return Hash(self._algorithm, encoded(self._state.digest()))

    def differs(self, size: int) -> bool:
        """Return whether the content that was given, `size` bytes of it, is another than RECORD says."""
        if self._entry is None or self._expected is None:
            return False
        other_size = self._entry.size is not None and self._entry.size != size
        return other_size or self.found().value != self._expected.value.rstrip("=")


def encoded(digest: bytes) -> str:
    """Return a digest as RECORD writes it."""
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
    except InvalidVersion:
        same = False
    if not same:
        refuse(f"its directory {directory!r} belongs to another distribution or version")
    return directory


def _requires(metadata: str, name: str, version: Version) -> tuple[str, ...]:
    """Return what METADATA says that a distribution requires, if it is that of the distribution."""
    said = headers(metadata, "METADATA")
    its_name, its_version = value(said, "Name"), value(said, "Version")
    try:
        same = canonicalize_name(its_name) == name and Version(its_version) == version
    except InvalidVersion:
        same = False
    if not same:
        refuse(f"its METADATA names {its_name[:60]} {its_version[:60]}")
    return required(said)


def _record(text: str, members: Iterable[Member], dist_info: str) -> Mapping[str, RecordEntry]:
    """Return RECORD's entries by path, if each of the archive's files has one with a hash.

    Whether hash and size are right is no question of whether a wheel can be installed: see `WheelLayer.misrecorded`.
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
