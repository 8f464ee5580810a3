"""Where the servers run: in containers where there is a Docker daemon, as processes elsewhere."""

from __future__ import annotations

import pytest

from scripts.launch import Launcher, Processes


@pytest.fixture(scope="session")
def launcher() -> Launcher:
    """What starts servers."""
    return Processes()
