"""Resolves with pip, which knows every platform by its tags: arm/v7, s390x, ppc64le, riscv64 and the rest."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version
from pydantic import ValidationError

from builder.errors import BuildFailed, Defect
from builder.masking import one_line
from builder.package_index.client import IndexClient
from builder.package_index.config import FIRST_INDEX, Indexes
from builder.package_index.wheel_file import (
    LockedWheel,
    Origin,
    marker_environment,
    parse_wheel_name,
    rank_of,
    wheel_platforms,
    wheel_tags,
)
from builder.wheels import uv
from builder.wheels.pip_for_target import ADDRESS, UNKNOWN_PIP
from builder.wheels.uv import (
    NoWheel,
    Question,
    Tool,
    Unsatisfiable,
    failure,
    interpreter,
    names_an_address,
    option_line,
    private_folder,
    run_tool,
)

_NOT_FOUND = re.compile(
    r"Could not find a version that satisfies the requirement (.{1,500}?)(?: \(from (?!versions)[^)]*\))? "
    r"\(from versions: ([^)]*)\)"
)
_NO_MATCH = re.compile(
    r"some packages in these conflicts have no matching distributions available for your environment:\n((?:\s+\S+\n?)+)"
)
_NO_TIMES = re.compile(r"does not provide upload-time metadata")
_UNFIT = re.compile(r"(?<!\S)(\S+\.whl) is not a supported wheel on this platform")
_CAUSE = re.compile(
    r"^ +(?:The user requested (?:\(constraint\) )?|(?P<name>[A-Za-z0-9._-]+)(?:\[\S*\])? (?P<version>\S+) depends on )"
    r"(?P<wanted>\S.*)$",
    re.MULTILINE,
)
_OTHER_PYTHON = re.compile(r"Package '([A-Za-z0-9._-]+)' requires a different Python")
_MOST_REASONS = 20
_ADDRESS = re.compile(rf"{ADDRESS}: (.+)")
_SEVERAL = 2
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies|No matching distribution found")


class NoTimes(Exception):
    """An index gives no upload times; pip then takes nothing from any. Never leaves this package."""


def resolve(question: Question, tool: Tool, client: IndexClient) -> tuple[LockedWheel, ...]:
    """Return the wheels that pip chooses, with their addresses.

    Args:
        question: what to resolve.
        tool: how.
        client: asked what there is of a package that pip does not find, and for hashes that an index does not give.

    Raises:
        NoTimes: an index gives no upload times, and the question has a time.
        NoWheel: a package has no wheel for the platform.
        InvalidVersion: a package requires what is at an address.
        Unsatisfiable: the requirements contradict each other or what there is.
        ServiceUnavailable, PermissionRefused, InvalidSettings, TryAgain, BuildFailed: it could not resolve.
        Defect: the pip that is installed is not what this program knows.
    """
    with private_folder() as folder:
        requirements = folder / "requirements.txt"
        requirements.touch(mode=0o600)
        requirements.write_text(question.requirements_file(*_index_lines(tool.indexes)))
        (folder / "constraints.txt").write_text(question.constraints_file())
        report = folder / "report.json"
        markers = marker_environment(question.platform, question.python)
        argv = [
            *(interpreter(), "-m", "builder.wheels.pip_for_target", json.dumps(markers)),
            *("install", "--isolated", "--no-input", "--no-color", "--disable-pip-version-check"),
            *("--progress-bar", "off", "--keyring-provider", "disabled", "--use-feature", "fast-deps"),
            *("--retries", str(uv.HTTP_RETRIES), "--timeout", str(uv.HTTP_SECONDS)),
            *("--dry-run", "--ignore-installed", "--target", str(folder / "nowhere"), "--report", str(report)),
            *("--only-binary", ":all:", "--implementation", "cp", "--python-version", question.python),
            *(f"--platform={tag}" for tag in wheel_platforms(question.platform, question.glibc)),
            *(["--cache-dir", str(tool.cache / "pip")] if tool.cache else ["--no-cache-dir"]),
            *(["--cert", str(tool.indexes.ca_bundle)] if tool.indexes.ca_bundle else []),
            *(["--pre"] if question.requirements.prereleases else []),
            *(["--uploaded-prior-to", question.as_of.astimezone(UTC).isoformat()] if question.as_of else []),
            *("--constraint", str(folder / "constraints.txt"), "--requirement", str(requirements)),
        ]
        path = os.pathsep.join(entry for entry in (str(Path(__file__).parents[2]), *sys.path) if entry)
        code, said = run_tool(
            "pip", argv, tool=tool, folder=folder, env={"PYTHONPATH": path, "PIP_CONFIG_FILE": os.devnull}
        )
        if code and question.as_of and _NO_TIMES.search(said):
            raise NoTimes
        if code:
            raise _error(question, code, said, tool.indexes, client)
        return tuple(_wheels(report, question, markers, tool, client))


def _index_lines(indexes: Indexes) -> Iterator[str]:
    """Yield the options of a requirements file that name the indexes, so that no secret is an argument."""
    if indexes.no_index:
        yield option_line("--no-index")
    elif indexes.default:
        yield option_line("--index-url", indexes.authenticated(indexes.default).with_credential)
    for index in () if indexes.no_index else indexes.extra:
        yield option_line("--extra-index-url", indexes.authenticated(index).with_credential)
    for link in indexes.find_links:
        yield option_line("--find-links", indexes.authenticated(link).with_credential)
    for host in sorted(indexes.trusted):
        yield option_line("--trusted-host", host)


def _error(question: Question, code: int, said: str, indexes: Indexes, client: IndexClient) -> Exception:
    """Return what pip's words mean. They are taken apart, and none is handed on: pip quotes lines of files."""
    if code == UNKNOWN_PIP:
        message = f"The pip that is installed here is not the one that can resolve for {question.platform}."
        return Defect(message, remedy="Install the release of pip that requirements/builder.txt names.")
    if (found := _UNFIT.search(said)) and (name := _wheel_of(found[1])):
        return NoWheel(name, question.platform)
    if (found := _ADDRESS.search(said)) and (wanted := _requirement(found[1])):
        return names_an_address(wanted.name)
    if (found := _NOT_FOUND.search(said)) and (wanted := _requirement(found[1])):
        name = canonicalize_name(wanted.name)
        if _releases(name, wanted.specifier, question, client):
            there = ", ".join(_versions(found[2]))
            return NoWheel(name, question.platform, f"there are {one_line(there, 200)}" if there else "")
        return Unsatisfiable(question.platform, f"there is no version of {_plain(wanted)}.")
    if found := _OTHER_PYTHON.search(said):
        name = canonicalize_name(found[1])
        return Unsatisfiable(question.platform, f"{name} is not for Python {question.python}.")
    if _CONFLICT.search(said):
        return _conflict(question, said, client)
    return failure("pip", code, said, indexes)


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except (InvalidRequirement, ValueError, RecursionError):
        return None


def _plain(wanted: Requirement) -> str:
    """Return name and versions of a requirement, and nothing that it may have beside them."""
    return f"{canonicalize_name(wanted.name)}{wanted.specifier}"


def _versions(text: str) -> Iterator[str]:
    for word in text.split(", "):
        with suppress(NotAVersion):
            yield str(Version(word))


def _wheel_of(filename: str) -> str:
    try:
        return parse_wheel_name(filename)[0]
    except InvalidWheelFilename:
        return ""


def _reasons(said: str) -> Iterator[str]:
    """Yield what pip says that a conflict is caused by."""
    for found in _CAUSE.finditer(said):
        wanted = _requirement(found["wanted"])
        if wanted is None:
            continue
        versions = list(_versions(found["version"] or ""))
        if found["name"] and versions:
            yield f"{canonicalize_name(found['name'])} {versions[0]} depends on {_plain(wanted)}"
        elif not found["name"]:
            yield f"the model asks for {_plain(wanted)}"


def _conflict(question: Question, said: str, client: IndexClient) -> Exception:
    """Return what a conflict comes from: versions that exclude each other, or one that has no wheel that fits."""
    missing = _NO_MATCH.search(said)
    for word in missing[1].split() if missing else []:
        name = canonicalize_name(word)
        asked = re.findall(rf"(?:depends on|requested) ({re.escape(word)}[^\s(;]*)", said, re.IGNORECASE)
        for text in asked or [word]:
            wanted = _requirement(text)
            releases = _releases(name, wanted.specifier, question, client) if wanted else []
            if releases and not any(releases):
                return NoWheel(name, question.platform)
    reasons = list(islice(dict.fromkeys(_reasons(said)), _MOST_REASONS))
    return Unsatisfiable(question.platform, f"{'; '.join(reasons) or 'its packages'} exclude each other.")


def _releases(name: str, specifier: SpecifierSet, question: Question, client: IndexClient) -> list[bool]:
    """Return for each file that would fulfil a requirement whether it is a wheel that fits the platform."""
    tags = wheel_tags(question.platform, question.python, question.glibc)
    found = []
    for file in client.files(name):
        late = question.as_of and file.uploaded and file.uploaded >= question.as_of
        if file.release and not late and specifier.contains(file.release[1], prereleases=True):
            wheel = file.filename.endswith(".whl")
            found.append(wheel and rank_of(parse_wheel_name(file.filename)[3], tags) is not None)
    return found


def _wheels(
    report: Path, question: Question, markers: dict[str, str], tool: Tool, client: IndexClient
) -> Iterator[LockedWheel]:
    """Yield the wheels of pip's report (https://pip.pypa.io/en/stable/reference/installation-report/)."""
    try:
        document = json.loads(report.read_text())
        seen = document["environment"]
        if any(seen.get(name) != value for name, value in markers.items()):
            message = "it was made for another environment"
            raise ValueError(message)  # noqa: TRY301  # one place says what a bad report is
        for item in document["install"]:
            wheel = _wheel(item, question, client)
            if wheel.origin == "index":
                _check_first_index(wheel, question, tool, client)
            yield wheel
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        message = f"What pip resolved cannot be read ({type(error).__name__})."
        raise BuildFailed(message, remedy="Use the release of pip that this program was made for.") from error


def _wheel(item: dict[str, Any], question: Question, client: IndexClient) -> LockedWheel:
    url, archive = item["download_info"]["url"], item["download_info"].get("archive_info", {})
    url = urlsplit(url)._replace(fragment="").geturl()
    filename = unquote(urlsplit(url).path.rpartition("/")[2])
    origin: Origin = "index"
    size: int | None = None
    if item.get("is_direct"):
        origin, url, size = question.found(url)
    name, version, _, _ = parse_wheel_name(filename)
    digest = archive.get("hashes", {}).get("sha256")
    if not digest:
        # The index does not say; what is locked has to be known, so the file is read once.
        digest, size = client.digest(filename, url)
    return LockedWheel(
        name=name, version=str(version), filename=filename, sha256=digest, size=size, origin=origin, url=url
    )


def _check_first_index(wheel: LockedWheel, question: Question, tool: Tool, client: IndexClient) -> None:
    """Raise Unsatisfiable where pip took a package from another index than the first that has it.

    pip takes the newest of all indexes, and so what anybody put under a private package's name into a public one.
    """
    if tool.indexes.strategy != FIRST_INDEX or len(tool.indexes.all) + (tool.indexes.default is None) < _SEVERAL:
        return
    if any(file.filename == wheel.filename for file in client.files(wheel.name)):
        return
    said = (
        f"{wheel.filename} is in another index than the first that has {wheel.name}, which has none that fits. "
        "UV_INDEX_STRATEGY=unsafe-best-match takes it from any."
    )
    raise Unsatisfiable(question.platform, said)
