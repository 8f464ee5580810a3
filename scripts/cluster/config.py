"""What a node is called, and how its programs are configured."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from scripts.certificates import Certificate, self_signed, signed
from scripts.cluster.host import mtu, snapshotter

PAUSE = "localhost/pause:1"
# Every answered request, those of Kubernetes' own programs aside.
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "userGroups": ["system:nodes", "system:serviceaccounts:kube-system"]},
        {"level": "None", "users": ["system:kube-controller-manager", "system:kube-scheduler", "system:apiserver"]},
        {"level": "Metadata"},
    ],
}


@dataclass(kw_only=True)
class NodeConfig:
    """A node's names and configuration; its number decides them.

    Attributes:
        number: from 0; no other node of this machine has it.
        programs: the folder of Kubernetes' programs.
        folder: of everything that it writes.
    """

    number: int
    programs: Path
    folder: Path
    _ca: Certificate | None = None

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

    def firewall(self) -> list[list[str]]:
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

    def cni(self) -> dict[str, object]:
        """Return the configuration of the Pods' network."""
        ipam = {
            "type": "host-local",
            "dataDir": f"{self.folder}/ipam",
            "ranges": [[{"subnet": str(self.subnet), "gateway": self.address}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": self.name, "isGateway": True, "mtu": mtu(), "ipam": ipam}
        return {"cniVersion": "0.4.0", "name": self.name, "plugins": [bridge]}

    def kubelet(self) -> dict[str, object]:
        """Return the kubelet's configuration: it knows its users, and looks often at what Pods use."""
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

    def containerd(self) -> str:
        """Return containerd's configuration: all that it writes is in the node's folder."""
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""\
version = 2
root = "{self.folder}/ctr/root"
state = "{self.folder}/ctr/state"
[grpc]
  address = "{self.folder}/ctr/containerd.sock"
[{cri}]
  sandbox_image = "{PAUSE}"
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
  snapshotter = "{snapshotter(self.folder)}"
  default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.runc.options]
  SystemdCgroup = false
"""
