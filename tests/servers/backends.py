"""Where the servers run: in containers where there is a Docker daemon, as processes elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from scripts.docker_daemon import Daemon
from scripts.docker_daemon import docker_daemon as find_or_start
from scripts.launch import Launcher, Processes

CHOICES = ("auto", "containers", "processes")


@pytest.fixture(scope="session")
def docker_daemon() -> Iterator[Daemon | None]:
    """A Docker daemon that answers; its `environ` leads Docker's own programs to it. None where there is none."""
    with find_or_start() as daemon:
        yield daemon


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """What starts servers; BUILDER_TEST_SERVERS is `containers`, `processes`, or `auto` for what this machine can."""
    choice = os.environ.get("BUILDER_TEST_SERVERS", "auto")
    if choice not in CHOICES:
        pytest.exit(f"BUILDER_TEST_SERVERS is {choice!r}; it should be one of {', '.join(CHOICES)}", returncode=4)
    daemon = None if choice == "processes" else request.getfixturevalue("docker_daemon")
    if daemon is None and choice == "containers":
        pytest.exit(
            "BUILDER_TEST_SERVERS is 'containers', but no Docker daemon answers or can be started", returncode=4
        )
    if daemon is None:
        return Processes()
    from scripts.containers import Containers

    return Containers(daemon)
