"""A real Kubernetes for the tests in this folder, the servers that its Pods reach, and the builder image on its node."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.base_image import base_image as make_base_image
from scripts.cluster import Cluster, NoCluster, start_cluster, timed
from scripts.cluster.images import builder_archive
from scripts.launch import Processes, clean_environ
from tests.builder_image import ca_bundle, pip_config
from tests.servers.images import PLATFORMS
from tests.servers.mlflow import MlflowServer, run_mlflow
from tests.servers.registries import PASSWORD, USER, RegistryServer, htpasswd, run_registry

_HERE = Path(__file__).parent
_number = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that `-m cluster` has them all and `-m "not cluster"` none."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Show what is printed while a slow thing of the whole session is made."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    return capture.global_and_fixture_disabled if capture else contextlib.nullcontext


@pytest.fixture(scope="session")
def cluster(progress: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[Cluster]:
    """A cluster with one node that is ready."""
    with contextlib.ExitStack() as stack:
        try:
            with progress():
                running = stack.enter_context(start_cluster())
        except NoCluster as error:
            pytest.skip(str(error))
        yield running


@dataclass(frozen=True, kw_only=True)
class ClusterRegistries:
    """The registries that Pods and the node reach, over plain HTTP.

    Attributes:
        images: anonymous; has the base image.
        models: with a user and a password, for what is published.
        base_image: reference of a Python 3.11 base image for three platforms, in `images`.
    """

    images: RegistryServer
    models: RegistryServer
    base_image: str


@pytest.fixture(scope="session")
def cluster_registries(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRegistries]:
    """Two registries on the cluster's bridge, which the node trusts."""
    images, models = (tmp_path_factory.mktemp(name) for name in ("images", "models"))
    launcher, fields = Processes(), {"user": USER, "password": PASSWORD}
    with (
        run_registry(launcher, images, address=cluster.address) as anonymous,
        run_registry(launcher, models, address=cluster.address, auth=htpasswd(models), **fields) as private,
    ):
        for server in (anonymous, private):
            cluster.trust_registry(server.host)
        base = f"{anonymous.host}/base/python:3.11-slim"
        command = ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false"]
        command += [f"oci:{make_base_image(PLATFORMS)}", f"docker://{base}"]
        subprocess.run(command, check=True, env=clean_environ())
        yield ClusterRegistries(images=anonymous, models=private, base_image=base)


@pytest.fixture(scope="session")
def cluster_mlflow(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """MLflow with SQLite on the cluster's bridge, which hands on artifacts itself."""
    folder = tmp_path_factory.mktemp("cluster-mlflow")
    artifacts = str(folder / "artifacts")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts)
    with run_mlflow(Processes(), folder, *options, artifacts=artifacts, address=cluster.address) as server:
        yield server


@pytest.fixture(scope="session")
def node_image(cluster: Cluster, progress: Callable[[], contextlib.AbstractContextManager[None]]) -> str:
    """Name of the builder image without an engine, which is on the node: its Pods never pull it."""
    with progress():
        return _load(cluster, "scratch")


@pytest.fixture(scope="session")
def node_kaniko_image(cluster: Cluster, progress: Callable[[], contextlib.AbstractContextManager[None]]) -> str:
    """As `node_image`, with Kaniko, where KANIKO_IMAGE names its image or an archive of it."""
    kaniko = os.environ.get("KANIKO_IMAGE", "")
    if not kaniko:
        pytest.skip("KANIKO_IMAGE names no image of Kaniko, nor an archive of it")
    with progress():
        return _load(cluster, kaniko)


def _load(cluster: Cluster, kaniko: str) -> str:
    with timed("builder image"):
        archive, name = builder_archive(kaniko)
    with timed("builder image onto the node"):
        cluster.load_image(archive)
    return name


@pytest.fixture
def new_namespace(cluster: Cluster) -> Iterator[Callable[..., str]]:
    """Make a namespace with a name of its own; Pod Security enforces `level` in it. It is deleted at the end."""
    made: list[str] = []

    def make(level: str = "restricted", labels: Mapping[str, str] | None = None) -> str:
        name = f"test-{next(_number)}-{uuid.uuid4().hex[:6]}"
        labels = {"pod-security.kubernetes.io/enforce": level, **(labels or {})}
        cluster.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        made.append(name)
        # Until it has its account, no Pod is admitted.
        cluster.kubectl(f"--namespace={name}", "wait", "--for=create", "--timeout=60s", "serviceaccount/default")
        return name

    yield make
    for name in made:
        # At once: what a Pod of this test still asks of the node is not there for the next one.
        now = ("--all", "--grace-period=1", "--wait=false")
        cluster.kubectl(f"--namespace={name}", "delete", "cronjobs,jobs,pods", *now)
        cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
def namespace(new_namespace: Callable[..., str]) -> str:
    """A namespace of the test's own that admits *restricted* Pods only."""
    return new_namespace()


@pytest.fixture
def machine_network(cluster: Cluster) -> Callable[[str], dict[str, str]]:
    """Make the ConfigMap `machine-network` in a namespace: this machine's CA bundle and pip.conf, as Pods need them.

    Returns the variables that name its files, as they are when it is mounted at /kaniko/network.
    """

    def make(namespace: str) -> dict[str, str]:
        files = {"ca-bundle.pem": ca_bundle(), "pip.conf": pip_config()}
        variables = {"ca-bundle.pem": "SSL_CERT_FILE", "pip.conf": "PIP_CONFIG_FILE"}
        data = {name: path.read_text() for name, path in files.items() if path}
        if "pip.conf" in data and (bundle := ca_bundle()):
            data["pip.conf"] = data["pip.conf"].replace(str(bundle), "/kaniko/network/ca-bundle.pem")
        config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "machine-network"}, "data": data}
        cluster.create(config, namespace=namespace)
        return {variables[name]: f"/kaniko/network/{name}" for name in data}

    return make
