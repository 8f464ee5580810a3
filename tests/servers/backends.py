"""Where the servers run: in containers where there is a Docker daemon, as processes elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from scripts.launch import Launcher, Processes

CHOICES = ("auto", "containers", "processes")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """What starts servers; BUILDER_TEST_SERVERS is `containers`, `processes`, or `auto` for what this machine can."""
    choice = os.environ.get("BUILDER_TEST_SERVERS", "auto")
    if choice not in CHOICES:
        pytest.exit(f"BUILDER_TEST_SERVERS is {choice!r}; it should be one of {', '.join(CHOICES)}", returncode=4)
    if choice == "processes":
        yield Processes()
        return
    from scripts.containers import Containers
    from scripts.docker_daemon import docker_daemon

    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(docker_daemon())
        if daemon is None and choice == "containers":
            pytest.exit("BUILDER_TEST_SERVERS is 'containers', but no Docker daemon answers or can be started")
        yield Processes() if daemon is None else Containers(daemon)
