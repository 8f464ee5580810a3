"""MLflow servers: one that proxies artifacts, one with a file store, one with an object store."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from scripts import machine
from scripts.launch import Launcher, Program, Running, free_port, running

_BUCKET = "mlflow"
_S3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    """An MLflow server that runs.

    Attributes:
        uri: for MLFLOW_TRACKING_URI.
        artifacts: where it keeps artifacts: a folder, or an `s3://` URI.
        environ: variables that a client needs beside the tracking URI.
    """

    uri: str
    artifacts: str
    server: Running
    environ: Mapping[str, str] = field(default_factory=dict)

    def log(self) -> str:
        """Return what the server logged."""
        return self.server.log()


@contextlib.contextmanager
def run_mlflow(
    launcher: Launcher,
    folder: Path,
    *options: str,
    artifacts: str,
    environ: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
) -> Iterator[MlflowServer]:
    """Run `mlflow server` with further `options`."""
    port = free_port(address)
    program = machine.mlflow(folder, port, *options, address=address)
    program = replace(program, environ={**machine.MLFLOW_ENVIRON, **(environ or {})})
    with running(launcher, program) as server:
        yield MlflowServer(uri=f"http://{address}:{port}", artifacts=artifacts, server=server, environ=environ or {})


@pytest.fixture(scope="session")
def mlflow_server(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """MLflow with SQLite, which hands artifacts on itself."""
    folder = tmp_path_factory.mktemp("mlflow")
    artifacts = str(folder / "artifacts")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts)
    with run_mlflow(launcher, folder, *options, artifacts=artifacts) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_file_server(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """MLflow with a file store, whose clients read and write artifacts in a folder themselves."""
    folder = tmp_path_factory.mktemp("mlflow-files")
    artifacts = str(folder / "artifacts")
    options = ("--backend-store-uri", f"file://{folder}/store", "--no-serve-artifacts")
    options += ("--default-artifact-root", artifacts)
    # MLflow 3 wants to be told that a file store is meant.
    environ = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    with run_mlflow(launcher, folder, *options, artifacts=artifacts, environ=environ) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3-like object store with one bucket; gives its endpoint's URL."""
    import boto3

    port = free_port()
    program = Program(
        name=f"s3-{port}",
        kind="python",
        argv=(sys.executable, "-m", "moto.server", "-H", "{listen}", "-p", str(port)),
        port=port,
        ready=f"http://127.0.0.1:{port}/moto-api/",
        folder=tmp_path_factory.mktemp("s3"),
    )
    endpoint = f"http://127.0.0.1:{port}"
    with running(launcher, program):
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=_S3["AWS_DEFAULT_REGION"],
            aws_access_key_id=_S3["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_S3["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=_BUCKET)
        client.close()
        yield endpoint


@pytest.fixture(scope="session")
def mlflow_s3_server(
    launcher: Launcher, s3_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """MLflow with SQLite, whose clients read and write artifacts in an object store themselves."""
    folder = tmp_path_factory.mktemp("mlflow-s3")
    artifacts = f"s3://{_BUCKET}/artifacts"
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--no-serve-artifacts")
    options += ("--default-artifact-root", artifacts)
    environ = {**_S3, "MLFLOW_S3_ENDPOINT_URL": s3_server}
    with run_mlflow(launcher, folder, *options, artifacts=artifacts, environ=environ) as server:
        yield server
