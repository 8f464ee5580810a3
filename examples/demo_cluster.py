"""`make demo-cluster`: from a tag to a prediction, in a real Kubernetes that is started for it and removed afterwards.

The manifests are those of k8s/base, installed as docs/kubernetes.md says. The listener, the Job of a version and the
published image run in the cluster; MLflow tells the listener of the tag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from builder.cluster.job import job_name
from builder.models import ModelVersion
from examples.demo import CONSOLE, FLOWERS, Demo
from examples.models import save_flower_model
from scripts import machine
from scripts.cluster import Cluster, NoCluster, start_cluster
from scripts.cluster.images import builder_archive
from scripts.cluster.install import Site, install
from scripts.demo_tools import BUILDER
from scripts.launch import Processes, free_port, running

NAMESPACE, TARGET_TAG = "builder", "EXTERNAL_TARGET_PLTR_FOUNDRY"
# What MLflow's server needs to deliver to a Pod: docs/kubernetes.md.
DELIVERS = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
CONDITION, ENDED = "{.status.conditions[-1:].type}", ("Complete", "Failed")


@contextlib.contextmanager
def servers(demo: Demo, cluster: Cluster) -> Iterator[str]:
    """Run MLflow and a registry where Pods reach them; give the registry's host."""
    address = cluster.address
    mlflow = machine.mlflow(demo.folder, free_port(address), address=address)
    mlflow = dataclasses.replace(mlflow, environ={**mlflow.environ, **DELIVERS})
    registry = demo.tools.registry(demo.folder, free_port(address), address)
    with running(Processes(), registry), running(Processes(), mlflow):
        host, uri = f"{address}:{registry.port}", f"http://{address}:{mlflow.port}"
        cluster.trust_registry(host)
        demo.environ.update(MLFLOW_TRACKING_URI=uri, REGISTRY_URL=f"{host}/models", TARGET_TAG=TARGET_TAG)
        CONSOLE.print(f"MLFLOW_TRACKING_URI={uri}\nREGISTRY_URL={host}/models")
        yield host


def follow(demo: Demo, cluster: Cluster, job: str) -> None:
    """Wait until a Job has ended, show its log, and leave if it failed."""
    ended = cluster.watch(f"job/{job}", CONDITION, ENDED, namespace=NAMESPACE, timeout=1800)
    demo.run("kubectl", "logs", f"job/{job}")
    if ended != "Complete":
        sys.exit(f"Job {job} ended with {ended}")


def listen(demo: Demo, cluster: Cluster) -> None:
    """Give the listener its secret, and have MLflow deliver to it.

    This cluster has no kube-proxy, so the address is that of a Pod and not of the Service.
    """
    demo.environ["WEBHOOK_SECRET"] = secrets.token_hex(32)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "builder-listener"}}
    data = {"WEBHOOK_SECRET": demo.environ["WEBHOOK_SECRET"]}
    cluster.create({**secret, "stringData": data}, namespace=NAMESPACE)
    demo.run("kubectl", "scale", "deployment/builder-listener", "--replicas=1")
    demo.run("kubectl", "rollout", "status", "deployment/builder-listener", "--timeout=600s")
    (pod,) = cluster.get(f"--namespace={NAMESPACE}", "pods", "--selector=app.kubernetes.io/component=listener")
    demo.run(BUILDER, "webhook", "create", f"http://{pod['status']['podIP']}:8080")


def serve(demo: Demo, cluster: Cluster, image: str) -> None:
    """Run the image as a Pod that is not root, ask for a prediction, and show that."""
    start = time.monotonic()
    context = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    container = {"name": "model", "image": image, "securityContext": context}
    container["readinessProbe"] = {"httpGet": {"path": "/ping", "port": 8080}, "periodSeconds": 1}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "flowers"},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }
    cluster.create(pod, namespace=NAMESPACE)
    ready = '{.status.conditions[?(@.type=="Ready")].status}'
    cluster.watch("pod/flowers", ready, ("True",), namespace=NAMESPACE, timeout=600)
    demo.run("kubectl", "get", "pods", "-o", "wide")
    CONSOLE.print(f"created, pulled, started and ready in {time.monotonic() - start:.1f} s", style="dim")
    address = cluster.get(f"--namespace={NAMESPACE}", "pod", "flowers")["status"]["podIP"]
    url, body = f"http://{address}:8080/invocations", json.dumps({"inputs": FLOWERS["rows"]})
    CONSOLE.print(f"$ curl -d {shlex.quote(body)} {url}", style="cyan", markup=False)
    request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        CONSOLE.print(answer.read().decode().strip(), markup=False)


def tell(demo: Demo, stack: contextlib.ExitStack) -> None:
    """The story."""
    native = machine.native_platform()
    with demo.step("Start a Kubernetes"):
        cluster = stack.enter_context(start_cluster())
        kubectl = os.pathsep.join([str(cluster.kubectl_path.parent), demo.environ["PATH"]])
        demo.environ.update(cluster.environ, KUBECONFIG=str(cluster.kubeconfig), PATH=kubectl)
        demo.run("kubectl", "get", "nodes")
    with demo.step("Start MLflow and a registry"):
        host = stack.enter_context(servers(demo, cluster))
    with demo.step("Get a base image"):
        base = demo.tools.base(host, [native])
        CONSOLE.print(f"BASE_IMAGE={base}")
    with demo.step("Build the builder image, and bring it to the node"):
        archive, image = builder_archive()
        cluster.load_image(archive)
        CONSOLE.print(image)
    with demo.step("Install: sweep and listener, not root and without a registry credential, and the template of Jobs"):
        settings = {name: demo.environ[name] for name in ("MLFLOW_TRACKING_URI", "REGISTRY_URL", "TARGET_TAG")}
        site = Site(
            image=image,
            settings={**settings, "BASE_IMAGE": base, "TARGET_PLATFORMS": native, "SMOKE_TEST": "off"},
            network={"INSECURE_REGISTRIES": host},
        )
        none = json.dumps([{"op": "replace", "path": "/spec/replicas", "value": 0}])
        patches = [{"target": {"kind": "Deployment", "name": "builder-listener"}, "patch": none}]
        install(cluster, demo.folder / "overlay", site, namespace=NAMESPACE, patches=patches)
        demo.run("kubectl", "config", "set-context", "--current", f"--namespace={NAMESPACE}")
        demo.run("kubectl", "get", "cronjobs,serviceaccounts,validatingadmissionpolicies", "-o", "name")
    with demo.step("Have MLflow tell the listener what happens to versions"):
        listen(demo, cluster)
    with demo.step("Train a model, and register it"):
        save_flower_model(demo.folder / "flower")
        version = demo.run(
            *(BUILDER, "register", "--name", "flowers", "--model", str(demo.folder / "flower")),
            *("--platforms", native, "--no-select"),
        )
    tagged = time.monotonic()
    with demo.step("Tag it: all that a data scientist does"):
        from mlflow import MlflowClient

        client = MlflowClient(demo.environ["MLFLOW_TRACKING_URI"])
        client.set_model_version_tag("flowers", version, TARGET_TAG, "true")
        CONSOLE.print(f"flowers version {version}: {TARGET_TAG}=true")
    with demo.step("The listener has made the version's Job, and that publishes"):
        name = job_name("pltr_foundry", ModelVersion(name="flowers", version=version, created_ms=0))
        cluster.kubectl(f"--namespace={NAMESPACE}", "wait", "--for=create", "--timeout=300s", f"job/{name}")
        made = time.monotonic() - tagged
        follow(demo, cluster, name)
        published = time.monotonic() - tagged
        demo.run(BUILDER, "status")
    with demo.step("Run the image as a Pod, and ask for a prediction"):
        tags = client.get_model_version("flowers", version).tags
        serve(demo, cluster, tags["publish.pltr_foundry.image"])
    CONSOLE.print(f"\nfrom the tag to the Job: {made:.1f} s, to the published image: {published:.1f} s", style="bold")


def main() -> None:
    """Run the demo, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="builder-demo-") as folder:
        demo = Demo(Path(folder))
        try:
            with contextlib.ExitStack() as stack:
                tell(demo, stack)
        except NoCluster as error:
            sys.exit(str(error))
    demo.show_times()


if __name__ == "__main__":
    main()
