"""Resolve requirements with uv, in a private folder, and report its failures in the author's terms."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.tags import Tag
from packaging.utils import BuildTag, InvalidWheelFilename, canonicalize_name
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version
from pydantic import ValidationError

from builder.errors import (
    BuilderError,
    BuildFailed,
    Defect,
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
)
from builder.log import get_logger
from builder.masking import MASK, masked, one_line
from builder.package_index import FIRST_INDEX, WRITABLE, Indexes, IndexUrl, built_in_index
from builder.package_index.wheel_file import (
    OLDEST_GLIBC,
    LockedWheel,
    Origin,
    machine,
    marker_environment,
    parse_wheel_name,
    rank_of,
    wheel_tags,
)
from builder.process import Limits, Runner
from builder.reference import Platform
from builder.wheels.pip_syntax import NAME, Required
from builder.wheels.requirements import Requirements

_log = get_logger("lock")
_Value = bool | str | Sequence[str]
_File = dict[str, Any]
_LONGEST_EXPLANATION = 700


class NoWheel(BuildFailed):
    """A package has no wheel for a platform, so that only an engine could build it there, if there is source.

    Args:
        package: its normal name.
        platform: the platform.
        explanation: uv's own words; may be empty.
        systems: the platform tags of all files, where these are wheels for other systems.
    """

    def __init__(self, package: str, platform: Platform, explanation: str = "", *, systems: Sequence[str] = ()) -> None:
        self.package = package
        self.platform = platform
        self.buildable = not systems
        message = f"{package} has no wheel for {platform}"
        if self.buildable:
            message += f" ({one_line(explanation, _LONGEST_EXPLANATION)})." if explanation else "."
            remedy = (
                "Build this platform with an engine (BUILD_ENGINE) or a Dockerfile.template, configure an index that "
            )
            remedy += (
                "has the wheel, pin a version that has one, log the wheel with the model, or leave the platform out "
            )
            remedy += "(MODEL_PLATFORMS)."
        else:
            message += ", and no engine can build it: it has no source, only wheels for "
            message += f"{one_line(', '.join(systems), 200)}."
            windows = all(system.startswith("win") for system in systems)
            marker = "sys_platform == 'win32'" if windows else "sys_platform != 'linux'"
            remedy = (
                f"Remove {package}, or the package that requires it, from the model's requirements, or limit it to "
            )
            remedy += f"its system (`{package}; {marker}`), and register the model again."
        super().__init__(message, remedy=remedy)


class Unsatisfiable(InvalidVersion):
    """No set of packages fulfils the requirements.

    Args:
        platform: the platform.
        explanation: uv's own words.
    """

    def __init__(self, platform: Platform, explanation: str) -> None:
        why = one_line(explanation, _LONGEST_EXPLANATION)
        message = f"The model's requirements cannot be satisfied on {platform}: {why}"
        remedy = "Correct them and register the model again. RESOLVE_AS_OF=now allows packages newer than the model."
        super().__init__(message, remedy=remedy)
        self.platform = platform
        self.explanation = explanation


def names_an_address(required: str, wheel: str = "A wheel") -> InvalidVersion:
    """Return the error for a wheel whose metadata requires a package by its address.

    Args:
        required: what it requires.
        wheel: which one.
    """
    message = f"{wheel} requires {one_line(required, 200)!r}, which is at an address. Only indexes may provide it."
    remedy = "Build the wheel again with the package's name alone, and add the address to the model's requirements.txt."
    return InvalidVersion(message, remedy=remedy)


# uv splits a line at blanks, takes quotes and backslashes from it, cuts it at ` #`, and expands `${VARIABLE}`. `%` is
# part of an encoded character and of nothing else.
_SPECIFIER = re.compile(r"(?:(?:===?|[~!<>]=|[<>])[A-Za-z0-9.!+*_-]+(?:,(?!$)|$))*")
_LOCATION = re.compile(r"file:///(?:[A-Za-z0-9._~/-]|%[0-9A-F]{2})+\.whl")
_REQUIREMENTS = "a requirements file"
_KEY = re.compile(r"[a-z]+(?:-[a-z]+)*")
_STRING = re.compile(r"[ -~]*")


def requirement_line(required: Required, location: str = "") -> str:
    """Return a line of a requirements file that asks for a package: by its versions, or by a wheel on this machine.

    It has no marker and no address: markers are evaluated before, and what is at an address is fetched before.

    Args:
        required: the requirement.
        location: the `file:` URL of its wheel; empty where an index has it.

    Raises:
        Defect: uv could read it as something else, or would have to go to an address.
    """
    _require(all(NAME.fullmatch(name) for name in (required.name, *required.extras)), _REQUIREMENTS)
    if location:
        _require(_LOCATION.fullmatch(location), _REQUIREMENTS)
    else:
        _require(not required.url and not required.path and _SPECIFIER.fullmatch(required.specifier), _REQUIREMENTS)
    extras = f"[{','.join(required.extras)}]" if required.extras else ""
    return f"{required.name}{extras}{f' @ {location}' if location else required.specifier}"


def toml_of(values: Mapping[str, _Value], arrays: Iterable[tuple[str, Mapping[str, _Value]]], *, table: str) -> str:
    """Return the text of a TOML file that holds one table, and arrays of tables in it.

    Args:
        values: the table's own.
        arrays: name and values of each element of an array of tables, in order.
        table: the table's dotted name.

    Raises:
        Defect: a value is not printable ASCII.
    """
    tables = [(f"[{table}]", values), *((f"[[{table}.{_key(name)}]]", element) for name, element in arrays)]
    lines = ([header, *(f"{_key(key)} = {_toml(value)}" for key, value in each.items())] for header, each in tables)
    return _text_of(chain.from_iterable(lines))


def _text_of(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _key(text: str) -> str:
    _require(_KEY.fullmatch(text), "a TOML file")
    return text


def _toml(value: _Value) -> str:
    strings = [] if isinstance(value, bool) else [value] if isinstance(value, str) else value
    _require(all(_STRING.fullmatch(text) for text in strings), "a TOML file")
    # Of printable ASCII, JSON's booleans, strings and lists are TOML's (https://toml.io/en/v1.0.0#string).
    return json.dumps(value if isinstance(value, (bool, str)) else list(value))


def _require(holds: object, where: str) -> None:
    """Raise Defect unless a value is plain. It is not shown: it may hold a credential, or what an author wants read."""
    if not holds:
        message = f"A value cannot be written into {where} without ambiguity."
        raise Defect(message, remedy="Please report it with the model's requirements.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be resolved.

    Attributes:
        requirements: the packages.
        model: folder of the model, where its own wheels are.
        platform: what for.
        python: the interpreter, `3.11` or `3.11.2`.
        glibc: the base's C library; None where it is not known.
        as_of: packages uploaded later do not exist; None for all.
        timeless: addresses of indexes that give no upload times, so that `as_of` does not count for them.
        places: the wheels that requirements name by address, fetched and checked: paths by address.
        unfit: versions without a wheel for the platform, by package.
    """

    requirements: Requirements
    model: Path
    platform: Platform
    python: str
    glibc: tuple[int, int] | None
    as_of: datetime | None
    timeless: frozenset[str] = frozenset()
    places: Mapping[str, Path] = field(default_factory=dict)
    unfit: Mapping[str, frozenset[Version]] = field(default_factory=dict)

    @property
    def required(self) -> tuple[Required, ...]:
        """The requirements whose markers apply; uv evaluates no marker that an author wrote."""
        return self._applying(self.requirements.required)

    @property
    def markers(self) -> dict[str, str]:
        """The platform's environment markers."""
        return marker_environment(self.platform, self.python)

    def requirements_file(self) -> str:
        """Return the requirements file: every wheel that is not an index's by its path."""
        return _text_of(requirement_line(one, self._location(one)) for one in self.required)

    def constraints_file(self) -> str:
        """Return the constraints file."""
        unfit = (
            Required(name=name, specifier=",".join(f"!={version}" for version in sorted(versions)))
            for name, versions in sorted(self.unfit.items())
        )
        return _text_of(map(requirement_line, (*self._applying(self.requirements.constraints), *unfit)))

    def found(self, url: str) -> tuple[Origin, str, int | None]:
        """Return the origin, address and size (None where it is not known) of a wheel that uv took from a path.

        Raises:
            ValueError: it was given no such path.
        """
        path = Path(os.path.normpath(unquote(urlsplit(url).path)))
        for address, place in self.places.items():
            if place == path:
                return "address", address, None
        for wheel in self.requirements.local:
            if (self.model / wheel.path).absolute() == path:
                return "model", path.as_uri(), wheel.size
        message = "a wheel is at an unknown path"
        raise ValueError(message)

    def _location(self, one: Required) -> str:
        if one.url:
            return self.places[one.url].as_uri()
        return (self.model / one.path).absolute().as_uri() if one.path else ""

    def _applying(self, required: Sequence[Required]) -> tuple[Required, ...]:
        environment = {**self.markers, "extra": ""}
        return tuple(one for one in required if not one.marker or Marker(one.marker).evaluate(environment))


class MissingTimes(Exception):
    """An index gives no upload times, so that uv left out what it has; never leaves this package.

    Args:
        projects: names of packages whose files have none.
    """

    def __init__(self, projects: frozenset[str]) -> None:
        super().__init__("packages without upload times")
        self.projects = projects


class Unfit(Exception):
    """uv chose versions that no wheel for the platform exists of; never leaves this package.

    Args:
        versions: of each such package, the version that was chosen.
    """

    def __init__(self, versions: Mapping[str, Version]) -> None:
        super().__init__("versions without a wheel for the platform")
        self.versions = versions


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a folder that only we can read, for files that hold credentials; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="builder-lock-") as folder:
        yield Path(folder)


# uv takes 300 MB for what MLflow, scikit-learn, pandas and xgboost require, and some seconds.
MOST_MEMORY = 2 << 30
_MOST_PROCESSOR = 600
_MOST_LINES = 200
# Seconds for one request to an index, and how often a request is repeated.
HTTP_SECONDS, HTTP_RETRIES = 30, 2
_MACHINES = frozenset({"x86_64", "aarch64"})
# The levels of glibc that uv has a name for (`uv pip compile --help`).
_LEVELS = (17, 28, *range(31, 41))


@dataclass(frozen=True, slots=True, kw_only=True)
class Uv:
    """uv, and how its processes are run.

    Attributes:
        indexes: the package indexes and their credentials.
        runner: runs a program.
        cache: folder for metadata; None for no cache.
        timeout: seconds for one run.
        memory: bytes that one run may take.
    """

    indexes: Indexes
    runner: Runner
    cache: Path | None
    timeout: float
    memory: int

    def resolve(self, question: Question) -> tuple[LockedWheel, ...]:
        """Return the wheels that uv chooses, with their addresses.

        Raises:
            MissingTimes, Unfit: it has to run once more, without what the exception names.
            NoWheel: a package has no wheel for the platform.
            Unsatisfiable: the requirements contradict each other, or what the indexes have.
            InvalidVersion: a package requires what is at an address.
            ServiceUnavailable, PermissionRefused, InvalidSettings, TryAgain, BuildFailed: it could not resolve.
        """
        from uv import find_uv_bin

        with private_folder() as folder:
            (folder / "requirements.txt").write_text(question.requirements_file())
            (folder / "constraints.txt").write_text(question.constraints_file())
            # uv takes a project's environments from pyproject.toml alone, and reads either that or a uv.toml.
            config = folder / "pyproject.toml"
            config.touch(mode=0o600)
            config.write_text(_config(self.indexes, question))
            output = folder / "pylock.toml"
            level = _level(question)
            argv = [
                find_uv_bin(),
                *("pip", "compile", "--no-progress", "--no-header", "--format", "pylock.toml"),
                *("--output-file", str(output), "--generate-hashes", "--only-binary", ":all:"),
                *("--python", sys.executable, "--no-python-downloads", "--python-version", question.python),
                *(["--python-platform", level] if level else ["--universal"]),
                *("--constraints", str(folder / "constraints.txt")),
                *(["--cache-dir", str(self.cache)] if self.cache else ["--no-cache"]),
                *(["--prerelease", "allow"] if question.requirements.prereleases else []),
                *(["--exclude-newer", _moment(question.as_of)] if question.as_of else []),
                *(["--system-certs"] if self.indexes.ca_bundle is None else []),
                str(folder / "requirements.txt"),
            ]
            code, said = self._run(argv, folder)
            if files := _MISSING_TIME.findall(said):
                raise MissingTimes(frozenset(_projects(files)))
            if code:
                raise _error(question, code, said, self.indexes)
            return tuple(_wheels(output, question))

    def _run(self, argv: Sequence[str], folder: Path) -> tuple[int, str]:
        """Run uv and return its exit code and what it said, without a secret.

        Args:
            argv: the program and its arguments, no secret among them.
            folder: its home and working folder.

        Raises:
            BuildFailed: it cannot be started, or takes more time, processor time or memory than it may.
        """
        said: list[str] = []
        secrets = self.indexes.secrets

        def output(line: str) -> None:
            line = masked(line)
            for secret in secrets:
                line = line.replace(secret, MASK)
            _log.debug("uv", line=line)
            if len(said) < _MOST_LINES:
                said.append(line)

        # An empty configuration of the system, found before /etc/uv/uv.toml.
        (folder / "uv").mkdir()
        (folder / "uv/uv.toml").touch()
        # No netrc and no home with one: uv would send its credentials to any host that a page or an author names.
        places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CONFIG_DIRS"), str(folder))
        plain = {"PATH": os.defpath, "NO_COLOR": "1", "LC_ALL": "C.UTF-8", "UV_KEYRING_PROVIDER": "disabled"}
        http = {"UV_HTTP_TIMEOUT": str(HTTP_SECONDS), "UV_HTTP_RETRIES": str(HTTP_RETRIES)}
        proxies = {key: value for name, value in self.indexes.proxies.items() for key in (name, name.lower())}
        env = {**places, **plain, **http, **_authorities(self.indexes), **proxies}
        limits = Limits(memory=self.memory, processor=_MOST_PROCESSOR)
        try:
            code = self.runner(argv, env=env, cwd=folder, timeout=self.timeout, output=output, name="uv", limits=limits)
        except BuildFailed as error:
            remedy = "Raise BUILD_TIMEOUT, or check the package index." if "longer" in error.what else ""
            raise BuildFailed(error.what, remedy=remedy or "Install the builder with all its dependencies.") from error
        text = "\n".join(said)
        why = ""
        if code == -signal.SIGXCPU:
            why = f"it took more than {limits.processor} seconds of processor time"
        elif code and _NO_MEMORY.search(text):
            why = f"it took more than {limits.memory >> 20} MiB of memory"
        if why:
            message = f"uv could not resolve the requirements: {why}."
            raise BuildFailed(message, remedy="Pin more of the model's requirements, so that there is less to try.")
        return code, text


def _level(question: Question) -> str:
    """Return uv's name for a platform at a level of glibc; empty where it has none."""
    name, minor = machine(question.platform), (question.glibc or OLDEST_GLIBC)[1]
    level = max((level for level in _LEVELS if level <= minor), default=0)
    return f"{name}-manylinux_2_{level}" if level and name in _MACHINES else ""


def _moment(as_of: datetime) -> str:
    return as_of.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _authorities(indexes: Indexes) -> dict[str, str]:
    """Return the variables that name the authorities to trust: the settings' bundle, else what we trust ourselves.

    In the builder image that is a folder of its own, which uv would not look into.
    """
    if indexes.ca_bundle:
        return {"SSL_CERT_FILE": str(indexes.ca_bundle)}
    ours = ssl.get_default_verify_paths()
    named = {"SSL_CERT_FILE": ours.cafile, "SSL_CERT_DIR": ours.capath}
    return {name: path for name, path in named.items() if path}


def _config(indexes: Indexes, question: Question) -> str:
    """Return uv's settings: the indexes in their order, and the markers of a platform that uv has no name for."""
    links = [_address(indexes, link) for link in indexes.find_links]
    environment = [" and ".join(f"{name} == '{value}'" for name, value in question.markers.items())]
    values: dict[str, _Value] = {
        **({"index-strategy": indexes.strategy} if indexes.strategy != FIRST_INDEX else {}),
        **({"no-index": True} if indexes.no_index else {}),
        **({"find-links": links} if links else {}),
        **({"allow-insecure-host": sorted(indexes.trusted)} if indexes.trusted else {}),
        # The second makes uv go on to another version where one has no wheel for the platform.
        **({} if _level(question) else dict.fromkeys(("environments", "required-environments"), environment)),
    }
    default = indexes.default
    if default is None:
        built_in = built_in_index()
        default = built_in if built_in.url in question.timeless or indexes.credential(built_in.url) else None
    tables: list[dict[str, _Value]] = [
        {
            "url": _address(indexes, index),
            **({"exclude-newer": False} if index.url in question.timeless else {}),
            **({"default": True} if index is default else {}),
        }
        for index in (*indexes.extra, *((default,) if default else ()))
    ]
    return toml_of(values, () if indexes.no_index else (("index", each) for each in tables), table="tool.uv")


def _address(indexes: Indexes, index: IndexUrl) -> str:
    """Return an index's address with its credential."""
    address = indexes.authenticated(index).with_credential
    _require(WRITABLE.fullmatch(address) and not address.startswith("-"), "uv's settings")
    return address


# What uv says.

_MISSING_TIME = re.compile(r"`([^`]+)` is missing an upload date")
_URL_DEPENDENCY = re.compile(r"Package `([a-z0-9-]{1,200})` was included as a URL dependency")
# Of one version ("x==1 has"), of all ("all versions of x have"), or of several ranges, each in a line of its own.
_NO_WHEEL = re.compile(
    r"(?:^|[\s(])([A-Za-z0-9][A-Za-z0-9._-]*?)(?:\[[^\]\s]{1,200}\])?(?:[=<>!~]=?[^\s(]+)?\s{1,40}"
    r"ha(?:s|ve) no (?:wheels with |usable wheels|compatible wheels)"
)
# In a universal resolution uv names a platform by its markers.
_OF_MARKERS = re.compile(r"`[^`]{1,1000}`-compatible wheels")
_NO_MEMORY = re.compile(r"^memory allocation of [0-9]+ bytes failed", re.MULTILINE)
_STATUS = re.compile(
    r"(?:HTTP status (?:client|server) error \(|HTTP error |\b)([45][0-9]{2}) "
    r"(?:while getting|Unauthorized|Forbidden|Not Found|Too Many Requests|Bad Gateway|Internal Server Error|"
    r"Service Unavailable|Gateway Time-?out)"
)
_WHEEL = re.compile(r"(?:^|[\s/`'])([A-Za-z0-9_.+!-]{1,250}\.whl)\b")
_READING = re.compile(r"`([a-z0-9-]{1,200})==([^`\s]{1,100})`|Wheel '([a-z0-9-]{1,200})' located at")
_CREDENTIAL = "Put the credential into the index's address (PIP_INDEX_URL, UV_INDEX, pip.conf) or into netrc."
_UNAVAILABLE = r"\b(?:429|50[0-9])\b.{0,100}(?:error|unavailable|gateway|too many)"
_RETRY = "Try again when the package index answers; see the proxy settings."
_REFUSED = re.compile(r"\b40[13] (?:Unauthorized|Forbidden)|valid authentication credentials")
_SPACE = "Free space in the temporary folder."
_UNTRUSTED = "invalid peer certificate|certificate[ _]verify[ _]failed|No CA certificates were loaded"
_AUTHORITY = "Name a bundle with the package index's authority in SSL_CERT_FILE."
# What uv's words mean, in words of ours; the first that is found counts.
_FAILURES: tuple[tuple[str, str, type[BuilderError], str], ...] = (
    ("no space left on device|disk quota exceeded|os error 28", "the disk is full", TryAgain, _SPACE),
    (_UNTRUSTED, "a certificate is not trusted", InvalidSettings, _AUTHORITY),
    (_REFUSED.pattern, "a credential is refused", PermissionRefused, _CREDENTIAL),
    ("dns error|name resolution", "a host's name is not known", ServiceUnavailable, _RETRY),
    ("connection refused", "a connection was refused", ServiceUnavailable, _RETRY),
    ("timed? ?out", "an answer took too long", ServiceUnavailable, _RETRY),
    ("error sending request|connection reset", "a request was not answered", ServiceUnavailable, _RETRY),
    ("status server error|Request failed after", "a request failed", ServiceUnavailable, _RETRY),
    (_UNAVAILABLE, "a request failed", ServiceUnavailable, _RETRY),
)


def _projects(files: Iterable[str]) -> Iterator[str]:
    for name in files:
        with suppress(InvalidWheelFilename):
            yield parse_wheel_name(name)[0]


def _error(question: Question, code: int, said: str, indexes: Indexes) -> Exception:
    if found := _URL_DEPENDENCY.search(said):
        return names_an_address(found[1])
    if "No solution found" not in said:
        return _failure(code, said, indexes)
    if _REFUSED.search(said):
        # uv goes on as if the index did not have the package.
        status = _STATUS.search(said)
        where = _named_index(said, indexes) or "a package index"
        answer = f" (HTTP {status[1]})" if status else ""
        return PermissionRefused(f"The credential for {where} is missing or refused{answer}.", remedy=_CREDENTIAL)
    why = _explanation(said)
    if package := _NO_WHEEL.search(why):
        return NoWheel(canonicalize_name(package[1]), question.platform, why)
    if unfit := question.unfit.keys() & set(re.findall(r"[\w.-]+", why)):
        return NoWheel(min(unfit), question.platform, why)
    return Unsatisfiable(question.platform, why)


def _explanation(said: str) -> str:
    """Return uv's whole explanation without its advice, which is about uv's own command line.

    uv makes it of the packages, versions and tags that it has read and of words of its own; what it quotes of a file,
    such as metadata that it cannot read, is in its hints, which are left out. Words that look like a path or an address
    are left out, too.
    """
    _, _, tail = said.partition("No solution found when resolving dependencies")
    body, _, _ = tail.partition("\nhint:")
    if body.startswith(" for split "):
        _, _, body = body.partition("\n")
    body = _OF_MARKERS.sub("compatible wheels", re.sub(r"^[:\s]*(?:cause:|╰─▶)?", "", body))
    line = " ".join("…" if "/" in word or "\\" in word else word for word in body.split())
    # The package that counts may be named at the end of a long one. The errors cut what they show.
    return one_line(line, sys.maxsize)


def _failure(code: int, said: str, indexes: Indexes) -> BuilderError:
    """Return the error for a run that failed for another reason than its requirements.

    uv quotes what it reads where it does not understand it, and the error goes into MLflow's tags. So none of its words
    are taken: only a status, a package that was being read, an index of ours that it names, and what is the matter by a
    list of ours. The log has the rest, for whoever runs the publisher.
    """
    status, where = _STATUS.search(said), _named_index(said, indexes)
    found = (row[1:] for row in _FAILURES if re.search(row[0], said, re.IGNORECASE))
    other = "See docs/how-it-works.md, or build with an engine (BUILD_METHOD=dockerfile)."
    reason, error, remedy = next(found, ("", BuildFailed, other))
    what = f"HTTP {status[1]}" if status else reason
    details = [word for word in (what, f"from {where}" if where else "", _package(said)) if word]
    shown = ", ".join(details) or "see the log, with LOG_LEVEL=debug"
    return error(f"uv could not resolve the requirements (exit code {code}): {shown}.", remedy=remedy)


def _named_index(said: str, indexes: Indexes) -> str:
    """Return the host of the first of our indexes that uv's words name; empty for none."""
    hosts = (urlsplit(index.url).netloc for index in (*indexes.all, built_in_index()) if not index.is_file)
    return next((host for host in hosts if f"//{host}/" in said or f"@{host}/" in said), "")


def _package(said: str) -> str:
    """Return the wheel, or the package and version, that uv was reading when it failed, where it says so."""
    if found := _WHEEL.search(said):
        with suppress(InvalidWheelFilename):
            parse_wheel_name(found[1])
            return f"while it read {found[1]}"
    found = _READING.search(said)
    name = found and (found[1] or found[3])
    if not found or not NAME.fullmatch(name or ""):
        return ""
    try:
        return f"while it read {name}{f' {Version(found[2])}' if found[2] else ''}"
    except NotAVersion:
        return ""


# What uv writes.


def _wheels(path: Path, question: Question) -> Iterator[LockedWheel]:
    """Yield the wheels of a pylock.toml that uv wrote."""
    ranks = wheel_tags(question.platform, question.python, question.glibc)
    markers = question.markers
    unfit: dict[str, Version] = {}
    try:
        packages = tomllib.loads(path.read_text()).get("packages", [])
        for package in packages:
            if "marker" in package and not Marker(package["marker"]).evaluate(markers):
                continue
            named = question.requirements.named(package["name"])
            if file := package.get("archive") or _best(package["wheels"], named, ranks):
                yield _wheel(package, file, question, path.parent)
            else:
                unfit[package["name"]] = Version(package["version"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        message = f"uv's output cannot be read ({type(error).__name__})."
        raise BuildFailed(message, remedy="Install the release of uv that requirements/builder.txt names.") from error
    if unfit:
        raise Unfit(unfit)


def _best(files: list[_File], required: Sequence[Required], ranks: dict[Tag, int]) -> _File | None:
    """Return the wheel that pip would take of those that uv names, which are in no order; None where none fits.

    The order: a hash that a requirement names, the best tag, the highest build number.
    """
    hashes = {digest for one in required for digest in one.hashes}
    fitting: list[tuple[tuple[bool, int, BuildTag], _File]] = []
    for file in files:
        _, _, build, tags = parse_wheel_name(_filename(file))
        rank = rank_of(tags, ranks)
        if rank is not None:
            fitting.append(((file["hashes"]["sha256"] in hashes, -rank, build), file))
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _filename(file: _File) -> str:
    name = file.get("name") or unquote(urlsplit(file.get("url") or file["path"]).path.rpartition("/")[2])
    return str(name)


def _wheel(package: dict[str, Any], file: _File, question: Question, folder: Path) -> LockedWheel:
    direct = "archive" in package
    url = (folder / file["path"]).as_uri() if "path" in file else file["url"]
    filename = _filename(file)
    origin: Origin = "address" if direct else "index"
    size = file.get("size")
    if direct and "path" in file:
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
