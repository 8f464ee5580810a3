"""Containers of images that were published: by Docker where a daemon answers, else by what runs without one."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from scripts import machine
from scripts.cache import cache_folder, locked
from scripts.docker_daemon import Daemon

_number = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container that runs.

    Attributes:
        tool: podman or docker.
        name: of the container.
        environ: of the tool.
    """

    tool: str
    name: str
    environ: dict[str, str] = field(repr=False)

    def python(self, program: str, *arguments: str) -> str:
        """Run a Python program with the image's own interpreter, and return what it prints."""
        command = [self.tool, "exec", "--interactive", self.name, "python", "-", *arguments]
        done = subprocess.run(command, check=False, text=True, capture_output=True, input=program, env=self.environ)
        if done.returncode:
            message = f"the program ended with {done.returncode}:\n{done.stderr}\n{self.log()}"
            raise AssertionError(message)
        return done.stdout

    def log(self) -> str:
        """Return what the container printed."""
        done = subprocess.run(
            [self.tool, "logs", self.name],
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environ,
        )
        return done.stdout


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs containers here.

    Attributes:
        runner: the beginning of a command line.
        environ: of the tool.
    """

    runner: Sequence[str]
    environ: dict[str, str] = field(repr=False)

    def output(self, reference: object, *command: str, options: Sequence[str] = ()) -> str:
        """Run an image to its end, without a network, and return what it prints."""
        line = [*self.runner, "--rm", "--network=none", *self._trust, *options, str(reference), *command]
        done = subprocess.run(line, check=False, text=True, capture_output=True, env=self.environ)
        if done.returncode:
            message = f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
            raise AssertionError(message)
        return done.stdout

    @contextlib.contextmanager
    def started(self, reference: object) -> Iterator[Container]:
        """Run an image, without a network; what is asked of it is asked from inside."""
        name = f"test-{os.getpid()}-{next(_number)}"
        line = [*self.runner, "--detach", "--name", name, "--network=none", *self._trust, str(reference)]
        done = subprocess.run(line, check=False, text=True, capture_output=True, env=self.environ)
        assert not done.returncode, done.stderr
        try:
            yield Container(tool=self.runner[0], name=name, environ=self.environ)
        finally:
            # A program that is a container's first process ignores what asks it to end.
            subprocess.run(
                [self.runner[0], "rm", "--force", "--volumes", name],
                check=False,
                capture_output=True,
                env=self.environ,
            )

    @property
    def _trust(self) -> list[str]:
        return ["--tls-verify=false"] if self.runner[0] == "podman" else []


@pytest.fixture(scope="session")
def podman(base_image: str) -> Runtime:
    """Podman, in the way that works here; the test is skipped where none does."""
    failed = ""
    for runner in machine.container_runners():
        if runner[0] == "podman":
            found = Runtime(runner=runner, environ=dict(os.environ))
            try:
                found.output(base_image, "true")
            except AssertionError as error:
                failed = str(error)
                continue
            return found
    pytest.skip(f"podman runs no container here: {failed or 'it is not installed'}")


@pytest.fixture
def alone_with_smoke_tests() -> Iterator[None]:
    """Let no other process's tests run smoke tests: the storage is the machine's, and what they leave is counted."""
    with locked(cache_folder("containers") / "smoke"):
        yield


@pytest.fixture(scope="session")
def runtime(docker_daemon: Daemon | None, request: pytest.FixtureRequest) -> Runtime:
    """What runs containers here, the quicker first."""
    if docker_daemon is not None:
        return Runtime(runner=["docker", "run"], environ={**os.environ, **docker_daemon.environ})
    found: Runtime = request.getfixturevalue("podman")
    return found
