"""The cluster of the tests itself: its node runs Pods, its API server admits what is safe, and an image predicts."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from examples.models import HERE, save_pump_model
from scripts.cluster import KubectlFailed
from scripts.cluster.node import Node, free_node
from scripts.machine import native_platform
from tests.cluster.site import answer
from tests.servers.registries import PASSWORD, USER
from tests.versions import register
from tests.waiting import until

ENDED = ("Succeeded", "Failed")
RESTRICTED = {
    "runAsNonRoot": True,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def pod(name, image, *arguments, user=65532, **container):
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": user, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {"name": "it", "image": image, "args": list(arguments), "securityContext": RESTRICTED, **container}
        ],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def test_the_node_is_ready(cluster):
    (node,) = cluster.get("nodes")
    conditions = {condition["type"]: condition["status"] for condition in node["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    assert (
        node["status"]["nodeInfo"]["kubeletVersion"]
        == json.loads(cluster.kubectl("get", "--raw=/version"))["gitVersion"]
    )


def test_a_restricted_pod_runs_the_builder(cluster, namespace, node_image):
    cluster.create(pod("help", node_image, "--help"), namespace=namespace)
    assert cluster.watch("pod/help", "{.status.phase}", ENDED, namespace=namespace) == "Succeeded"
    assert "Usage: builder" in cluster.kubectl(f"--namespace={namespace}", "logs", "help")


def test_a_privileged_pod_is_refused(cluster, namespace, node_image):
    privileged = pod("root", node_image, securityContext={"privileged": True})
    with pytest.raises(KubectlFailed, match=r"violates PodSecurity \"restricted"):
        cluster.create(privileged, namespace=namespace)


def test_an_account_may_do_what_its_role_says_and_nothing_else(cluster, namespace):
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "reader"}}
    cluster.create(account, namespace=namespace)
    here = f"--namespace={namespace}"
    cluster.kubectl(here, "create", "role", "reader", "--verb=list", "--resource=pods")
    cluster.kubectl(here, "create", "rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader")
    kubeconfig = cluster.account_kubeconfig(namespace, "reader")

    def listed() -> bool:
        # The authorizer learns of a binding by watching.
        with contextlib.suppress(KubectlFailed):
            cluster.kubectl("get", "pods", kubeconfig=kubeconfig)
            return True
        return False

    until(listed)
    with pytest.raises(KubectlFailed, match=r"cannot list resource .secrets."):
        cluster.kubectl("get", "secrets", kubeconfig=kubeconfig)
    user = f"system:serviceaccount:{namespace}:reader"
    requests = [each for each in cluster.requests() if each["user"]["username"] == user]
    seen = {(each["verb"], each["objectRef"]["resource"], each["responseStatus"]["code"]) for each in requests}
    assert seen >= {("list", "pods", 200), ("list", "secrets", 403)}


def test_a_server_that_was_away_is_back(cluster, cluster_mlflow):
    def health():
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{cluster_mlflow.uri}/health"
        ) as answer:
            return answer.status

    with cluster_mlflow.server.away(), pytest.raises(urllib.error.URLError, match="refused"):
        health()
    assert health() == 200


def test_a_cluster_that_was_killed_is_cleared_away_by_the_next_one(cluster):
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.cluster", "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            printed = process.stdout.readline()
        finally:
            process.kill()
        assert printed.startswith("export KUBECONFIG="), process.stderr.read()
    folder = Path(printed.strip().partition("=")[2]).parent
    assert folder != cluster.folder
    left = Node(number=int(folder.name), programs=cluster.kubectl_path.parent, folder=folder)
    assert "kubelet" in left.processes().values()
    with free_node(cluster.kubectl_path.parent, [left.number]) as node:
        assert node.processes() == {}
        assert not list(folder.iterdir())
    assert not folder.exists()
    devices = subprocess.run(["ip", "-brief", "link"], check=True, capture_output=True, text=True).stdout
    assert cluster.node in devices
    assert node.name not in devices


LOOK = """
import ssl, sys, urllib.error, urllib.request
context = ssl._create_unverified_context()
for url in sys.argv[1:]:
    try:
        print(urllib.request.urlopen(url, timeout=300, context=context).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_a_pod_without_a_token_reaches_the_api_server_and_the_kubelet_and_is_nobody_there(
    cluster, namespace, node_image
):
    urls = ["https://$(KUBERNETES_SERVICE_HOST)/api/v1/namespaces", f"https://{cluster.address}:10250/pods"]
    python = ["/kaniko/venv/bin/python3", "-I", "-c", LOOK, *urls]
    service = cluster.get("service", "kubernetes")["spec"]["clusterIP"]
    env = [{"name": "KUBERNETES_SERVICE_HOST", "value": service}]
    cluster.create(pod("look", node_image, command=python, env=env), namespace=namespace)
    assert cluster.watch("pod/look", "{.status.phase}", ENDED, namespace=namespace) == "Succeeded"
    assert cluster.kubectl(f"--namespace={namespace}", "logs", "look") == "403\n401\n"


def credential(host):
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return json.dumps({"auths": {host: {"auth": auth}}})


@pytest.fixture
def pump_version(cluster_mlflow, tmp_path):
    """A version of the pump alarm, whose server needs one small wheel."""
    save_pump_model(tmp_path / "mymodel")
    shutil.copytree(HERE / "pump_alarm" / "client", tmp_path / "client")
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    tags = {"MODEL_ENTRY_POINT": "serve.py", "MODEL_PLATFORMS": native_platform()}
    return register(cluster_mlflow.uri, files, tags, name=f"pump-{tmp_path.name}")


@pytest.mark.filterwarnings("ignore:.*type hint:UserWarning")
def test_an_installed_sweep_makes_the_job_that_publishes(cluster, install, pump_version):
    namespace = install()
    here = f"--namespace={namespace}"
    pump_version.set_tag(f"EXTERNAL_TARGET_{namespace.upper().replace('-', '_')}", "true")
    cluster.kubectl(here, "create", "job", "--from=cronjob/builder-sweep", "now")
    conditions, ended = "{.status.conditions[-1:].type}", ("Complete", "Failed")
    assert cluster.watch("job/now", conditions, ended, namespace=namespace) == "Complete"
    (job,) = cluster.get(here, "jobs", "--selector=builder/method=wheels")
    name = f"job/{job['metadata']['name']}"
    assert cluster.watch(name, conditions, ended, namespace=namespace) == "Complete"
    outcome = pump_version.outcome(namespace.replace("-", "_"))
    assert outcome["state"] == "published"
    assert outcome["image"] in cluster.kubectl(
        here, "logs", "--tail=-1", f"--selector=batch.kubernetes.io/job-name={name[4:]}"
    )


# MLflow's, about the example's own annotations.
@pytest.mark.filterwarnings("ignore:.*type hint:UserWarning")
def test_a_job_publishes_and_the_image_predicts_in_a_pod(
    cluster, namespace, node_image, cluster_mlflow, cluster_registries, machine_network, pump_version
):
    host, here = cluster_registries.models.host, f"--namespace={namespace}"
    environ = {
        "MODEL_NAME": pump_version.name,
        "MODEL_VERSION": pump_version.version,
        "MLFLOW_TRACKING_URI": cluster_mlflow.uri,
        "REGISTRY_URL": f"{host}/models",
        "INSECURE_REGISTRIES": f"{host},{cluster_registries.images.host}",
        "BASE_IMAGE": cluster_registries.base_image,
        "DOCKER_CONFIG": "/kaniko/credentials/registry",
        **machine_network(namespace),
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "push"},
        "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson": credential(host)},
    }
    mounts = {"workspace": "/kaniko/workspace", "scratch": "/kaniko/tmp"}
    mounts |= {"network": "/kaniko/network", "push": "/kaniko/credentials/registry"}
    template = pod(
        "publish",
        node_image,
        "publish",
        env=[{"name": name, "value": value} for name, value in environ.items()],
        volumeMounts=[{"name": name, "mountPath": path} for name, path in mounts.items()],
    )
    template["spec"]["securityContext"]["fsGroup"] = 65532
    template["spec"]["volumes"] = [
        {"name": "workspace", "emptyDir": {}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "network", "configMap": {"name": "machine-network"}},
        {
            "name": "push",
            "secret": {"secretName": "push", "items": [{"key": ".dockerconfigjson", "path": "config.json"}]},
        },
    ]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "publish"},
        "spec": {"backoffLimit": 0, "template": {"spec": template["spec"]}},
    }
    cluster.create(secret, job, namespace=namespace)
    ended = cluster.watch("job/publish", "{.status.conditions[-1:].type}", ("Complete", "Failed"), namespace=namespace)
    assert ended == "Complete", cluster.kubectl(here, "logs", "job/publish")
    image = pump_version.outcome()["image"]
    assert image in cluster.kubectl(here, "logs", "job/publish")

    assert answer(cluster, namespace, image, pull_secret="push")
    cluster.remove_image(image)
