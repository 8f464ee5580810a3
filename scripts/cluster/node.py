"""One node and its control plane: their configuration, their start, and how every trace of them is removed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from scripts.cache import cache_folder
from scripts.certificates import signed
from scripts.cluster.config import AUDIT, PAUSE, NodeConfig
from scripts.cluster.host import cgroup_roots, ip, iptables, kept_sysctls, kill, make_cgroup, mtu, remove_cgroup, taken
from scripts.launch import Process, Program, ServerDied, free_port
from scripts.machine import native_platform

# What a node is called decides everything else of it: folder, bridge, control group, subnet. So one that was killed
# is cleared away by the next of that name.
_NODES = 16
_LOCKS = Path("/run/lock/model-image-builder")
# containerd answers at once; on processors that many want, within a minute.
_CONTAINERD_SECONDS = 120
_RUNTIME = frozenset({"containerd", "containerd-shim-runc-v2"})
_KUBERNETES = frozenset({"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"})


@contextlib.contextmanager
def free_node(programs: Path, numbers: Sequence[int] = range(_NODES)) -> Iterator[Node]:
    """Give a node that nobody else on this machine has, and whose network leads nowhere else; clear it afterwards.

    Args:
        programs: the folder of Kubernetes' programs.
        numbers: which it may be.

    Raises:
        ServerDied: there is none.
    """
    # Mounts are known by their real paths.
    folder = (cache_folder("kubernetes") / "nodes").resolve()
    folder.mkdir(exist_ok=True)
    # Networks, ports and kernel settings are the machine's, whichever cache somebody has.
    _LOCKS.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        node = Node(number=number, programs=programs, folder=folder / str(number))
        with (_LOCKS / f"{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if taken((node.subnet, node.services), node.name):
                continue
            node.clear()
            node.folder.mkdir()
            with kept_sysctls(_LOCKS):
                try:
                    yield node
                finally:
                    node.clear()
            return
    message = f"{len(numbers)} nodes run, or their networks are taken"
    raise ServerDied(message)


@dataclass(kw_only=True)
class Node(NodeConfig):
    """A node that may start."""

    _running: dict[str, Process] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ServerDied where one of its programs has ended."""
        for name, process in self._running.items():
            if not process.alive():
                message = f"{name} ended:\n{process.log()[-10_000:]}"
                raise ServerDied(message)

    def start_containerd(self) -> None:
        """Start containerd, on a bridge, with the pause image."""
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{self.address}/{self.subnet.prefixlen}", "dev", self.name)
        ip("link", "set", self.name, "mtu", str(mtu()), "up")
        for rule in self.firewall():
            iptables("-A", rule)
        for folder in cgroup_roots():
            make_cgroup(folder, self.name)
        cni = self.folder / "cni"
        cni.mkdir()
        (cni / "10-pods.conflist").write_text(json.dumps(self.cni()))
        config = self.folder / "containerd.toml"
        config.write_text(self.containerd())
        self._start("containerd", "containerd", f"--config={config}")
        deadline = time.monotonic() + _CONTAINERD_SECONDS
        while self._ctr("version").returncode:
            self.check()
            if time.monotonic() > deadline:
                message = f"containerd does not answer:\n{self._running['containerd'].log()}"
                raise ServerDied(message)
            time.sleep(0.05)
        self._load_pause()

    def start_api_server(self) -> None:
        """Start etcd and the API server."""
        etcd, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._start(
            "etcd",
            f"--data-dir={self.folder}/etcd",
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls={peers}",
            "--unsafe-no-fsync",
        )
        service = str(self.services[1])
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        server = signed(
            self.folder, "apiserver", self.ca, dns_names=names, addresses=[self.address, "127.0.0.1", service]
        )
        client = self.certificate("kube-apiserver-kubelet-client", "system:masters")
        accounts = self.certificate("service-accounts")
        policy = self.folder / "audit.yaml"
        policy.write_text(yaml.safe_dump(AUDIT))
        self._start(
            "kube-apiserver",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.folder}/audit.log",
            f"--etcd-servers={etcd}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--tls-cert-file={server.path}",
            f"--tls-private-key-file={server.key_path}",
            f"--client-ca-file={self.ca.path}",
            f"--kubelet-client-certificate={client.path}",
            f"--kubelet-client-key={client.key_path}",
            f"--service-account-key-file={accounts.path}",
            f"--service-account-signing-key-file={accounts.key_path}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-cluster-ip-range={self.services}",
            f"--cert-dir={self.folder}/apiserver",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged",
            "--enable-admission-plugins=NodeRestriction",
            "--kubelet-preferred-address-types=InternalIP",
        )

    def start_controllers(self) -> None:
        """Start the controllers and the scheduler, which end where the API server is not ready within ten seconds."""
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.folder}/system-kube-controller-manager.kubeconfig",
            f"--service-account-private-key-file={self.folder}/service-accounts.key",
            f"--root-ca-file={self.ca.path}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
            # A node of a busy machine is not away because it is late.
            "--node-monitor-grace-period=300s",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            "--controllers=*,-node-ipam-controller,-node-route-controller,-cloud-node-lifecycle-controller,"
            "-service-lb-controller",
        )
        self._start(
            "kube-scheduler",
            f"--kubeconfig={self.folder}/system-kube-scheduler.kubeconfig",
            "--leader-elect=false",
            "--secure-port=0",
        )

    def start_kubelet(self) -> None:
        """Start the kubelet, which registers the node."""
        config = self.folder / "kubelet.yaml"
        config.write_text(yaml.safe_dump(self.kubelet()))
        self._start(
            "kubelet",
            f"--config={config}",
            f"--kubeconfig={self.folder}/system-node-{self.name}.kubeconfig",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
            f"--root-dir={self.folder}/kubelet",
            f"--cert-dir={self.folder}/kubelet/pki",
            # How often the size of a container's own files is looked at.
            "--housekeeping-interval=2s",
        )

    def clear(self) -> None:
        """Remove every trace of the node, whether or not it runs; quick, since nothing of it is worth keeping."""
        running = self.processes()
        kill(pid for pid, name in running.items() if name in _KUBERNETES)
        # containerd's shims leave files elsewhere unless they are asked to end.
        listed = self._ctr("containers", "ls", "--quiet").stdout.split() if "containerd" in running.values() else []
        if listed:
            self._ctr("tasks", "rm", "--force", *listed)
        kill(self.processes())
        for folder in cgroup_roots():
            remove_cgroup(folder / self.name)
        for process in self._running.values():
            process.stop()
        self._running.clear()
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for path in reversed([each for each in mounts if each.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
        for rule in self.firewall():
            iptables("-D", rule, check=False)
        subprocess.run(["ip", "link", "delete", self.name], check=False, capture_output=True)
        for link in Path("/var/log/containers").glob("*.log"):
            if link.is_symlink() and str(link.readlink()).startswith(f"{self.folder}/"):
                link.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, *arguments: str) -> None:
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        path = self.programs / name
        argv = (str(path), *arguments) if path.exists() else arguments
        if name in _KUBERNETES:
            # Its clients give up on it within seconds, however many others want the processor.
            argv = ("nice", "--adjustment=-10", *argv)
        program = Program(name=name, kind="", argv=argv, port=0, ready="", folder=logs, environ=self.environ)
        self._running[name] = Process(program)

    def processes(self) -> dict[int, str]:
        """Return the node's own processes, containers aside, with the names of their programs."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                name = (folder / "exe").readlink().name.removesuffix(" (deleted)")
                ours = any(f"{self.folder}/" in word for word in words)
                if ours and name in _KUBERNETES | _RUNTIME:
                    found[int(folder.name)] = name
        return found

    def _ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        limit = f"--timeout={_CONTAINERD_SECONDS}s"
        command = ["ctr", f"--address={self.folder}/ctr/containerd.sock", "--namespace=k8s.io", limit]
        return subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)

    def _load_pause(self) -> None:
        """Put the image of the process that holds a Pod's namespaces onto the node."""
        archive = self.folder / "pause.tar"
        _write_image(archive, self.programs / "pause", PAUSE)
        done = self._ctr("images", "import", str(archive))
        if done.returncode:
            raise ServerDied(done.stderr)


def _write_image(archive: Path, program: Path, name: str) -> None:
    """Write an archive, as Docker's, of an image with one program and nothing else."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        tar.add(program, arcname=program.name)
    config = {
        "os": "linux",
        "architecture": native_platform().partition("/")[2],
        "config": {"Entrypoint": [f"/{program.name}"]},
        "history": [{"created_by": program.name}],
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.read_bytes()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        tar.add(layer, arcname="layer.tar")
        for path, content in (("config.json", config), ("manifest.json", manifest)):
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    layer.unlink()
