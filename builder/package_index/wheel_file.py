"""Wheel files: names, hashes, and the tags that fit a platform."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Annotated, Literal, Self

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import BuildTag, InvalidWheelFilename, NormalizedName, parse_wheel_filename
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, model_validator

from builder.errors import InvalidVersion
from builder.reference import Platform

_LONGEST_NAME = 255

# Where a wheel comes from: a package index, an address that the model names, or the model folder.
Origin = Literal["index", "address", "model"]


class LockedWheel(BaseModel):
    """One wheel of a lock.

    Attributes:
        name: the package, in its normal form.
        version: normalised.
        filename: the wheel's.
        sha256: of its content, 64 hexadecimal digits.
        size: in bytes; None where it is not known.
        origin: where it comes from.
        url: its address without a credential, `file:` for one of the model folder; None where it has to be looked up.
            It is no part of the lock's text, nor of what makes two wheels equal.
        uploaded: when, as the index said during the resolution; None where it is not known. No part of the text either.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    filename: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)] | None = None
    origin: Origin = "index"
    url: str | None = Field(default=None, repr=False)
    uploaded: datetime | None = Field(default=None, repr=False)

    @model_validator(mode="after")
    def _filename_is_of_name_and_version(self) -> Self:
        """Refuse a file name that is not this wheel's: it becomes a path, a layer's tag and a line of history."""
        if len(self.filename) > _LONGEST_NAME:
            message = f"a wheel's name has more than {_LONGEST_NAME} characters"
            raise ValueError(message)
        try:
            name, version, _, _ = parse_wheel_name(self.filename)
            same = name == self.name and version == Version(self.version)
        except (InvalidWheelFilename, NotAVersion) as error:
            message = f"{self.filename!r} is not the file name of a wheel"
            raise ValueError(message) from error
        if not same or not re.fullmatch(r"[A-Za-z0-9_.+!-]+", self.filename) or self.version != str(version):
            message = f"{self.filename!r} is not a wheel of {self.name} {self.version}"
            raise ValueError(message)
        return self

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same wheel, wherever it lies."""
        return isinstance(other, LockedWheel) and self._key() == other._key()

    def __hash__(self) -> int:
        """Return a hash that does not depend on the address."""
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return self.name, self.version, self.filename, self.sha256, self.size, self.origin


# What a file system takes; what real wheels have is far below the second.
_LONGEST, _MOST_TAGS = 255, 1000
# uv holds numbers in a machine's word, and Python reads at most 4,300 digits.
_NUMBER = re.compile(r"[0-9]{19}")


def parse_wheel_name(filename: str) -> tuple[NormalizedName, Version, BuildTag, frozenset[Tag]]:
    """Return name, version, build tag and tags of a wheel, as `packaging.utils.parse_wheel_filename` does.

    Raises:
        InvalidWheelFilename: it is not a wheel's file name, or exceeds a bound.
    """
    *_, python, abi, platform = ("", "", *filename.split("-"))
    tags = (python.count(".") + 1) * (abi.count(".") + 1) * (platform.count(".") + 1)
    if len(filename) > _LONGEST or tags > _MOST_TAGS or _NUMBER.search(filename):
        message = "Invalid wheel filename (too long, too many tags or too large a number)"
        raise InvalidWheelFilename(message)
    try:
        return parse_wheel_filename(filename)
    except NotAVersion as error:
        message = "Invalid wheel filename (invalid version)"
        raise InvalidWheelFilename(message) from error


# A base image whose C library is not known has at least the one of Debian 10 and Red Hat 8.
OLDEST_GLIBC = (2, 28)
_MACHINES = {
    ("amd64", ""): "x86_64",
    ("arm64", ""): "aarch64",
    ("arm", "v7"): "armv7l",
    ("arm", "v6"): "armv6l",
    ("386", ""): "i686",
    ("ppc64le", ""): "ppc64le",
    ("s390x", ""): "s390x",
    ("riscv64", ""): "riscv64",
    ("loong64", ""): "loongarch64",
}
# PEP 600: manylinux_x_y and the older names of three of them; nothing but x86 has any before 2.17 (PEP 599).
_OLDER_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
_FIRST, _FIRST_X86 = 17, 5
_FIRST_WITHOUT_M = (3, 8)


def machine(platform: Platform) -> str:
    """Return what a platform's kernel calls its machine (`platform.machine()`): `x86_64`.

    Raises:
        InvalidVersion: no wheels are known for the platform.
    """
    variant = "" if platform.architecture == "amd64" else platform.variant
    name = _MACHINES.get((platform.architecture, variant))
    if platform.os != "linux" or name is None:
        message = f"No wheels are known for the platform {platform}."
        known = ", ".join(sorted(str(Platform("linux", *key)) for key in _MACHINES))
        raise InvalidVersion(
            message, remedy=f"Known are {known}. Leave the platform out, or ship a Dockerfile.template."
        )
    return name


def wheel_platforms(platform: Platform, glibc: tuple[int, int] | None) -> list[str]:
    """Return the platform tags that fit a platform, the best first.

    Args:
        platform: the platform.
        glibc: the C library of the base image, major and minor; None where it is not known.

    Raises:
        InvalidVersion: no wheels are known for the platform.
    """
    name = machine(platform)
    _, minor = glibc or OLDEST_GLIBC
    x86 = name in {"x86_64", "i686"}
    return [*_manylinux(name, minor, _FIRST_X86 if x86 else _FIRST), f"linux_{name}"]


def _manylinux(name: str, newest: int, oldest: int) -> Iterator[str]:
    for minor in range(newest, oldest - 1, -1):
        yield f"manylinux_2_{minor}_{name}"
        if minor in _OLDER_NAMES:
            yield f"{_OLDER_NAMES[minor]}_{name}"


def wheel_tags(platform: Platform, python: str, glibc: tuple[int, int] | None) -> dict[Tag, int]:
    """Return the tags of all wheels that a platform's CPython can use, each with its rank: 0 is the best.

    Args:
        platform: the platform.
        python: `3.11` or `3.11.2`.
        glibc: the C library of the base image; None where it is not known.

    Raises:
        InvalidVersion: no wheels are known for the platform.
    """
    version = minor_version(python)
    platforms = wheel_platforms(platform, glibc)
    interpreter = f"cp{version[0]}{version[1]}"
    # Until 3.7 an interpreter's ABI says that it has pymalloc, which all of them do (PEP 425, bpo-36707).
    abi = f"{interpreter}m" if version < _FIRST_WITHOUT_M else interpreter
    compatible = compatible_tags(version, interpreter=interpreter, platforms=platforms)
    tags = [*cpython_tags(version, [abi], platforms), *compatible]
    ranks: dict[Tag, int] = {}
    for tag in tags:
        ranks.setdefault(tag, len(ranks))
    return ranks


def rank_of(tags: Collection[Tag], ranks: dict[Tag, int]) -> int | None:
    """Return the rank of a wheel by its best tag, as pip ranks it; None where it does not fit.

    Args:
        tags: the wheel's.
        ranks: as `wheel_tags` gives them.
    """
    return min((ranks[tag] for tag in tags if tag in ranks), default=None)


def minor_version(python: str) -> tuple[int, int]:
    """Return major and minor of `3.11` or `3.11.2`."""
    major, minor = python.split(".")[:2]
    return int(major), int(minor)


def marker_environment(platform: Platform, python: str) -> dict[str, str]:
    """Return the values of environment markers (PEP 508) on a platform.

    Args:
        platform: the platform.
        python: `3.11` or `3.11.2`.

    Raises:
        InvalidVersion: no wheels are known for the platform.
    """
    major, minor = minor_version(python)
    full = python if python.count(".") > 1 else f"{python}.0"
    return {
        "implementation_name": "cpython",
        "implementation_version": full,
        "os_name": "posix",
        "platform_machine": machine(platform),
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": full,
        "python_version": f"{major}.{minor}",
        "sys_platform": "linux",
    }
