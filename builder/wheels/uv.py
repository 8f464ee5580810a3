"""Resolve requirements with uv, in a private folder, with every failure in the author's terms."""

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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.tags import Tag
from packaging.utils import BuildTag, InvalidWheelFilename
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
from builder.package_index.config import FIRST_INDEX, Indexes, built_in_index
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

_MOST_SAID = 700


class NoWheel(BuildFailed):
    """A package has no wheel for a platform, so that only an engine could build it there, if there is source.

    Args:
        package: its normal name.
        platform: which one.
        said: the resolver's own words; empty for none.
        systems: the platform tags of the only files that there are, where these are wheels for other systems.
    """

    def __init__(self, package: str, platform: Platform, said: str = "", *, systems: Sequence[str] = ()) -> None:
        why = f" ({one_line(said, _MOST_SAID)})" if said else ""
        self.package = package
        self.platform = platform
        self.buildable = not systems
        if systems:
            there = one_line(", ".join(systems), 200)
            message = f"{package} has no wheel for {platform}, and no engine can build it there: there is no source, "
            message += f"and only wheels for {there}."
            windows = all(system.startswith("win") for system in systems)
            marker = "sys_platform == 'win32'" if windows else "sys_platform != 'linux'"
            remedy = f"Leave {package}, or what requires it, out of the model's requirements, or ask for it where it "
            remedy += f"belongs (`{package}; {marker}`), and register the model again."
            super().__init__(message, remedy=remedy)
            return
        remedy = (
            "Build this platform with an engine (BUILD_ENGINE) or a Dockerfile.template, configure an index that has "
            "the wheel, pin a version that has one, log the wheel with the model, or leave the platform out "
            "(MODEL_PLATFORMS)."
        )
        super().__init__(f"{package} has no wheel for {platform}{why}.", remedy=remedy)


class Unsatisfiable(InvalidVersion):
    """No set of packages fulfils the requirements.

    Args:
        platform: what was resolved for.
        said: the resolver's own words.
    """

    def __init__(self, platform: Platform, said: str) -> None:
        message = f"The model's requirements cannot be fulfilled for {platform}: {one_line(said, _MOST_SAID)}"
        remedy = "Correct them and register the model again. RESOLVE_AS_OF=now takes packages newer than it, too."
        super().__init__(message, remedy=remedy)
        self.platform = platform
        self.said = said


def names_an_address(required: str, wheel: str = "A wheel") -> InvalidVersion:
    """Return the error for a wheel that requires what is at an address, and not what an index has.

    Args:
        required: what it requires.
        wheel: which one.
    """
    message = f"{wheel} requires {one_line(required, 200)!r}, which is at an address, and only indexes are asked."
    remedy = "Name it in the model's requirements.txt, and build the wheel again with the package's name alone."
    return InvalidVersion(message, remedy=remedy)


# pip and uv split a line at blanks, take quotes and backslashes from it, cut it at ` #`, and put in `${VARIABLE}`. `%`
# is part of an encoded character and of nothing else.
_WORD = re.compile(r"(?:[A-Za-z0-9._~+,=:@!*()/?&\[\]-]|%[0-9A-Fa-f]{2})+")
_OPTION = re.compile(r"--[a-z]+(?:-[a-z]+)*")
_SPECIFIER = re.compile(r"(?:(?:===?|[~!<>]=|[<>])[A-Za-z0-9.!+*_-]+(?:,(?!$)|$))*")
_LOCATION = re.compile(r"file:///(?:[A-Za-z0-9._~/-]|%[0-9A-F]{2})+\.whl")
_REQUIREMENTS = "a requirements file"
_KEY = re.compile(r"[a-z]+(?:-[a-z]+)*")
_STRING = re.compile(r"[ -~]*")


def option_line(option: str, value: str = "") -> str:
    """Return a line of a requirements file that holds one option.

    Args:
        option: its long name.
        value: one word; empty for none.

    Raises:
        Defect: pip could read it as something else.
    """
    plain = not value or (not value.startswith("-") and _WORD.fullmatch(value))
    _require(_OPTION.fullmatch(option) and plain, _REQUIREMENTS)
    return f"{option} {value}".strip()


def requirement_line(required: Required, location: str = "") -> str:
    """Return a line of a requirements file that asks for a package: by its versions, or by a wheel on this machine.

    It has no marker and no address: markers are evaluated before, and what is at an address is fetched before.

    Args:
        required: the requirement.
        location: the `file:` URL of its wheel; empty where an index has it.

    Raises:
        Defect: a resolver could read it as something else, or would have to go to an address.
    """
    _require(all(NAME.fullmatch(name) for name in (required.name, *required.extras)), _REQUIREMENTS)
    if location:
        _require(_LOCATION.fullmatch(location), _REQUIREMENTS)
    else:
        _require(not required.url and not required.path and _SPECIFIER.fullmatch(required.specifier), _REQUIREMENTS)
    extras = f"[{','.join(required.extras)}]" if required.extras else ""
    return f"{required.name}{extras}{f' @ {location}' if location else required.specifier}"


def lines_of(lines: Iterable[str]) -> str:
    """Return the text of a requirements file with these lines."""
    return "".join(f"{line}\n" for line in lines)


def toml_of(
    values: Mapping[str, bool | str | Sequence[str]], tables: Iterable[tuple[str, Mapping[str, bool | str]]]
) -> str:
    """Return the text of a TOML file.

    Args:
        values: what stands at the top.
        tables: name and values of each element of an array of tables, in order.

    Raises:
        Defect: a value is not printable ASCII.
    """
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in values.items()]
    for name, table in tables:
        lines += [f"[[{_key(name)}]]", *(f"{_key(key)} = {_toml(value)}" for key, value in table.items())]
    return lines_of(lines)


def _key(text: str) -> str:
    _require(_KEY.fullmatch(text), "a TOML file")
    return text


def _toml(value: bool | str | Sequence[str]) -> str:
    strings = [] if isinstance(value, bool) else [value] if isinstance(value, str) else value
    _require(all(_STRING.fullmatch(text) for text in strings), "a TOML file")
    # Of printable ASCII, JSON's booleans, strings and lists are TOML's (https://toml.io/en/v1.0.0#string).
    return json.dumps(value if isinstance(value, (bool, str)) else list(value))


def _require(holds: object, where: str) -> None:
    """Raise Defect unless a value is plain. It is not shown: it may hold a credential, or what an author wants read."""
    if not holds:
        message = f"A value cannot be written into {where} in such a way that it is read in one way only."
        raise Defect(message, remedy="Please report it with the model's requirements.")


_log = get_logger("lock")
CREDENTIAL = "Put the credential into the index's address (PIP_INDEX_URL, UV_INDEX, pip.conf) or into netrc."
_MOST_LINES = 200
# Seconds that an index may take for an answer, and how often it is asked again: both resolvers, each in its own words.
HTTP_SECONDS, HTTP_RETRIES = 30, 2
_CERTIFICATE = re.compile(
    r"invalid peer certificate|certificate[ _]verify[ _]failed|No CA certificates were loaded", re.IGNORECASE
)
# uv takes 300 MB for what MLflow, scikit-learn, pandas and xgboost require, and some seconds.
MOST_MEMORY = 2 << 30
_MOST_PROCESSOR = 600
_NO_MEMORY = re.compile(r"^memory allocation of [0-9]+ bytes failed|^(?:ERROR: )?MemoryError", re.MULTILINE)
_REFUSED = re.compile(r"\b40[13] (?:Unauthorized|Forbidden|Client Error)|valid authentication credentials")
_AWAY = re.compile(
    r"error sending request|connection (?:refused|reset|timed out)|dns error|timed out|status server error|"
    r"\b(?:429|50[0-9])\b.{0,100}(?:error|unavailable|gateway|too many)|temporary failure in name resolution|"
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Max retries exceeded|Request failed after",
    re.IGNORECASE,
)
_STATUS = re.compile(
    r"(?:HTTP status (?:client|server) error \(|HTTP error |\b)([45][0-9]{2}) "
    r"(?:Client Error|Server Error|while getting|Unauthorized|Forbidden|Not Found|Too Many Requests|Bad Gateway|"
    r"Internal Server Error|Service Unavailable|Gateway Time-?out)"
)
_WHEEL = re.compile(r"(?:^|[\s/`'])([A-Za-z0-9_.+!-]{1,250}\.whl)\b")
_READING = re.compile(r"`([a-z0-9-]{1,200})==([^`\s]{1,100})`|Wheel '([a-z0-9-]{1,200})' located at")
_FULL = re.compile(r"no space left on device|disk quota exceeded|os error 28", re.IGNORECASE)
_REASONS = (
    (_FULL, "the disk is full"),
    (
        re.compile(r"invalid peer certificate|certificate[ _]verify[ _]failed", re.IGNORECASE),
        "a certificate is not trusted",
    ),
    (re.compile(r"dns error|name resolution|Name or service not known", re.IGNORECASE), "a host's name is not known"),
    (re.compile(r"connection refused", re.IGNORECASE), "a connection was refused"),
    (re.compile(r"timed? ?out", re.IGNORECASE), "an answer took too long"),
    (re.compile(r"error sending request|Max retries exceeded", re.IGNORECASE), "a request was not answered"),
    (re.compile(r"Only wheels are taken, and this is source"), "a package is there as source only"),
)


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
        places: the wheels that are at addresses, fetched and looked at: each by its address.
    """

    requirements: Requirements
    model: Path
    platform: Platform
    python: str
    glibc: tuple[int, int] | None
    as_of: datetime | None
    timeless: frozenset[str] = frozenset()
    places: Mapping[str, Path] = field(default_factory=dict)

    @property
    def required(self) -> tuple[Required, ...]:
        """The requirements whose markers apply; no marker that an author wrote is evaluated by a resolver."""
        return self._applying(self.requirements.required)

    def requirements_file(self, *options: str) -> str:
        """Return the requirements file that both resolvers read: every wheel that is not an index's by its path.

        Args:
            options: lines before the requirements.
        """
        return lines_of([*options, *(requirement_line(one, self._location(one)) for one in self.required)])

    def constraints_file(self) -> str:
        """Return the constraints file."""
        return lines_of(requirement_line(one) for one in self._applying(self.requirements.constraints))

    def found(self, url: str) -> tuple[Origin, str, int | None]:
        """Return the origin, address and size (None where it is not known) of a wheel that a resolver took from a path.

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
        message = "a wheel is at a path that it was not told"
        raise ValueError(message)

    def _location(self, one: Required) -> str:
        if one.url:
            return self.places[one.url].as_uri()
        return (self.model / one.path).absolute().as_uri() if one.path else ""

    def _applying(self, required: Sequence[Required]) -> tuple[Required, ...]:
        environment = {**marker_environment(self.platform, self.python), "extra": ""}
        return tuple(one for one in required if not one.marker or Marker(one.marker).evaluate(environment))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """How the resolvers' processes are run.

    Attributes:
        indexes: who is asked, with which credential.
        runner: runs a program.
        cache: folder that metadata is kept in; None for none.
        timeout: seconds for one run.
        memory: bytes that one run may take.
    """

    indexes: Indexes
    runner: Runner
    cache: Path | None
    timeout: float
    memory: int


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a folder that only we can read, for files that hold credentials; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="builder-lock-") as folder:
        yield Path(folder)


def run_tool(
    name: str,
    argv: Sequence[str],
    *,
    tool: Tool,
    folder: Path,
    env: Mapping[str, str],
) -> tuple[int, str]:
    """Run a resolver and return its exit code and what it said, without a secret.

    Args:
        name: what messages call it.
        argv: the program and its arguments, no secret among them.
        tool: how to run it.
        folder: its home and working folder.
        env: variables beside the ones every child gets.

    Raises:
        BuildFailed: it cannot be started, or takes more time, processor time or memory than it may.
    """
    said: list[str] = []
    secrets = tool.indexes.secrets

    def output(line: str) -> None:
        clean = _clean(line, secrets)
        _log.debug("resolver", tool=name, line=clean)
        if len(said) < _MOST_LINES:
            said.append(clean)

    proxies = {key: value for name_, value in tool.indexes.proxies.items() for key in (name_, name_.lower())}
    # Neither a netrc nor a home with one: each would be asked for any host that a page or an author names.
    common = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    variables = {**common, **_authorities(tool.indexes), **proxies, **env}
    limits = Limits(memory=tool.memory, processor=_MOST_PROCESSOR)
    try:
        code = tool.runner(
            argv, env=variables, cwd=folder, timeout=tool.timeout, output=output, name=name, limits=limits
        )
    except BuildFailed as error:
        remedy = "Raise BUILD_TIMEOUT, or see that the package index answers." if "longer" in error.what else ""
        raise BuildFailed(error.what, remedy=remedy or "Install the builder with all its dependencies.") from error
    text = "\n".join(said)
    _check_limits(name, code, text, limits)
    return code, text


def _check_limits(name: str, code: int, said: str, limits: Limits) -> None:
    """Raise BuildFailed if a resolver was ended by its limits."""
    if code == -signal.SIGXCPU:
        why = f"it took more than {limits.processor} seconds of processor time"
    elif code and _NO_MEMORY.search(said):
        why = f"it took more than {limits.memory >> 20} MiB of memory"
    else:
        return
    message = f"{name} could not resolve the requirements: {why}."
    raise BuildFailed(message, remedy="Pin more of the model's requirements, so that there is less to try.")


def _authorities(indexes: Indexes) -> dict[str, str]:
    """Return the variables that name the authorities to trust: the settings' bundle, else what we trust ourselves.

    In the builder image that is a folder of its own, which neither uv nor pip would look into.
    """
    if indexes.ca_bundle:
        return {"SSL_CERT_FILE": str(indexes.ca_bundle)}
    ours = ssl.get_default_verify_paths()
    named = {"SSL_CERT_FILE": ours.cafile, "SSL_CERT_DIR": ours.capath}
    return {name: path for name, path in named.items() if path}


def _clean(line: str, secrets: Sequence[str]) -> str:
    line = masked(line)
    for secret in secrets:
        line = line.replace(secret, MASK)
    return line


def failure(name: str, code: int, said: str, indexes: Indexes) -> BuilderError:
    """Return the error for a run that failed for another reason than its requirements.

    A program quotes what it reads where it does not understand it, and the error goes into MLflow's tags. So none of
    its words are taken: only a status, a package that was being read, an index of ours that it names, and what is the
    matter by a list of ours. The log has the rest, for whoever runs the publisher.

    Args:
        name: what messages call the resolver.
        code: its exit code.
        said: what it said.
        indexes: who was asked.
    """
    status, where = _STATUS.search(said), _named_index(said, indexes)
    reason = next((reason for pattern, reason in _REASONS if pattern.search(said)), "")
    what = f"HTTP {status[1]}" if status else reason
    details = [word for word in (what, f"from {where}" if where else "", _package(said)) if word]
    told = ", ".join(details) or "its own words are in the log, with LOG_LEVEL=debug"
    message = f"{name} could not resolve the requirements (exit code {code}): {told}."
    if _FULL.search(said):
        return TryAgain(message, remedy="Free space in the temporary folder.")
    if _CERTIFICATE.search(said):
        return InvalidSettings(message, remedy="Name a bundle with the package index's authority in SSL_CERT_FILE.")
    if _REFUSED.search(said):
        return PermissionRefused(message, remedy=CREDENTIAL)
    if _AWAY.search(said):
        return ServiceUnavailable(message, remedy="Try again when the package index answers; see the proxy settings.")
    return BuildFailed(message, remedy="See docs/how-it-works.md, or build with an engine (BUILD_METHOD=dockerfile).")


def refused(said: str, indexes: Indexes) -> PermissionRefused:
    """Return the error for an index that wants a credential."""
    status = _STATUS.search(said)
    where = _named_index(said, indexes) or "a package index"
    answer = f" (HTTP {status[1]})" if status else ""
    return PermissionRefused(f"The credential for {where} is missing or refused{answer}.", remedy=CREDENTIAL)


def _named_index(said: str, indexes: Indexes) -> str:
    """Return the host of the first of our indexes that a program's words name; empty for none."""
    hosts = (urlsplit(index.url).netloc for index in (*indexes.all, built_in_index()) if not index.is_file)
    return next((host for host in hosts if f"//{host}/" in said or f"@{host}/" in said), "")


def _package(said: str) -> str:
    """Return the wheel, or the package and version, that a resolver was reading when it failed, where it says so."""
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


def is_refusal(said: str) -> bool:
    """Return whether an index wants a credential: a resolver goes on as if it did not have the package."""
    return bool(_REFUSED.search(said))


def interpreter() -> str:
    """Return this interpreter's path."""
    return sys.executable


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
            "UV_HTTP_TIMEOUT": str(HTTP_SECONDS),
            "UV_HTTP_RETRIES": str(HTTP_RETRIES),
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
