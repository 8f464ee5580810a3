"""Resolves with uv, which knows linux/amd64 and linux/arm64 and takes about a second with an empty cache."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag
from packaging.utils import BuildTag, InvalidWheelFilename
from packaging.version import Version
from pydantic import ValidationError

from builder.build import resolver
from builder.build.indexes import FIRST_INDEX, Indexes, built_in_index
from builder.build.locked import LockedWheel, Origin
from builder.build.requirement import Required
from builder.build.resolver import (
    Question,
    Tool,
    failure,
    interpreter,
    is_refusal,
    private_folder,
    refused,
    run_tool,
)
from builder.build.tags import OLDEST_GLIBC, machine, rank_of, wheel_tags
from builder.build.tool_files import toml_of
from builder.build.unsatisfied import NoWheel, Unsatisfiable, names_an_address
from builder.build.wheel_name import parse_wheel_name
from builder.errors import BuildFailed, one_line
from builder.reference import Platform

_MACHINES = frozenset({"x86_64", "aarch64"})
# The levels of glibc that uv has a name for (`uv pip compile --help`).
_LEVELS = (17, 28, *range(31, 41))
# Of one version ("x==1 has"), of all ("all versions of x have"), or of several ranges, each in a line of its own.
_NO_WHEEL = re.compile(
    r"(?:^|[\s(])([A-Za-z0-9][A-Za-z0-9._-]*?)(?:\[[^\]\s]{1,200}\])?(?:[=<>!~]=?\S+)?\s{1,40}"
    r"ha(?:s|ve) no (?:wheels with |usable wheels)"
)
_URL_DEPENDENCY = re.compile(r"Package `([a-z0-9-]{1,200})` was included as a URL dependency")
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
        (folder / "requirements.txt").write_text(question.requirements_file())
        (folder / "constraints.txt").write_text(question.constraints_file())
        config = folder / "uv.toml"
        config.touch(mode=0o600)
        config.write_text(_config(tool.indexes, question))
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
        env = {
            "UV_KEYRING_PROVIDER": "disabled",
            "UV_HTTP_TIMEOUT": str(resolver.HTTP_SECONDS),
            "UV_HTTP_RETRIES": str(resolver.HTTP_RETRIES),
        }
        code, said = run_tool("uv", argv, tool=tool, folder=folder, env=env)
        if files := _MISSING_TIME.findall(said):
            raise MissingTimes(frozenset(_projects(files)))
        if code:
            raise _error(question, code, said, tool.indexes)
        return tuple(_wheels(output, question))


def _platform(question: Question) -> str:
    minor = (question.glibc or OLDEST_GLIBC)[1]
    level = max(level for level in _LEVELS if level <= max(minor, _LEVELS[0]))
    return f"{machine(question.platform)}-manylinux_2_{level}"


def _moment(as_of: datetime) -> str:
    return as_of.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _config(indexes: Indexes, question: Question) -> str:
    """Return a uv.toml that names the indexes, first those that are asked first."""
    links = [indexes.authenticated(link).with_credential for link in indexes.find_links]
    values: dict[str, bool | str | Sequence[str]] = {
        **({"index-strategy": indexes.strategy} if indexes.strategy != FIRST_INDEX else {}),
        **({"no-index": True} if indexes.no_index else {}),
        **({"find-links": links} if links else {}),
        **({"allow-insecure-host": sorted(indexes.trusted)} if indexes.trusted else {}),
    }
    default = indexes.default
    if default is None:
        built_in = built_in_index()
        default = built_in if built_in.url in question.timeless or indexes.credential(built_in.url) else None
    tables: list[dict[str, bool | str]] = [
        {
            "url": indexes.authenticated(index).with_credential,
            **({"exclude-newer": False} if index.url in question.timeless else {}),
            **({"default": True} if index is default else {}),
        }
        for index in (*indexes.extra, *((default,) if default else ()))
    ]
    return toml_of(values, () if indexes.no_index else (("index", table) for table in tables))


def _projects(files: list[str]) -> Iterator[str]:
    for name in files:
        try:
            yield parse_wheel_name(name)[0]
        except InvalidWheelFilename:
            continue


def _error(question: Question, code: int, said: str, indexes: Indexes) -> Exception:
    if found := _URL_DEPENDENCY.search(said):
        return names_an_address(found[1])
    if "No solution found" not in said:
        return failure("uv", code, said, indexes)
    if is_refusal(said):
        return refused(said, indexes)
    why = _explanation(said)
    if package := _NO_WHEEL.search(said):
        from packaging.utils import canonicalize_name

        return NoWheel(canonicalize_name(package[1]), question.platform, why)
    return Unsatisfiable(question.platform, why)


def _explanation(said: str) -> str:
    """Return uv's explanation without its advice, which is about uv's own command line.

    uv makes it of the packages, versions and tags that it has read and of words of its own; what it quotes of a file,
    such as metadata that it cannot read, is in its hints, which are left out. A path or an address is in none, so that
    whatever looks like one goes too.
    """
    _, _, tail = said.partition("No solution found when resolving dependencies")
    body, _, _ = tail.partition("\nhint:")
    return one_line(re.sub(r"\S*[/\\]\S*", "…", re.sub(r"^[:\s]*(?:cause:|╰─▶)?", "", body)), 2000)


def _wheels(path: Path, question: Question) -> Iterator[LockedWheel]:
    """Yield the wheels of a pylock.toml that uv wrote."""
    try:
        document = tomllib.loads(path.read_text())
        ranks = wheel_tags(question.platform, question.python, question.glibc)
        for package in document.get("packages", []):
            yield _wheel(package, question, path.parent, ranks)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        message = f"What uv resolved cannot be read ({type(error).__name__})."
        raise BuildFailed(message, remedy="Use the release of uv that this program was made for.") from error


def _best(files: list[dict[str, Any]], required: Sequence[Required], ranks: dict[Tag, int]) -> dict[str, Any]:
    """Return the wheel that pip would take of those that uv names, which are all that fit and in no order of merit.

    It is one of a hash that is asked for, then the one of the best tag, then that of the highest build number.
    """
    hashes = {digest for one in required for digest in one.hashes}

    def merit(file: dict[str, Any]) -> tuple[bool, bool, int, BuildTag]:
        _, _, build, tags = parse_wheel_name(_filename(file))
        rank = rank_of(tags, ranks)
        return file["hashes"]["sha256"] in hashes, rank is not None, -(rank or 0), build

    return max(files, key=merit)


def _filename(file: dict[str, Any]) -> str:
    name = file.get("name") or unquote(urlsplit(file.get("url") or file["path"]).path.rpartition("/")[2])
    return str(name)


def _wheel(package: dict[str, Any], question: Question, folder: Path, ranks: dict[Tag, int]) -> LockedWheel:
    archive = package.get("archive")
    file = archive or _best(package["wheels"], question.requirements.named(package["name"]), ranks)
    url = (folder / file["path"]).as_uri() if "path" in file else file["url"]
    filename = _filename(file)
    origin: Origin = "address" if archive else "index"
    size = file.get("size")
    if archive and "path" in file:
        origin, url, size = question.found(url)
    version = parse_wheel_name(filename)[1]
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
