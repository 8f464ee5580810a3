"""What both resolvers share: a question, a private folder for it, a child process, and what its end means."""

from __future__ import annotations

import os
import re
import signal
import ssl
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.utils import InvalidWheelFilename
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version

from builder.build.indexes import Indexes, built_in_index
from builder.build.locked import Origin
from builder.build.process import Limits, Runner
from builder.build.requirement import NAME, Required
from builder.build.requirements import Requirements
from builder.build.tags import marker_environment
from builder.build.tool_files import lines_of, requirement_line
from builder.build.wheel_name import parse_wheel_name
from builder.errors import (
    BuilderError,
    BuildFailed,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
)
from builder.log import MASK, get_logger, masked
from builder.reference import Platform

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
