"""An engine: a program that runs a Dockerfile for one platform; its output bounded, its failures explained."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from builder.errors import BuilderError, BuildFailed, ServiceUnavailable, TryAgain
from builder.masking import one_line
from builder.process import Output
from builder.reference import Platform
from builder.settings import Network

if TYPE_CHECKING:
    from pathlib import Path

    from builder.reference import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """One run of an engine: one context, one platform, one layout.

    Attributes:
        context: folder the Dockerfile's COPY steps read; not written to.
        dockerfile: the rendered Dockerfile, a file in the context.
        platform: what to build for.
        layout: folder to write the OCI image layout into; must not exist or be empty.
        timeout: seconds the engine may take.
        network: see `Network`.
        docker_config: folder of a Docker config.json for pulls; None for anonymous pulls.
        cache: repository of the engine's layer cache, read only; None if there is none.
    """

    context: Path
    dockerfile: Path
    platform: Platform
    layout: Path
    timeout: float
    network: Network
    docker_config: Path | None = None
    cache: Repository | None = None


class Engine(Protocol):
    """Runs a Dockerfile, once per platform, and pushes nothing."""

    name: str

    def available(self) -> bool:
        """Return whether the engine's program is on this machine."""
        ...

    def build(self, job: BuildJob, output: Output) -> None:
        """Build one image into `job.layout`, as an OCI image layout with exactly one image.

        Raises:
            BuildFailed: the Dockerfile does not parse, its base is not available, a step fails, it takes too long, or
                the platform cannot be emulated here.
        """
        ...


# The longest builds print some ten thousand lines; each has 4,000 characters at most.
MOST_LINES = 100_000


class BoundedOutput:
    """Passes on the first lines, and then says once that there are more.

    Args:
        output: called with each line that is shown.
        most: the number of those lines.
    """

    def __init__(self, output: Output, most: int = MOST_LINES) -> None:
        self._output = output
        self._left = most
        self._most = most

    def __call__(self, line: str) -> None:
        """Take one line."""
        if self._left > 0:
            self._output(line)
        elif self._left == 0:
            self._output(f"The build has printed {self._most:,} lines; the rest is not shown.")
        self._left -= 1


_LONGEST_QUOTE = 700
_FOREIGN = re.compile(r"exec format error", re.IGNORECASE)
_AWAY = re.compile(
    r"connection refused|connection reset|i/o timeout|TLS handshake timeout|deadline exceeded|no route to host|"
    r"network is unreachable|server misbehaving|temporary failure in name resolution|TOOMANYREQUESTS|"
    r"too many requests|(?:status(?: code)?:? |\()5\d\d|Service Unavailable|Bad Gateway|Gateway Time-?out",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
# An engine puts the system's reason last, behind the author's names.
_ENDS_FULL = re.compile(rf"(?:^|: )(?:{_FULL.pattern})[)\s.]*$", re.IGNORECASE)
_MORE_ROOM = "Give the workspace and the container's own disk more room."
_REMEDIES = (
    (
        re.compile(
            r"x509|certificate signed by unknown|certificate verify failed|tls: failed to verify", re.IGNORECASE
        ),
        "Set SSL_CERT_FILE to a bundle that contains the registry's CA.",
    ),
    (
        re.compile(r"UNAUTHORIZED|authentication required|access to the resource is denied|\bDENIED\b|\b40[13]\b"),
        "Give the build phase a credential that may pull the image (BUILD_DOCKER_CONFIG).",
    ),
    (
        re.compile(
            r"MANIFEST_UNKNOWN|manifest unknown|NAME_UNKNOWN|no child with platform|no image found", re.IGNORECASE
        ),
        "Check the name and the tag after FROM, and that the image exists for this platform.",
    ),
    (re.compile(r"no such host"), "Check the registry's name after FROM, and the proxy variables."),
)


# What building a package needs beside Python, by the messages of programs that miss it.
_LACKING = (
    (re.compile(r"Unknown compiler\(s\): \[\['gfortran'|[Nn]o Fortran compiler"), "a Fortran compiler (gfortran)"),
    (re.compile(r"can't find Rust compiler|Cargo, the Rust package manager, is not"), "a Rust compiler (rustc, cargo)"),
    (re.compile(r"pg_config executable not found|pg_config is required"), "PostgreSQL's pg_config (Debian: libpq-dev)"),
    (re.compile(r"mysql_config\b.{0,40}not found"), "MySQL's client library (Debian: default-libmysqlclient-dev)"),
    (re.compile(r"error: Python\.h: No such file"), "Python's headers (Debian: python3-dev)"),
    (re.compile(r"fatal error: ([\w./+-]{1,100}): No such file"), "the header {}"),
    (re.compile(r"cannot find -l([\w.+-]{1,60})"), "the library {}"),
    (re.compile(r"(?:unable to execute|command) '([\w.+/-]{1,60})'(?: failed)?: No such file"), ""),
    (
        re.compile(
            r"No such file or directory: '(gcc|g\+\+|cc|c\+\+|gfortran|cmake|make|ninja|git|cargo|rustc|swig|"
            r"pkg-config|java|nvcc|go|perl|patchelf)'"
        ),
        "",
    ),
    (re.compile(r"Cannot find command '([\w.+-]{1,60})'"), ""),
    (
        re.compile(
            r"Microsoft Visual C\+\+|No CMAKE_C(?:XX)?_COMPILER could be found|Unknown compiler\(s\)|"
            r"no acceptable C compiler|C compiler cannot create executables|linker `cc` not found"
        ),
        "a C compiler (gcc)",
    ),
)
_SHELL_LACKS = re.compile(r"(?:^|: )([\w.+-]{1,60}): (?:command )?not found$")
_COMPILER = re.compile(r"(?:.*[/-])?(?:gcc|g\+\+|cc|c\+\+|clang(?:\+\+)?)(?:-[\d.]+)?")
_NO_FILE = re.compile(r"No matching distribution found for (\S.{0,200})")
_NO_INDEX = re.compile(r"WARNING: Retrying \(Retry\(|Could not fetch URL")
_PACKAGE = re.compile(r"Failed building wheel for ([\w.-]{1,100})|╰─> ([\w.-]{1,100})$")


class Printed:
    """The output of a step's own program, as far as a failure needs it: the last line, and hints at the reason.

    It is untrusted, and only chooses between remedies.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin with another step."""
        self.last = ""
        self._telling = ""
        self._lacking = ""
        self._package = ""
        self._missing = ""
        self._unreached = False

    def take(self, line: str) -> None:
        """Take one line; an empty one says nothing."""
        if not line.strip():
            return
        self.last = line
        if lacking := _lacking(line):
            self._telling, self._lacking = line.strip(), lacking
        elif found := _NO_FILE.search(line):
            self._telling, self._missing = line.strip(), found[1]
        elif found := _PACKAGE.search(line):
            self._package = found[1] or found[2]
        self._unreached = self._unreached or bool(_NO_INDEX.search(line))

    @property
    def line(self) -> str:
        """The most informative line."""
        return self._telling or self.last

    @property
    def remedy(self) -> str:
        """The remedy for the reason in the output; empty if it has none."""
        lacking = self._lacking
        if not lacking and (found := _SHELL_LACKS.search(self.last)):
            lacking = _program(found[1])
        if lacking:
            package = one_line(self._package, 100)
            why = f", which building {package} needs" if package else ""
            return (
                f"The base image lacks {one_line(lacking, 100)}{why}. "
                "Choose a base that has it (BASE_IMAGE, or the version's tag MODEL_BASE_IMAGE), install it in a "
                f"Dockerfile.template of the version's own, or pin a release of {package or 'the package'} that has a "
                "wheel."
            )
        if not self._missing:
            return ""
        missing = one_line(self._missing, 100)
        if self._unreached:
            return (
                f"RUN steps cannot reach the package index, or it has no {missing}. Check PIP_INDEX_URL, "
                "PIP_CONFIG_FILE and the proxy variables."
            )
        return (
            f"No index has {missing} for this platform and Python, as wheel or source, so that no engine can install "
            "it. Pin a version that exists, leave the package out if it belongs to another system, like pywin32, or "
            "configure the index that has it (PIP_INDEX_URL, PIP_CONFIG_FILE)."
        )


def _lacking(line: str) -> str:
    for pattern, what in _LACKING:
        if found := pattern.search(line):
            return what.format(*found.groups()) if what else _program(found[1])
    return ""


def _program(name: str) -> str:
    return f"a C compiler ({name})" if _COMPILER.fullmatch(name) else f"the program {name}"


def machine_platform() -> Platform:
    """Return the platform of the kernel that runs us; its variant is not known and not named."""
    system = os.uname()
    architecture = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm"}.get(
        system.machine, system.machine
    )
    return Platform(system.sysname.lower(), architecture)


def is_foreign(platform: Platform) -> bool:
    """Return whether programs of a platform need emulation on this machine."""
    here = machine_platform()
    return (platform.os, platform.architecture) != (here.os, here.architecture)


def cannot_be_run(platform: Platform) -> BuildFailed:
    """Return the error for a platform whose programs this machine can neither run nor emulate."""
    message = (
        f"A RUN step of {platform} cannot run on this machine, which is {machine_platform()} and has no emulation."
    )
    remedy = (
        "Register qemu-user-static with binfmt_misc on the node (flag F), build on a node of that architecture, or "
        "leave the platform out: the version's tag MODEL_PLATFORMS, or TARGET_PLATFORMS."
    )
    return BuildFailed(message, remedy=remedy)


def failure(
    engine: str, platform: Platform, said: str, *, step: str = "", printed: Printed | None = None
) -> BuilderError:
    """Return the error for an engine's last words.

    Args:
        engine: the engine's name, as messages show it.
        platform: what was being built.
        said: the engine's own last words on why it failed.
        step: the Dockerfile's instruction that failed; empty if none had begun, or the engine itself failed.
        printed: the output of the instruction's own program; None if that is irrelevant.

    Returns:
        `ServiceUnavailable` if a registry is unavailable, `TryAgain` if the engine itself found a disk full, else
        `BuildFailed`: a step's own output about a full disk is untrusted, so that it has to count as an attempt.
    """
    full = bool(_ENDS_FULL.search(said))
    said, step, output = (one_line(text, _LONGEST_QUOTE) for text in (said, step, printed.line if printed else ""))
    if _FOREIGN.search(f"{said} {output}") and is_foreign(platform):
        return cannot_be_run(platform)
    if step:
        message = f"{platform}: the step '{one_line(step, 200)}' failed: {f'{output} ({said})' if output else said}."
        if full:
            return TryAgain(message, remedy=_MORE_ROOM)
        remedy = (
            "The log has the step's whole output. Correct the Dockerfile or, if the version has none, its requirements."
        )
        if _FULL.search(output):
            remedy = _MORE_ROOM
        return BuildFailed(message, remedy=(printed.remedy if printed else "") or remedy)
    message = f"{engine} could not build {platform}: {said or 'it gave no reason'}."
    if full:
        return TryAgain(message, remedy=_MORE_ROOM)
    if _AWAY.search(said):
        return ServiceUnavailable(message, remedy="Try again when the registry answers.")
    remedy = next((remedy for pattern, remedy in _REMEDIES if pattern.search(said)), "Correct the Dockerfile.")
    return BuildFailed(message, remedy=remedy)
