"""The component k8s/smoke-test: the kubelet runs the image as a sidecar, and its answer decides about the tag."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from builder.reference import Platform
from scripts.launch import clean_environ
from scripts.machine import native_platform
from tests.cluster.site import ASLEEP
from tests.cluster.test_cluster import credential
from tests.cluster.test_manifests import overlay
from tests.patience import PATIENT
from tests.smoke.test_smoke import LISTEN
from tests.versions import MLMODEL, register
from tests.waiting import LONG_HANG

ROOT = Path(__file__).parents[2]
NATIVE = Platform.parse(native_platform())
TEMPLATE = "/spec/jobTemplate/spec/template/spec"


class Install:
    """The base with the component in a namespace of its own, for a registry that wants a password of the kubelet too."""

    def __init__(self, cluster, namespace, environ):
        self.cluster, self.namespace, self.environ = cluster, namespace, environ

    def submit(self, model, *options):
        """Run `builder submit --wait`, as a person with a kubeconfig does."""
        environ = {
            **clean_environ(**self.cluster.environ),
            "PYTHONPATH": str(ROOT),
            "KUBECONFIG": str(self.cluster.kubeconfig),
            **self.environ,
        }
        argv = [sys.executable, "-m", "builder", "submit", model.name, model.version, "--wait", *options]
        argv += ["--namespace", self.namespace]
        return subprocess.run(argv, check=False, text=True, capture_output=True, env=environ, timeout=LONG_HANG)

    def job(self):
        (job,) = self.cluster.get(f"--namespace={self.namespace}", "jobs")
        return job


@pytest.fixture
def install(cluster, node_image, cluster_mlflow, cluster_registries, new_namespace, machine_network, tmp_path):
    namespace = new_namespace()
    host = cluster_registries.models.host
    settings = {
        "MLFLOW_TRACKING_URI": cluster_mlflow.uri,
        "REGISTRY_URL": f"{host}/models",
        "BASE_IMAGE": cluster_registries.base_image,
        "TARGET_PLATFORMS": str(NATIVE),
        "SMOKE_TEST": "required",
        "SMOKE_TEST_TIMEOUT": "600",
        **PATIENT,
        "SMOKE_TEST_CANDIDATE": f"{host}/models/candidates:{namespace}",
    }
    network = {"INSECURE_REGISTRIES": f"{host},{cluster_registries.images.host}", **machine_network(namespace)}
    mounted = [
        {
            "op": "add",
            "path": f"{TEMPLATE}/volumes/-",
            "value": {"name": "net", "configMap": {"name": "machine-network"}},
        },
        {
            "op": "add",
            "path": f"{TEMPLATE}/containers/0/volumeMounts/-",
            "value": {"name": "net", "mountPath": "/kaniko/network"},
        },
    ]
    patches = [
        {"patch": yaml.safe_dump(config_map("builder-settings", settings))},
        {"patch": yaml.safe_dump(config_map("builder-network", network))},
        {"target": {"kind": "CronJob", "name": "builder-publish-wheels"}, "patch": yaml.safe_dump(mounted)},
        # A sweep would take the versions of other tests, which have this target's tag.
        {"target": {"kind": "CronJob", "name": "builder-sweep"}, "patch": ASLEEP},
    ]
    name, _, tag = node_image.rpartition(":")
    images = [{"name": "registry.example.com/builder", "newName": name, "newTag": tag}]
    site = overlay(tmp_path / "site", namespace, "base", patches=patches, images=images)
    folder = overlay(tmp_path / "smoke", namespace, site, components=["smoke-test"])
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(folder))
    push = {"type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": credential(host)}}
    cluster.create(secret("builder-registry-push", push), secret("builder-mlflow", {}), namespace=namespace)
    return Install(cluster, namespace, {name: settings[name] for name in ("MLFLOW_TRACKING_URI", "REGISTRY_URL")})


def config_map(name, data):
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "builder"}, "data": data}


def secret(name, content):
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, **content}


@pytest.fixture
def version(cluster_mlflow):
    """Register a version whose client is a program of the standard library's alone."""

    def make(client):
        files = {"mymodel/MLmodel": MLMODEL, "mymodel/requirements.txt": "six\n", "client/app.py": client}
        return register(cluster_mlflow.uri, files, {"MODEL_ENTRY_POINT": "app.py"})

    return make


LOOK = """\
import json, os, pathlib
found = [str(path) for path in pathlib.Path("/").glob("kaniko*")]
mounts = [line.split()[1] for line in open("/proc/mounts")]
found += [mount for mount in mounts if mount.startswith(("/kaniko", "/var/run/secrets"))]
publisher = ("MODEL_", "REGISTRY", "MLFLOW_TRACKING_URI", "DOCKER", "SECRETS")
names = [name for name in os.environ if name.startswith(publisher)]
status = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "NoNewPrivs"))]
print("LOOK", json.dumps([found, names, status, os.getuid()]), flush=True)
"""


def test_an_image_that_serves_is_published_and_has_nothing_of_the_publisher_s(install, version):
    model = version(LOOK + LISTEN)
    done = install.submit(model)
    assert done.returncode == 0, done.stderr
    outcome = model.outcome()
    digest = outcome["image"].partition("@")[2]
    assert outcome["smoke_test"].startswith(f"passed: {NATIVE} {digest} runs, with its port open after ")
    here = f"--namespace={install.namespace}"
    by_age = "--sort-by=.metadata.creationTimestamp"
    pod = install.cluster.get(here, "pods", "-l", "app.kubernetes.io/component=publish", by_age)[-1]
    ran = {status["name"]: status for status in pod["status"]["initContainerStatuses"]}
    assert list(ran) == ["fetch", "candidate", "smoke"]
    # It is told to end, and does not have to be killed.
    assert ran["smoke"]["state"]["terminated"]["exitCode"] == 0
    assert ran["smoke"]["restartCount"] == 0
    log = install.cluster.kubectl(here, "logs", pod["metadata"]["name"], "-c", "smoke")
    (line,) = [line for line in log.splitlines() if line.startswith("LOOK ")]
    assert json.loads(line.removeprefix("LOOK ")) == [[], [], ["0000000000000000", "1"], 10001]
    # Nothing to do: the sidecar runs nothing, and the Job ends as before.
    again = install.submit(model)
    assert again.returncode == 0, again.stderr
    assert model.outcome()["image"] == outcome["image"]


def test_an_image_that_ends_is_refused_however_soon(install, version):
    model = version("raise SystemExit(3)")
    done = install.submit(model)
    assert done.returncode == 65, done.stderr
    outcome = model.outcome()
    assert outcome["state"] == "failed"
    assert "its container ended with exit code 3 before it opened a port" in outcome["error"]
    assert "image" not in outcome
    (reason,) = {each["reason"] for each in install.job()["status"]["conditions"] if each["type"] == "Failed"}
    assert reason == "PodFailurePolicy"
