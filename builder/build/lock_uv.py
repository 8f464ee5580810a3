"""Resolves with uv, which knows linux/amd64 and linux/arm64 and takes about a second with an empty cache."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version
from pydantic import ValidationError

from builder.build.indexes import FIRST_INDEX, Indexes, built_in_index
from builder.build.locked import LockedWheel, Origin
from builder.build.resolver import (
    CREDENTIAL,
    Question,
    Tool,
    failure,
    interpreter,
    is_refusal,
    private_folder,
    run_tool,
)
from builder.build.tags import OLDEST_GLIBC, machine
from builder.build.unsatisfied import NoWheel, Unsatisfiable
from builder.errors import BuildFailed, PermissionRefused, one_line
from builder.reference import Platform

_MACHINES = frozenset({"x86_64", "aarch64"})
# The levels of glibc that uv has a name for (`uv pip compile --help`).
_LEVELS = (17, 28, *range(31, 41))
_NO_WHEEL = re.compile(
    r"(?:^|[\s(])([A-Za-z0-9][A-Za-z0-9._-]*?)(?:[=<>!~]=?\S+)? has no (?:wheels with a matching|usable wheels)"
)
_MISSING_TIME = re.compile(r"`([^`]+)` is missing an upload date")


class MissingTimes(Exception):
    """An index gives no upload times, so that uv left out what it has; never leaves this package.

    Args:
        projects: names of packages whose files have none.
    """

    def __init__(self, projects: frozenset[str]) -> None:
        super().__init__("packages without upload times")
        self.projects = projects


def knows(platform: Platform, glibc: tuple[int, int] | None) -> bool:
    """Return whether uv can resolve for a platform."""
    return machine(platform) in _MACHINES and (glibc or OLDEST_GLIBC)[1] >= _LEVELS[0]


def resolve(question: Question, tool: Tool) -> tuple[LockedWheel, ...]:
    """Return the wheels that uv chooses, with their addresses.

    Raises:
        MissingTimes: what it chose from is not complete.
        NoWheel: a package has no wheel for the platform.
        Unsatisfiable: the requirements contradict each other or what there is.
        ServiceUnavailable, PermissionRefused, InvalidSettings, TryAgain, BuildFailed: it could not resolve.
    """
    from uv import find_uv_bin

    with private_folder() as folder:
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in question.requirement_lines()))
        (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in question.constraint_lines()))
        config = folder / "uv.toml"
        config.touch(mode=0o600)
        config.write_text("".join(f"{line}\n" for line in _config(tool.indexes, question)))
        output = folder / "pylock.toml"
        argv = [
            find_uv_bin(),
            *("pip", "compile", "--no-progress", "--no-header", "--format", "pylock.toml"),
            *("--output-file", str(output), "--generate-hashes", "--only-binary", ":all:"),
            *("--config-file", str(config), "--python", interpreter(), "--no-python-downloads"),
            *("--python-version", question.python, "--python-platform", _platform(question)),
            *("--constraints", str(folder / "constraints.txt")),
            *(["--cache-dir", str(tool.cache)] if tool.cache else ["--no-cache"]),
            *(["--prerelease", "allow"] if question.requirements.prereleases else []),
            *(["--exclude-newer", _moment(question.as_of)] if question.as_of else []),
            *(["--system-certs"] if tool.indexes.ca_bundle is None else []),
            str(folder / "requirements.txt"),
        ]
        code, said = run_tool("uv", argv, tool=tool, folder=folder, env={"UV_KEYRING_PROVIDER": "disabled"})
        if files := _MISSING_TIME.findall(said):
            raise MissingTimes(frozenset(_projects(files)))
        if code:
            raise _error(question, code, said)
        return tuple(_wheels(output, question))


def _platform(question: Question) -> str:
    minor = (question.glibc or OLDEST_GLIBC)[1]
    level = max(level for level in _LEVELS if level <= max(minor, _LEVELS[0]))
    return f"{machine(question.platform)}-manylinux_2_{level}"


def _moment(as_of: datetime) -> str:
    return as_of.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _config(indexes: Indexes, question: Question) -> Iterator[str]:
    """Yield the lines of a uv.toml that names the indexes, first those that are asked first."""
    if indexes.strategy != FIRST_INDEX:
        yield f"index-strategy = {json.dumps(indexes.strategy)}"
    if indexes.no_index:
        yield "no-index = true"
    if indexes.find_links:
        yield f"find-links = {json.dumps([link.with_credential for link in indexes.find_links])}"
    if indexes.trusted:
        yield f"allow-insecure-host = {json.dumps(sorted(indexes.trusted))}"
    if indexes.no_index:
        return
    default = indexes.default
    if default is None and question.timeless:
        built_in = built_in_index()
        default = built_in if built_in.url in question.timeless else None
    for index in (*indexes.extra, *((default,) if default else ())):
        yield "[[index]]"
        yield f"url = {json.dumps(index.with_credential)}"
        if index.url in question.timeless:
            yield "exclude-newer = false"
        if index is default:
            yield "default = true"


def _projects(files: list[str]) -> Iterator[str]:
    for name in files:
        try:
            yield parse_wheel_filename(name)[0]
        except InvalidWheelFilename:
            continue


def _error(question: Question, code: int, said: str) -> Exception:
    if "No solution found" not in said:
        return failure("uv", code, said)
    if is_refusal(said):
        return PermissionRefused(f"A package index refused to be asked: {one_line(said, 700)}.", remedy=CREDENTIAL)
    why = _explanation(said)
    if package := _NO_WHEEL.search(said):
        from packaging.utils import canonicalize_name

        return NoWheel(canonicalize_name(package[1]), question.platform, why)
    return Unsatisfiable(question.platform, why)


def _explanation(said: str) -> str:
    """Return uv's explanation without its advice, which is about uv's own command line."""
    _, _, tail = said.partition("No solution found when resolving dependencies")
    body, _, _ = tail.partition("\nhint:")
    return one_line(re.sub(r"^[:\s]*(?:cause:|╰─▶)?", "", body), 2000)


def _wheels(path: Path, question: Question) -> Iterator[LockedWheel]:
    """Yield the wheels of a pylock.toml that uv wrote."""
    try:
        document = tomllib.loads(path.read_text())
        for package in document.get("packages", []):
            yield _wheel(package, question, path.parent)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        message = f"What uv resolved cannot be read: {one_line(str(error), 200)}."
        raise BuildFailed(message, remedy="Use the release of uv that this program was made for.") from error


def _wheel(package: dict[str, Any], question: Question, folder: Path) -> LockedWheel:
    archive = package.get("archive")
    file = archive or package["wheels"][0]
    url = (folder / file["path"]).as_uri() if "path" in file else file["url"]
    filename = file.get("name") or unquote(urlsplit(url).path.rpartition("/")[2])
    origin: Origin = "index"
    if archive:
        origin = "model" if "path" in file else "address"
    size = file.get("size")
    if origin == "model":
        size = next((wheel.size for wheel in question.requirements.local if wheel.filename == filename), size)
    version = parse_wheel_filename(filename)[1]
    if Version(package["version"]) != version:
        message = f"{filename} is not of version {package['version']}"
        raise ValueError(message)
    return LockedWheel(
        name=package["name"],
        version=str(version),
        filename=filename,
        sha256=file["hashes"]["sha256"],
        size=size,
        origin=origin,
        url=urlsplit(url)._replace(fragment="").geturl(),
        uploaded=file.get("upload-time"),
    )
