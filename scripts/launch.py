"""Start a server, wait until it answers, stop it.

A `Program` says what runs; a `Launcher` says where: as a plain process here, or in a container. Whoever uses the
server sees no difference.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

# A server answers within seconds; on two busy cores MLflow has been seen to take forty.
_READY_SECONDS = 400
_STOP_SECONDS = 10
_POLL_SECONDS = 0.1

# Every variable that the program, MLflow, boto3 or an engine would take a setting from. What describes the machine's
# network (proxies, CA bundles, package indexes) stays: the servers and the builds need it.
_AMBIENT = re.compile(
    r"(?:MLFLOW|REGISTRY|DOMINO|TARGET|BUILD|MODEL|SWEEP|KUBERNETES|LISTENER|SUBMIT|KUBE|BUILDAH|STORAGE|TRUST|ALLOWED|INSECURE)_.*"
    r"|BUILDER_(?!TEST_).*|AWS_(?!CA_BUNDLE$).*"
    r"|DOCKER_CONFIG|BASE_IMAGE|WHEEL_LAYERS|SECRETS_DIR|LOG_FORMAT|LOG_LEVEL|TERMINATION_LOG|RESOLVE_AS_OF|NO_COLOR"
)


def ambient(name: str) -> bool:
    """Return whether the variable would change what the program does, so that no test or demo may inherit it."""
    return bool(_AMBIENT.fullmatch(name))


def clean_environ(**more: str) -> dict[str, str]:
    """Return the machine's environment for a child process, without ambient settings and with `more` on top."""
    kept = {name: value for name, value in os.environ.items() if not ambient(name)}
    # A server that writes no bytecode compiles itself anew at every start.
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, **more}


class ServerDied(Exception):
    """A server ended, or never answered; its log is the message."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a server is.

    Attributes:
        name: a word for logs and containers.
        kind: which image it runs from where it runs in a container: `registry`, `registry-v3` or `python`.
        argv: the command; `{listen}` stands for the address to listen on.
        port: the port it listens on.
        address: the address it listens on.
        ready: URL that answers with anything but a 5xx when the server is up.
        folder: the folder it reads and writes.
        more_folders: others.
        environ: variables on top of the machine's.
        ca: certificate that signs the server's, where it speaks TLS.
    """

    name: str
    kind: str
    argv: tuple[str, ...]
    port: int
    ready: str
    folder: Path
    address: str = "127.0.0.1"
    more_folders: tuple[Path, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    ca: Path | None = None


class Running(Protocol):
    """A server that was started."""

    def log(self) -> str:
        """Return what the server wrote so far."""
        ...

    def alive(self) -> bool:
        """Return whether it still runs."""
        ...

    def stop(self) -> None:
        """End it, and wait for that."""
        ...


class Launcher(Protocol):
    """Starts programs.

    Attributes:
        on_this_machine: whether a program's loopback interface is the tests' own.
    """

    on_this_machine: bool

    def start(self, program: Program) -> Running:
        """Start `program`; the caller waits for it to answer, and stops it."""
        ...


class Process:
    """A server as a process of its own group, so that its workers end with it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._log = program.folder / f"{program.name}.log"
        self._log.unlink(missing_ok=True)
        self._start()

    def _start(self) -> None:
        program = self._program
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [word.replace("{listen}", program.address) for word in program.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environ(**program.environ),
                cwd=program.folder,
                start_new_session=True,
            )

    def log(self) -> str:
        """Return what the server wrote so far."""
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """Return whether it still runs."""
        return self._process.poll() is None

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stop it for a while: connections are refused. At the end it runs as before, and answers."""
        self.stop()
        try:
            yield
        finally:
            self._start()
            _wait(self, self._program)

    def stop(self) -> None:
        """End it and its workers, and wait for that."""
        for name in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, name)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
                break
        # A worker may outlive the parent that was asked to end it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Processes:
    """Starts programs as processes of this machine."""

    on_this_machine = True

    def start(self, program: Program) -> Running:
        """Start `program`; the caller waits for it to answer, and stops it."""
        return Process(program)


def _claim(port: int) -> None:
    """Keep a port from other processes that ask `free_port`.

    Raises:
        OSError: another one has it.
    """
    if sys.platform == "linux":
        with socket.socket(socket.AF_UNIX) as claim:
            claim.bind(f"\0model-image-builder/port/{port}")  # a name without a file
            # It is held by the descriptor, until this process ends.
            claim.detach()


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port of the loopback interface, or of another address of this machine, that nothing listens on.

    It is below those that the kernel gives to connections (Linux 32768 to 60999, others higher) and that Kubernetes
    gives to Services, and not one of Kubernetes' own: until the server listens on it, nobody who does not ask for this
    very port gets it. On Linux, nor does another process that asks here, until this one ends.
    """
    while True:
        port = random.randrange(11_000, 30_000)  # noqa: S311 - not a secret
        with socket.socket() as listener:
            try:
                listener.bind((address, port))
                _claim(port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


@contextlib.contextmanager
def running(launcher: Launcher, program: Program) -> Iterator[Running]:
    """Start a program, give it once it answers, stop it.

    Raises:
        ServerDied: it ended before it answered, or does not answer in time.
    """
    server = launcher.start(program)
    try:
        _wait(server, program)
        yield server
    finally:
        server.stop()


def _wait(server: Running, program: Program) -> None:
    context = ssl.create_default_context(cafile=str(program.ca)) if program.ca else None
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if not server.alive():
            message = f"{program.name} ended before it answered:\n{server.log()}"
            raise ServerDied(message)
        try:
            # A proxy of the machine is not asked for what listens on this machine.
            handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
            with urllib.request.build_opener(*handlers).open(program.ready, timeout=5):
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                return
        except OSError:
            pass
        time.sleep(_POLL_SECONDS)
    message = f"{program.name} does not answer at {program.ready}:\n{server.log()}"
    raise ServerDied(message)
