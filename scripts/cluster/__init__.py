"""A real Kubernetes for tests and the demo: a control plane and one node, as processes of this machine.

`start_cluster` gives one that is ready, and removes every trace of it. It needs root, and Debian's containerd, runc
and CNI plugins (scripts/setup.sh); the rest is built from Go modules (scripts/cluster/build.py). Pods, the API server
and the servers that the Pods need meet on a bridge: what listens on `Cluster.address` is reached from a Pod and from
here. The API server's own Service is the only one that works, Pods resolve names as this machine does, and nothing
enforces a NetworkPolicy.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.cluster.build import programs, version
from scripts.cluster.node import Node, free_node
from scripts.launch import clean_environ

_READY_SECONDS = 180


class NoCluster(Exception):
    """No cluster can run on this machine; the message says why."""


class KubectlFailed(Exception):
    """A command of kubectl failed; what it printed is the message."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        folder: of everything that it writes; gone with it.
        programs: the folder of its programs.
        kubeconfig: its administrator's.
        node: the name of its only node.
        address: the IP address where Pods reach servers that this machine runs, and the API server's.
        subnet: of the Pods.
        server: the API server's URL.
        ca: the certificate of its authority.
        environ: variables for its clients.
    """

    folder: Path
    programs: Path
    kubeconfig: Path
    node: str
    address: str
    subnet: str
    server: str
    ca: Path
    environ: Mapping[str, str]

    def kubectl(
        self,
        *arguments: str,
        documents: Sequence[Mapping[str, Any]] = (),
        kubeconfig: Path | None = None,
        timeout: float = 300,
    ) -> str:
        """Run kubectl, and return what it prints.

        Args:
            arguments: its own.
            documents: objects for its stdin, where `arguments` have `-f -`.
            kubeconfig: another user's; the administrator's where it is None.
            timeout: seconds after which it hangs.

        Raises:
            KubectlFailed: with what it printed to stderr.
        """
        done = subprocess.run(
            [str(self.programs / "kubectl"), f"--kubeconfig={kubeconfig or self.kubeconfig}", *arguments],
            input=yaml.safe_dump_all(documents) if documents else "",
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=clean_environ(**self.environ),
        )
        if done.returncode:
            message = f"kubectl {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            raise KubectlFailed(message)
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """Return what `kubectl get … -o json` prints: an object, or the `items` of a list."""
        found = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found["items"] if found["kind"] == "List" else found

    def create(self, *documents: Mapping[str, Any], namespace: str = "default") -> list[str]:
        """Create objects, and return their names as `kind/name`."""
        printed = self.kubectl(f"--namespace={namespace}", "create", "-f", "-", "-o", "name", documents=documents)
        return printed.split()

    def watch(
        self, name: str, jsonpath: str, until: Collection[str], *, namespace: str = "default", timeout: float = 300
    ) -> str:
        """Follow an object until an expression of it has one of some values, and return that value.

        Args:
            name: of the object, as `job/publish-x`.
            jsonpath: the expression, as `{.status.phase}`.
            until: the values.
            namespace: of the object.
            timeout: seconds after which it hangs.

        Raises:
            KubectlFailed: the object is not there, or no such value came in time.
        """
        command = [str(self.programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", f"--namespace={namespace}"]
        command += ["get", name, "--watch", "-o", f'jsonpath={jsonpath}{{"\\n"}}']
        value = ""
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environ(**self.environ)
        ) as process:
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            try:
                for line in process.stdout or ():
                    value = line.strip()
                    if value in until:
                        return value
                said = process.stderr.read() if process.stderr else ""
            finally:
                timer.cancel()
                process.kill()
        message = f"{jsonpath} of {name} is {value!r} and became none of {', '.join(until)}: {said}"
        raise KubectlFailed(message)

    def account_kubeconfig(self, namespace: str, account: str) -> Path:
        """Return a kubeconfig with a token of a service account, for an hour, from the TokenRequest API."""
        token = self.kubectl(f"--namespace={namespace}", "create", "token", account).strip()
        return self.write_kubeconfig(f"{namespace}-{account}", {"token": token}, namespace=namespace)

    def write_kubeconfig(self, name: str, user: Mapping[str, str], namespace: str = "default") -> Path:
        """Write a kubeconfig for a user of the API server, and return its path."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "it", "cluster": {"server": self.server, "certificate-authority": str(self.ca)}}],
            "users": [{"name": "it", "user": dict(user)}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it", "namespace": namespace}}],
            "current-context": "it",
        }
        path = self.folder / f"{name.replace(':', '-')}.kubeconfig"
        path.write_text(yaml.safe_dump(document))
        path.chmod(0o600)
        return path

    def load_image(self, archive: Path) -> None:
        """Put the images of an archive onto the node, under the names that stand in it."""
        self.ctr("images", "import", str(archive))

    def remove_image(self, name: str) -> None:
        """Remove an image from the node."""
        self.ctr("images", "rm", "--sync", name)

    def ctr(self, *arguments: str) -> str:
        """Run containerd's own command for the node's containers and images, and return what it prints."""
        command = ["ctr", f"--address={self.folder / 'ctr' / 'containerd.sock'}", "--namespace=k8s.io", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def trust_registry(self, host: str) -> None:
        """Let the node pull from a registry at `ADDRESS:PORT` over plain HTTP; at once, without a restart."""
        folder = self.folder / "certs.d" / host
        folder.mkdir(parents=True, exist_ok=True)
        text = f'server = "http://{host}"\n[host."http://{host}"]\n  capabilities = ["pull", "resolve"]\n'
        (folder / "hosts.toml").write_text(text)

    def log(self, program: str) -> str:
        """Return what one of its programs wrote, as `kubelet`."""
        return (self.folder / "logs" / program).read_text(errors="replace")


def obstacle() -> str:
    """Return why no cluster can run here; empty where it can."""
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
        ServerDied: one of its programs ended; its log is the message.
    """
    if why := obstacle():
        raise NoCluster(why)
    with timed(f"programs of Kubernetes {version()}"):
        folder = programs()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with free_node(folder) as node:
            with timed(f"Kubernetes {version()} on {node.address}, processes of this machine"):
                cluster = _start(node)
            yield cluster
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(node: Node) -> Cluster:
    cluster = Cluster(
        folder=node.folder,
        programs=node.programs,
        kubeconfig=node.folder / "admin.kubeconfig",
        node=node.name,
        address=node.address,
        subnet=str(node.subnet),
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
    node.start_control_plane()
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        node.check()
        with contextlib.suppress(KubectlFailed):
            cluster.kubectl("get", "--raw=/readyz")
            break
        if time.monotonic() > deadline:
            message = f"the API server does not answer:\n{cluster.log('kube-apiserver')}"
            raise NoCluster(message)
        time.sleep(0.1)
    node.start_kubelet()
    wait = f"--timeout={_READY_SECONDS}s"
    try:
        cluster.kubectl("wait", "--for=create", wait, f"node/{node.name}")
        cluster.kubectl("wait", "--for=condition=Ready", wait, f"node/{node.name}")
        cluster.kubectl("wait", "--for=create", wait, "serviceaccount/default")
    except KubectlFailed as error:
        node.check()
        message = f"the node is not ready: {error}\n{cluster.log('kubelet')[-10_000:]}"
        raise NoCluster(message) from None
    return cluster


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print what took how long."""
    started = time.monotonic()
    yield
    print(f"cluster: {what}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
