"""A real Kubernetes for the tests in this folder, the servers that its Pods reach, and the builder image on its node."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from scripts.base_image import base_image as make_base_image
from scripts.cluster import Cluster, NoCluster, start_cluster, timed
from scripts.cluster.images import builder_archive
from scripts.cluster.install import Site as Values
from scripts.cluster.install import install as install_site
from scripts.launch import Processes, clean_environ
from scripts.machine import ca_bundle, pip_config
from tests.cluster.site import ASLEEP, Site, pump_files, register_pump, small_requests, wait_for_templates
from tests.patience import PATIENT
from tests.servers.images import PLATFORMS
from tests.servers.mlflow import MlflowServer, run_mlflow
from tests.servers.registries import PASSWORD, USER, RegistryServer, htpasswd, run_registry
from tests.versions import Registered
from tests.waiting import HANG

_HERE = Path(__file__).parent
_number = itertools.count(1)
_NONE = '[{{"op": "replace", "path": "/spec/replicas", "value": {}}}]'


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
    environ = {
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(),
        # A delivery is lost for good when a busy machine has let all of its tries pass.
        "MLFLOW_WEBHOOK_REQUEST_TIMEOUT": "60",
        "MLFLOW_WEBHOOK_REQUEST_MAX_RETRIES": "5",
        # A webhook of the last test is forgotten at once.
        "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    }
    with run_mlflow(
        Processes(), folder, *options, artifacts=artifacts, address=cluster.address, environ=environ
    ) as server:
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
        cluster.kubectl(
            f"--namespace={name}", "wait", "--for=create", f"--timeout={HANG:.0f}s", "serviceaccount/default"
        )
        return name

    yield make
    _delete(cluster, made)


def _delete(cluster: Cluster, namespaces: Sequence[str]) -> None:
    """Delete namespaces, and what runs in them at once: the next test wants the node for itself."""
    for name in namespaces:
        now = ("--all", "--grace-period=1", "--wait=false")
        # Each before what it would make again.
        cluster.kubectl(f"--namespace={name}", "delete", "deployments,replicasets,cronjobs,jobs,pods", *now)
        cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def namespace(new_namespace: Callable[..., str]) -> str:
    """A namespace of the test's own that admits *restricted* Pods only."""
    return new_namespace()


@pytest.fixture
def install(
    cluster: Cluster,
    node_image: str,
    cluster_mlflow: MlflowServer,
    cluster_registries: ClusterRegistries,
    tmp_path: Path,
) -> Iterator[Callable[..., str]]:
    """Install an overlay of k8s/ (`base`) in a namespace of its own, and return that; all it makes there is deleted.

    It knows the cluster's MLflow and registries. Its sweep does not start by itself, and it has no listener unless
    `listeners` says how many. TARGET_TAG and the repository of
    its images are its own, unless `settings` say otherwise: what other tests registered is not published.
    """
    with _installing(cluster, node_image, cluster_mlflow, cluster_registries, tmp_path) as run:
        yield run


@pytest.fixture(scope="module")
def install_for_all(
    cluster: Cluster,
    node_image: str,
    cluster_mlflow: MlflowServer,
    cluster_registries: ClusterRegistries,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., str]]:
    """As `install`, for the tests of a module."""
    folder = tmp_path_factory.mktemp("install")
    with _installing(cluster, node_image, cluster_mlflow, cluster_registries, folder) as run:
        yield run


@contextlib.contextmanager
def _installing(
    cluster: Cluster, node_image: str, mlflow: MlflowServer, registries: ClusterRegistries, tmp_path: Path
) -> Iterator[Callable[..., str]]:
    made: list[str] = []

    def run(
        overlay: str = "base",
        *,
        settings: Mapping[str, str] | None = None,
        network: Mapping[str, str] | None = None,
        image: str = node_image,
        patches: Sequence[Mapping[str, object]] = (),
        listeners: int = 0,
        components: Sequence[str] = (),
    ) -> str:
        name = f"test-{next(_number)}-{uuid.uuid4().hex[:6]}"
        models, images = registries.models, registries.images
        site = Values(
            image=image,
            settings={
                "MLFLOW_TRACKING_URI": mlflow.uri,
                "REGISTRY_URL": f"{models.host}/{name}",
                "TARGET_TAG": f"EXTERNAL_TARGET_{name.upper().replace('-', '_')}",
                "BASE_IMAGE": registries.base_image,
                "SMOKE_TEST": "off",
                **PATIENT,
                **(settings or {}),
            },
            network={"INSECURE_REGISTRIES": f"{models.host},{images.host}", **(network or {})},
            user=models.user,
            password=models.password,
        )
        asleep = {"target": {"kind": "CronJob", "name": "builder-sweep"}, "patch": ASLEEP}
        alone = {"target": {"kind": "Deployment", "name": "builder-listener"}, "patch": _NONE.format(listeners)}
        made.append(name)
        more = {"patches": [asleep, alone, *patches], "components": components}
        install_site(cluster, tmp_path / name, site, namespace=name, overlay=overlay, **more)
        wait_for_templates(cluster, name)
        return name

    try:
        yield run
    finally:
        _delete(cluster, made)


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


@pytest.fixture(scope="session")
def pump(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the pump alarm, whose image is small."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pump_files(tmp_path_factory.mktemp("pump"))


@pytest.fixture
def new_pump(cluster_mlflow: MlflowServer, pump: Mapping[str, bytes]) -> Callable[..., Registered]:
    """Register a version of a model with a name of its own; files and tags may be added."""

    def make(files: Mapping[str, str | bytes] | None = None, *, name: str = "", **tags: str) -> Registered:
        return register_pump(
            cluster_mlflow.uri, {**pump, **(files or {})}, name or f"pump-{uuid.uuid4().hex[:8]}", **tags
        )

    return make


@pytest.fixture
def new_site(
    cluster: Cluster,
    install: Callable[..., str],
    cluster_mlflow: MlflowServer,
    cluster_registries: ClusterRegistries,
    tmp_path: Path,
) -> Callable[..., Site]:
    """Install an overlay as `install` does, and give a `builder` outside the cluster the same settings."""
    return partial(_site, cluster, install, cluster_mlflow, cluster_registries, tmp_path)


@pytest.fixture(scope="module")
def new_site_for_all(
    cluster: Cluster,
    install_for_all: Callable[..., str],
    cluster_mlflow: MlflowServer,
    cluster_registries: ClusterRegistries,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Site]:
    """As `new_site`, for the tests of a module."""
    folder = tmp_path_factory.mktemp("site")
    return partial(_site, cluster, install_for_all, cluster_mlflow, cluster_registries, folder)


def _site(
    cluster: Cluster,
    install: Callable[..., str],
    mlflow: MlflowServer,
    registries: ClusterRegistries,
    folder: Path,
    overlay: str = "base",
    **options: Any,
) -> Site:
    patches = [*small_requests(overlay), *options.pop("patches", ())]
    namespace = install(overlay, patches=patches, **options)
    maps = cluster.get(f"--namespace={namespace}", "configmaps", "-l", "app.kubernetes.io/name=builder")
    data = {each["metadata"]["name"]: each["data"] for each in maps}
    outside = {
        "INSECURE_REGISTRIES": data["builder-network"]["INSECURE_REGISTRIES"],
        "KUBECONFIG": str(cluster.kubeconfig),
        "LOG_FORMAT": "text",
        "NO_COLOR": "1",
        "NO_PROXY": f"{cluster.address},127.0.0.1",
    }
    return Site(
        cluster=cluster,
        namespace=namespace,
        mlflow=mlflow.uri,
        registry=registries.models.host,
        overlay=folder / namespace,
        environ={**data["builder-settings"], **outside},
    )


@pytest.fixture
def site(new_site: Callable[..., Site]) -> Site:
    """The base, installed."""
    return new_site()
