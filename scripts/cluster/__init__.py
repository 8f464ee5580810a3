"""A real Kubernetes for tests and the demo: a control plane and one node, as processes of this machine.

`start_cluster` gives one that is ready, and removes every trace of it. It needs root, and Debian's containerd, runc
and CNI plugins (scripts/setup.sh); the rest is built from Go modules (scripts/cluster/build.py). Pods, the API server
and the servers that the Pods need meet on a bridge: what listens on `Cluster.address` is reached from a Pod and from
here. The API server's own Service is the only one that works, Pods resolve names as this machine does, and nothing
enforces a NetworkPolicy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.cluster.build import programs, version
from scripts.cluster.cluster import Cluster, KubectlFailed, NoCluster
from scripts.cluster.k3s import start_k3s
from scripts.cluster.node import Node, free_node
from scripts.launch import ServerDied

__all__ = ["Cluster", "KubectlFailed", "NoCluster", "obstacle", "start_cluster", "timed"]

# Five on an idle machine.
_READY_SECONDS = 400


def obstacle() -> str:
    """Return why no cluster can run here as processes; empty where it can."""
    if os.geteuid() != 0:
        return "a cluster needs root"
    wanted = ("containerd", "ctr", "runc", "ip", "iptables", "/usr/lib/cni/bridge")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [each for each in wanted if not any(os.access(Path(p, each), os.X_OK) for p in path.split(":"))]
    return f"a cluster needs {', '.join(missing)} (scripts/setup.sh cluster)" if missing else ""


@contextlib.contextmanager
def start_cluster() -> Iterator[Cluster]:
    """Start a cluster, give it once its node is ready, and remove it; SIGTERM ends it as an interrupt does.

    What each step took is printed. Two at a time have different networks, ports and names.

    Raises:
        NoCluster: this machine cannot run one.
        ServerDied: one of its programs ended, or does not get ready; its log is the message.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            if why := obstacle():
                cluster = _k3s(stack, why)
            else:
                with timed(f"programs of Kubernetes {version()}"):
                    folder = programs()
                node = stack.enter_context(free_node(folder))
                with timed(f"Kubernetes {version()} on {node.address}, processes of this machine"):
                    cluster = _start(node)
            yield cluster
    finally:
        signal.signal(signal.SIGTERM, before)


def _k3s(stack: contextlib.ExitStack, why: str) -> Cluster:
    kubectl = shutil.which("kubectl")
    if not kubectl:
        message = f"{why}; K3s needs kubectl"
        raise NoCluster(message)
    try:
        with timed(f"K3s {version()} in a container, since {why}"):
            return stack.enter_context(start_k3s(version(), Path(kubectl)))
    # Docker's client, testcontainers and kubectl each have errors of their own.
    except Exception as error:
        message = f"{why}; K3s does not run either: {error}"
        raise NoCluster(message) from error


def _start(node: Node) -> Cluster:
    cluster = Cluster(
        folder=node.folder,
        kubectl_path=node.programs / "kubectl",
        kubeconfig=node.folder / "admin.kubeconfig",
        node=node.name,
        address=node.address,
        server=f"https://{node.address}:6443",
        ca=node.ca.path,
        environ=node.environ | {"KUBECACHEDIR": str(node.folder / "kubectl")},
    )
    users = {
        "admin": "system:masters",
        "system:kube-controller-manager": "",
        "system:kube-scheduler": "",
        f"system:node:{node.name}": "system:nodes",
    }
    for name, group in users.items():
        certificate = node.certificate(name, group)
        user = {"client-certificate": str(certificate.path), "client-key": str(certificate.key_path)}
        cluster.write_kubeconfig(name, user)
    node.start_containerd()
    node.start_api_server()
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        node.check()
        with contextlib.suppress(KubectlFailed):
            cluster.kubectl("get", "--raw=/readyz", "--request-timeout=10s", patient=False)
            break
        if time.monotonic() > deadline:
            message = f"the API server does not answer:\n{cluster.log('kube-apiserver')}"
            raise ServerDied(message)
        time.sleep(0.1)
    node.start_controllers()
    node.start_kubelet()
    wait = f"--timeout={_READY_SECONDS}s"
    try:
        for what in (f"node/{node.name}", "serviceaccount/default"):
            cluster.kubectl("wait", "--for=create", wait, what, timeout=2 * _READY_SECONDS)
        cluster.kubectl("wait", "--for=condition=Ready", wait, f"node/{node.name}", timeout=2 * _READY_SECONDS)
    except KubectlFailed as error:
        node.check()
        message = f"the node is not ready: {error}\n{cluster.log('kubelet')[-10_000:]}"
        raise ServerDied(message) from None
    return cluster


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what took how long."""
    started = time.monotonic()
    yield
    print(f"cluster: {what}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
