"""One node and its control plane: their configuration, their start, and how every trace of them is removed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import ipaddress
import json
import os
import select
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from scripts.cache import cache_folder
from scripts.certificates import Certificate, self_signed, signed
from scripts.launch import Process, Program, ServerDied, free_port
from scripts.machine import native_platform

# What a node is called decides everything else of it: folder, bridge, control group, subnet. So one that was killed
# is cleared away by the next of that name.
_NODES = 16
_CGROUPS = Path("/sys/fs/cgroup")
_PAUSE = "localhost/pause:1"
_CONTAINERD_SECONDS = 60
_GONE_SECONDS = 60
_RUNTIME = frozenset({"containerd", "containerd-shim-runc-v2"})
_KUBERNETES = frozenset({"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"})
# What a kubelet sets. The CNI plugin also sets net/ipv4/ip_forward, which stays: others may rely on it by then.
_SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")


@contextlib.contextmanager
def free_node(programs: Path) -> Iterator[Node]:
    """Give a node that nobody else on this machine has, and whose network leads nowhere else; clear it afterwards.

    Raises:
        ServerDied: there is none.
    """
    folder = cache_folder("kubernetes") / "nodes"
    folder.mkdir(exist_ok=True)
    for number in range(_NODES):
        node = Node(number=number, programs=programs, folder=folder / str(number))
        with (folder / f"{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if _taken(node):
                continue
            node.clear()
            node.folder.mkdir()
            with _sysctls(folder):
                try:
                    yield node
                finally:
                    node.clear()
            return
    message = f"{_NODES} nodes run, or their networks are taken"
    raise ServerDied(message)


@dataclass(kw_only=True)
class Node:
    """A node that may start.

    Attributes:
        number: from 0; no other node of this machine has it.
        programs: the folder of Kubernetes' programs.
        folder: of everything that it writes.
    """

    number: int
    programs: Path
    folder: Path
    _ca: Certificate | None = None
    _running: dict[str, Process] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the node, of its bridge and of its control group."""
        return f"builder-test{self.number}"

    @property
    def subnet(self) -> ipaddress.IPv4Network:
        """The network of its Pods."""
        return ipaddress.IPv4Network(f"10.244.{self.number}.0/24")

    @property
    def address(self) -> str:
        """The address of the bridge, which is the node's."""
        return str(self.subnet[1])

    @property
    def services(self) -> ipaddress.IPv4Network:
        """The network of its Services."""
        return ipaddress.IPv4Network(f"10.96.{self.number}.0/24")

    @property
    def ca(self) -> Certificate:
        """The authority of all its certificates."""
        if not self._ca:
            self._ca = self_signed(self.folder, "ca")
        return self._ca

    def certificate(self, user: str, group: str = "") -> Certificate:
        """Make a client's certificate."""
        return signed(self.folder, user, self.ca, organization=group)

    @property
    def environ(self) -> dict[str, str]:
        """What its programs and their clients need in their environment: no proxy is asked for the node's addresses."""
        names = {os.environ.get("NO_PROXY", ""), os.environ.get("no_proxy", "")}
        bypassed = ",".join([*sorted(names - {""}), str(self.subnet), str(self.services)])
        return {"NO_PROXY": bypassed, "no_proxy": bypassed}

    def check(self) -> None:
        """Raise ServerDied where one of its programs has ended."""
        for name, process in self._running.items():
            if not process.alive():
                message = f"{name} ended:\n{process.log()[-10_000:]}"
                raise ServerDied(message)

    def start_containerd(self) -> None:
        """Start containerd, on a bridge, with the pause image."""
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.address}/{self.subnet.prefixlen}", "dev", self.name)
        _ip("link", "set", self.name, "mtu", str(_mtu()), "up")
        for rule in self._firewall():
            _iptables("-A", rule)
        for folder in _cgroup_roots():
            (folder / self.name).mkdir(exist_ok=True)
        cni = self.folder / "cni"
        cni.mkdir()
        (cni / "10-pods.conflist").write_text(json.dumps(self._cni()))
        config = self.folder / "containerd.toml"
        config.write_text(self._containerd())
        self._start("containerd", "containerd", f"--config={config}")
        deadline = time.monotonic() + _CONTAINERD_SECONDS
        while self._ctr("version").returncode:
            self.check()
            if time.monotonic() > deadline:
                message = f"containerd does not answer:\n{self._running['containerd'].log()}"
                raise ServerDied(message)
            time.sleep(0.05)
        self._load_pause()

    def start_control_plane(self) -> None:
        """Start etcd, the API server, the controllers and the scheduler."""
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
        self._start(
            "kube-apiserver",
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
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.folder}/system-kube-controller-manager.kubeconfig",
            f"--service-account-private-key-file={accounts.key_path}",
            f"--root-ca-file={self.ca.path}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
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
        config.write_text(yaml.safe_dump(self._kubelet()))
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
        running = self._processes()
        _kill(pid for pid, name in running.items() if name in _KUBERNETES)
        # containerd's shims leave files elsewhere unless they are asked to end.
        listed = self._ctr("containers", "ls", "--quiet").stdout.split() if "containerd" in running.values() else []
        if listed:
            self._ctr("tasks", "rm", "--force", *listed)
        _kill(self._processes())
        for folder in _cgroup_roots():
            _remove_cgroup(folder / self.name)
        for process in self._running.values():
            process.stop()
        self._running.clear()
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for path in reversed([each for each in mounts if each.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
        for rule in self._firewall():
            _iptables("-D", rule, check=False)
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
        program = Program(name=name, kind="", argv=argv, port=0, ready="", folder=logs, environ=self.environ)
        self._running[name] = Process(program)

    def _processes(self) -> dict[int, str]:
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
        command = ["ctr", f"--address={self.folder}/ctr/containerd.sock", "--namespace=k8s.io", "--timeout=10s"]
        return subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)

    def _load_pause(self) -> None:
        """Put the image of the process that holds a Pod's namespaces onto the node."""
        archive = self.folder / "pause.tar"
        _write_image(archive, self.programs / "pause", _PAUSE)
        done = self._ctr("images", "import", str(archive))
        if done.returncode:
            raise ServerDied(done.stderr)

    def _firewall(self) -> list[list[str]]:
        """Return the rules: Pods reach what this machine reaches, and the API server at its Service's address."""
        comment = ["-m", "comment", "--comment", self.name]
        subnet, service = str(self.subnet), str(self.services[1])
        to_api = ["-p", "tcp", "-d", service, "--dport", "443", "-j", "DNAT", "--to-destination"]
        return [
            ["nat", "POSTROUTING", "-s", subnet, "!", "-d", subnet, *comment, "-j", "MASQUERADE"],
            ["nat", "PREROUTING", "-i", self.name, *comment, *to_api, f"{self.address}:6443"],
            ["filter", "FORWARD", "-i", self.name, *comment, "-j", "ACCEPT"],
            ["filter", "FORWARD", "-o", self.name, *comment, "-j", "ACCEPT"],
        ]

    def _cni(self) -> dict[str, object]:
        ipam = {
            "type": "host-local",
            "dataDir": f"{self.folder}/ipam",
            "ranges": [[{"subnet": str(self.subnet), "gateway": self.address}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": self.name, "isGateway": True, "mtu": _mtu(), "ipam": ipam}
        return {"cniVersion": "0.4.0", "name": self.name, "plugins": [bridge]}

    def _kubelet(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.ca.path)},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            # Another kubelet of this machine would end the Pods that it does not know.
            "cgroupRoot": f"/{self.name}",
            "containerRuntimeEndpoint": f"unix://{self.folder}/ctr/containerd.sock",
            "failCgroupV1": False,
            "failSwapOn": False,
            "healthzPort": 0,
            "podLogsDir": f"{self.folder}/pods",
            "volumePluginDir": f"{self.folder}/plugins",
            "resolvConf": "/etc/resolv.conf",
            "serializeImagePulls": False,
            "makeIPTablesUtilChains": False,
            # A full emptyDir is seen within seconds.
            "volumeStatsAggPeriod": "2s",
            # A developer's disk may be rather full, and the builder's image is not to be collected.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "200Mi", "imagefs.available": "200Mi"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
        }

    def _containerd(self) -> str:
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""\
version = 2
root = "{self.folder}/ctr/root"
state = "{self.folder}/ctr/state"
[grpc]
  address = "{self.folder}/ctr/containerd.sock"
[{cri}]
  sandbox_image = "{_PAUSE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stats_collect_period = 2
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[{cri}.cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{self.folder}/cni"
[{cri}.registry]
  config_path = "{self.folder}/certs.d"
[{cri}.containerd]
  snapshotter = "{_snapshotter(self.folder)}"
  default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
  SystemdCgroup = false
"""


def _taken(node: Node) -> bool:
    """Return whether another device of this machine has a part of the node's network."""
    routes = json.loads(subprocess.run(["ip", "-json", "-4", "route"], check=True, capture_output=True).stdout)
    return any(
        route.get("dev") != node.name
        and route["dst"] != "default"
        and any(ipaddress.IPv4Network(route["dst"]).overlaps(each) for each in (node.subnet, node.services))
        for route in routes
    )


@contextlib.contextmanager
def _sysctls(folder: Path) -> Iterator[None]:
    """Give back what kubelets have set in the kernel, when the last of them has ended."""
    path, users = folder / "sysctls.json", folder / "sysctls.lock"
    with users.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not path.exists():
            path.write_text(json.dumps({name: Path("/proc/sys", name).read_text() for name in _SYSCTLS}))
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for name, value in json.loads(path.read_text()).items():
                    Path("/proc/sys", name).write_text(value)
                path.unlink()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _iptables(action: str, rule: list[str], *, check: bool = True) -> None:
    table, *words = rule
    subprocess.run(["iptables", "--wait", "-t", table, action, *words], check=check, capture_output=not check)


def _mtu() -> int:
    """Return the largest packet that the way out of this machine takes."""
    routes = subprocess.run(["ip", "-json", "-4", "route", "show", "default"], check=True, capture_output=True).stdout
    devices = [route["dev"] for route in json.loads(routes)]
    return min((int(Path("/sys/class/net", each, "mtu").read_text()) for each in devices), default=1500)


def _snapshotter(folder: Path) -> str:
    """Return how containerd lays out images in `folder`: an overlay cannot stand on an overlay, as in a container."""
    kind = subprocess.run(["stat", "--file-system", "--format=%T", str(folder)], check=True, capture_output=True)
    return "native" if kind.stdout.strip() == b"overlayfs" else "overlayfs"


def _cgroup_roots() -> list[Path]:
    """Return the roots of the control groups: one for each controller in version 1, one in version 2."""
    if (_CGROUPS / "cgroup.procs").exists():
        return [_CGROUPS]
    return sorted({each.resolve() for each in _CGROUPS.iterdir() if (each / "cgroup.procs").exists()})


def _remove_cgroup(group: Path) -> None:
    """End all processes of a control group and of those below it, and remove them."""
    deadline = time.monotonic() + _GONE_SECONDS
    while group.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                _kill(int(pid) for pid in Path(folder, "cgroup.procs").read_text().split())
                Path(folder).rmdir()


def _kill(pids: Iterable[int]) -> None:
    """End processes, and wait until they have."""
    ended = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ended.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
    for process in ended:
        select.select([process], [], [], _GONE_SECONDS)
        os.close(process)


def _write_image(archive: Path, program: Path, name: str) -> None:
    """Write an archive, as Docker's, of an image with one program and nothing else."""
    layer = archive.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        tar.add(program, arcname=program.name)
    config = {
        "os": "linux",
        "architecture": native_platform().partition("/")[2],
        "config": {"Entrypoint": [f"/{program.name}"]},
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
