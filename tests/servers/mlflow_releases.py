"""MLflow servers of earlier releases, which take what the newest one refuses at registration."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import machine
from scripts.cache import cache_folder, locked
from scripts.launch import Processes, free_port, running
from tests.servers.mlflow import MlflowServer

RELEASES = ("3.4.0", "2.22.0")
# What these releases would take, and do not run with.
_BOUNDS = ("sqlalchemy<2.1",)


def release(version: str) -> Path:
    """Return the Python that has a release of MLflow, installed where it is not yet in the cache (some seconds)."""
    folder = cache_folder("mlflow") / f"{version}-{sys.version_info[0]}.{sys.version_info[1]}"
    uv = str(Path(sys.executable).with_name("uv"))
    with locked(folder):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                subprocess.run(
                    [uv, "venv", "--quiet", "--relocatable", "--python", sys.executable, f"{made}/venv"], check=True
                )
                install = [
                    uv,
                    "pip",
                    "install",
                    "--quiet",
                    "--python",
                    f"{made}/venv/bin/python",
                    f"mlflow=={version}",
                    *_BOUNDS,
                ]
                subprocess.run(install, check=True)
                (Path(made) / "venv").rename(folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="session", params=RELEASES)
def earlier_mlflow_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """An MLflow server of an earlier release with SQLite, which hands artifacts on itself."""
    folder = tmp_path_factory.mktemp(f"mlflow-{request.param}")
    port = free_port()
    program = machine.mlflow(folder, port)
    argv = (str(release(request.param)), *program.argv[1:])
    with running(Processes(), replace(program, argv=argv, environ=machine.MLFLOW_ENVIRON)) as server:
        yield MlflowServer(uri=f"http://127.0.0.1:{port}", artifacts=str(folder / "artifacts"), server=server)
