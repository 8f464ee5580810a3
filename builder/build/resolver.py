"""What both resolvers share: a question, a private folder for it, a child process, and what its end means."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from builder.build.indexes import Indexes
from builder.build.process import Limits, Runner
from builder.build.requirements import Requirements
from builder.errors import (
    BuilderError,
    BuildFailed,
    InvalidSettings,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    one_line,
)
from builder.log import MASK, get_logger, masked
from builder.reference import Platform

_log = get_logger("lock")
CREDENTIAL = "Put the credential into the index's address (PIP_INDEX_URL, UV_INDEX, pip.conf) or into netrc."
_MOST_LINES = 200
# uv takes 300 MB for what MLflow, scikit-learn, pandas and xgboost require, and some seconds.
_LIMITS = Limits(memory=2 << 30, processor=600)
_NO_MEMORY = re.compile(r"^memory allocation of [0-9]+ bytes failed|^(?:ERROR: )?MemoryError", re.MULTILINE)
_CERTIFICATE = re.compile(r"invalid peer certificate|certificate[ _]verify[ _]failed", re.IGNORECASE)
_REFUSED = re.compile(r"\b40[13] (?:Unauthorized|Forbidden|Client Error)|valid authentication credentials")
_AWAY = re.compile(
    r"error sending request|connection (?:refused|reset|timed out)|dns error|timed out|status server error|"
    r"\b(?:429|50[0-9])\b.*(?:error|unavailable|gateway|too many)|temporary failure in name resolution|"
    r"NewConnectionError|ConnectTimeout|ReadTimeout|Max retries exceeded|Request failed after",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device|disk quota exceeded|os error 28", re.IGNORECASE)


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
    """

    requirements: Requirements
    model: Path
    platform: Platform
    python: str
    glibc: tuple[int, int] | None
    as_of: datetime | None
    timeless: frozenset[str] = frozenset()

    def requirement_lines(self) -> list[str]:
        """Return the requirements as both resolvers read them, the model's own wheels by their paths."""
        return [
            one.text((self.model / one.path).absolute().as_uri() if one.path else "")
            for one in self.requirements.required
        ]

    def constraint_lines(self) -> list[str]:
        """Return the constraints."""
        return [one.text() for one in self.requirements.constraints]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """How the resolvers' processes are run.

    Attributes:
        indexes: who is asked, with which credential.
        runner: runs a program.
        cache: folder that metadata is kept in; None for none.
        timeout: seconds for one run.
    """

    indexes: Indexes
    runner: Runner
    cache: Path | None
    timeout: float


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

    def output(line: str) -> None:
        clean = _clean(line, tool.indexes)
        _log.debug("resolver", tool=name, line=clean)
        if len(said) < _MOST_LINES:
            said.append(clean)

    proxies = {key: value for name_, value in tool.indexes.proxies.items() for key in (name_, name_.lower())}
    netrc = {"NETRC": str(tool.indexes.netrc)} if tool.indexes.netrc else {}
    common = {"PATH": os.defpath, "HOME": str(folder), "TMPDIR": str(folder), "NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    try:
        code = tool.runner(
            argv,
            env={**common, **proxies, **netrc, **env},
            cwd=folder,
            timeout=tool.timeout,
            output=output,
            name=name,
            limits=_LIMITS,
        )
    except BuildFailed as error:
        remedy = "Raise BUILD_TIMEOUT, or see that the package index answers." if "longer" in error.what else ""
        raise BuildFailed(error.what, remedy=remedy or "Install the builder with all its dependencies.") from error
    text = "\n".join(said)
    _check_limits(name, code, text)
    return code, text


def _check_limits(name: str, code: int, said: str) -> None:
    """Raise BuildFailed if a resolver was ended by its limits."""
    if code == -signal.SIGXCPU:
        why = f"it took more than {_LIMITS.processor} seconds of processor time"
    elif code and _NO_MEMORY.search(said):
        why = f"it took more than {_LIMITS.memory >> 20} MiB of memory"
    else:
        return
    message = f"{name} could not resolve the requirements: {why}."
    raise BuildFailed(message, remedy="Pin more of the model's requirements, so that there is less to try.")


def _clean(line: str, indexes: Indexes) -> str:
    line = masked(line)
    for secret in indexes.secrets:
        line = line.replace(secret, MASK)
    return line


def failure(name: str, code: int, said: str) -> BuilderError:
    """Return the error for a run that failed for another reason than its requirements.

    Args:
        name: what messages call the resolver.
        code: its exit code.
        said: what it said.
    """
    told = one_line(re.sub(r"(?m)^\s*(?:cause:|hint:|ERROR:)\s*", "", said), 700) or "it did not say why"
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


def is_refusal(said: str) -> bool:
    """Return whether an index wants a credential: a resolver goes on as if it did not have the package."""
    return bool(_REFUSED.search(said))


def interpreter() -> str:
    """Return this interpreter's path."""
    return sys.executable
