"""K3s in a container, for a machine that cannot run a cluster as processes and has a Docker daemon instead.

It needs Linux, a daemon that can pull the image and run it privileged, and kubectl. Written after the documents of K3s
and testcontainers: where this project is tested no image registry can be reached, so nobody has seen it run there.
"""

from __future__ import annotations

import base64
import contextlib
import io
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.cluster.cluster import Cluster, NoCluster


@dataclass(frozen=True, kw_only=True)
class K3s(Cluster):
    """A cluster in a container; see `Cluster`."""

    container: Any

    def ctr(self, *arguments: str) -> str:
        """Run containerd's own command in the container, and return what it prints."""
        code, output = self.container.exec_run(["ctr", "--namespace=k8s.io", *arguments])
        if code:
            raise NoCluster(output.decode(errors="replace"))
        return str(output.decode())

    def load_image(self, archive: Path) -> None:
        """Put the images of an archive onto the node, under the names that stand in it."""
        self._put("/image.tar", archive.read_bytes())
        self.ctr("images", "import", "/image.tar")

    def trust_registry(self, host: str) -> None:
        """Let the node pull from a registry at `ADDRESS:PORT` over plain HTTP."""
        self._put(f"/var/lib/rancher/k3s/agent/etc/containerd/certs.d/{host}/hosts.toml", self.hosts(host).encode())

    def requests(self) -> list[dict[str, Any]]:
        """Raise: K3s keeps no audit log."""
        message = "K3s keeps no audit log"
        raise NoCluster(message)

    def log(self, program: str) -> str:  # noqa: ARG002 - they are one
        """Return what K3s wrote, whatever the program."""
        return str(self.container.logs().decode(errors="replace"))

    def _put(self, path: str, content: bytes) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        self.container.put_archive("/", archive.getvalue())


@contextlib.contextmanager
def start_k3s(version: str, kubectl: Path) -> Iterator[Cluster]:
    """Start K3s, give it once its node is ready, and remove it.

    Args:
        version: of Kubernetes, as `v1.34.4`.
        kubectl: the program.
    """
    from testcontainers.community.k3s import K3SContainer

    with tempfile.TemporaryDirectory(prefix="k3s-") as name, K3SContainer(f"rancher/k3s:{version}-k3s1") as server:
        folder, container = Path(name), server.get_wrapped_container()
        container.reload()
        config = yaml.safe_load(server.config_yaml())
        entry = config["clusters"][0]["cluster"]
        (folder / "ca.crt").write_bytes(base64.b64decode(entry["certificate-authority-data"]))
        (folder / "admin.kubeconfig").write_text(yaml.safe_dump(config))
        address = next(iter(container.attrs["NetworkSettings"]["Networks"].values()))["Gateway"]
        cluster = K3s(
            folder=folder,
            kubectl_path=kubectl,
            kubeconfig=folder / "admin.kubeconfig",
            node=container.attrs["Config"]["Hostname"],
            address=address,
            server=entry["server"],
            ca=folder / "ca.crt",
            environ={"KUBECACHEDIR": str(folder / "kubectl")},
            container=container,
        )
        cluster.kubectl("wait", "--for=condition=Ready", "--timeout=180s", f"node/{cluster.node}")
        yield cluster
