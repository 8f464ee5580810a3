"""Where the servers run: in containers where there is a Docker daemon, as processes elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.docker_daemon import Daemon
from scripts.docker_daemon import docker_daemon as find_or_start
from scripts.launch import Launcher, Processes

CHOICES = ("auto", "containers", "processes")


_SHARED = pytest.StashKey[Daemon | None]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand on a daemon to a worker of pytest-xdist: one of each would be several times the memory and the start."""
    config = node.config
    if _SHARED not in config.stash:
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        config.stash[_SHARED] = stack.enter_context(find_or_start())
    daemon = config.stash[_SHARED]
    node.workerinput["docker_daemon"] = daemon and {"environ": daemon.environ, "own": daemon.own}


@pytest.fixture(scope="session")
def docker_daemon(request: pytest.FixtureRequest) -> Iterator[Daemon | None]:
    """A Docker daemon that answers; its `environ` leads Docker's own programs to it. None where there is none."""
    handed = getattr(request.config, "workerinput", {})
    if "docker_daemon" in handed:
        yield handed["docker_daemon"] and Daemon(**handed["docker_daemon"])
        return
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
