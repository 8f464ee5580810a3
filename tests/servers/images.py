"""A small Python base image, and the independent judge of what was pushed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from scripts.base_image import base_image as make_base_image
from scripts.go_tools import tool
from scripts.launch import clean_environ
from tests.servers.registries import RegistryServer

PLATFORMS = ("linux/amd64", "linux/arm64", "linux/arm/v7")


@pytest.fixture(scope="session")
def base_image(registry: RegistryServer) -> str:
    """Reference of a Python 3.11 base image for three platforms, in `registry`."""
    layout = make_base_image(PLATFORMS)
    reference = f"{registry.host}/base/python:3.11-slim"
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{reference}"],
        check=True,
        env=clean_environ(),
    )
    return reference


@pytest.fixture(scope="session")
def crane() -> Callable[..., str]:
    """Run crane, the command of go-containerregistry; gives what it prints, raises where it fails."""
    path = tool("crane")

    def run(*arguments: str, environ: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            [str(path), *arguments],
            check=False,
            text=True,
            capture_output=True,
            env=clean_environ(**(environ or {})),
        )
        if done.returncode:
            message = f"crane {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}"
            raise AssertionError(message)
        return done.stdout

    return run
