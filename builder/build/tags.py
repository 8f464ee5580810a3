"""Which wheels fit a platform: the tags of an interpreter that is not this one."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from packaging.tags import Tag, compatible_tags, cpython_tags

from builder.errors import InvalidVersion
from builder.reference import Platform

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
        InvalidVersion: it is a platform that no wheel is for.
    """
    variant = "" if platform.architecture == "amd64" else platform.variant
    name = _MACHINES.get((platform.architecture, variant))
    if platform.os != "linux" or name is None:
        message = f"{platform} is no platform that wheels are known for."
        known = ", ".join(sorted(str(Platform("linux", *key)) for key in _MACHINES))
        raise InvalidVersion(message, remedy=f"Those are {known}; leave it out, or ship a Dockerfile.template.")
    return name


def wheel_platforms(platform: Platform, glibc: tuple[int, int] | None) -> list[str]:
    """Return the platform tags that fit a platform, the best first.

    Args:
        platform: the platform.
        glibc: the C library of the base image, major and minor; None where it is not known.

    Raises:
        InvalidVersion: it is a platform that no wheel is for.
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
        InvalidVersion: it is a platform that no wheel is for.
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
        InvalidVersion: it is a platform that no wheel is for.
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
