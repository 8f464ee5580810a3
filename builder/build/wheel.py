"""One wheel: opened and checked, and the name of its layer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder.build.bytecode import Compiler, CompilerDied
from builder.build.wheel_directory import BadArchive
from builder.build.wheel_metadata import Metadata, read_metadata
from builder.build.wheel_zip import Archive, Member
from builder.errors import InvalidVersion

# Part of the key of every layer: a change of what a layer holds, of a byte of how, or of what is noted of it, is a new
# layout.
LAYOUT = 2


class InvalidWheel(InvalidVersion):
    """A wheel cannot be installed: it is hostile, broken, or of a kind that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel whose list of files and metadata were checked; the content is checked while it is read.

    Attributes:
        path: its file; must not change.
        filename: its name on the index.
        metadata: what it says of itself.
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
        path: its file, whose hash is the caller's to check.
        filename: its name on the index; empty for the name of the file.

    Raises:
        InvalidWheel: a path leaves its place, a file is a link, encrypted, listed twice or not listed in RECORD; the
            archive can be read in two ways or is a bomb; its metadata are missing or another wheel's.
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


def layer_key(wheel_hash: str, *, python: str, bytecode: Compiler | None = None) -> str:
    """Return what names a wheel's layer, joined of all that it is a function of.

    It is a word of letters, digits, '.', '_' and '-', at most 128 of them, and so a tag.

    Args:
        wheel_hash: SHA-256 of the wheel, 64 hexadecimal digits.
        python: the model's Python: `3.11`.
        bytecode: the compiler of the bytecode in it; None for a layer without.
    """
    return f"{wheel_hash}-l{LAYOUT}-{bytecode.identity if bytecode else f'py{python}'}"


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
    """Turn what is wrong with an archive into what is wrong with the wheel of that name."""
    remedy = "Pin another version of it, or ask whoever made it for one that is built again."
    try:
        yield
    except BadArchive as error:
        message = f"The wheel {filename} cannot be used: {error}."
        raise InvalidWheel(message, remedy=remedy) from error
    except CompilerDied as error:
        message = f"The wheel {filename} cannot be compiled: {error.what}"
        raise InvalidWheel(message, remedy="Pin another version of it, or publish without bytecode.") from error
