"""What a node changes on its machine: devices, firewall, control groups, processes, the kernel's settings."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_GONE_SECONDS = 60
# What a kubelet sets. The CNI plugin also sets net/ipv4/ip_forward, which stays: others may rely on it by then.
_SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")


def taken(networks: Sequence[ipaddress.IPv4Network], device: str) -> bool:
    """Return whether a device of this machine other than `device` leads to a part of the networks."""
    routes = json.loads(subprocess.run(["ip", "-json", "-4", "route"], check=True, capture_output=True).stdout)
    return any(
        route.get("dev") != device
        and route["dst"] != "default"
        and any(ipaddress.IPv4Network(route["dst"]).overlaps(each) for each in networks)
        for route in routes
    )


@contextlib.contextmanager
def kept_sysctls(folder: Path) -> Iterator[None]:
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


def ip(*arguments: str) -> None:
    """Change this machine's devices or addresses."""
    subprocess.run(["ip", *arguments], check=True)


def iptables(action: str, rule: list[str], *, check: bool = True) -> None:
    """Append (`-A`) or delete (`-D`) a rule, which begins with its table."""
    table, *words = rule
    subprocess.run(["iptables", "--wait", "-t", table, action, *words], check=check, capture_output=not check)


def mtu() -> int:
    """Return the largest packet that the way out of this machine takes."""
    routes = subprocess.run(["ip", "-json", "-4", "route", "show", "default"], check=True, capture_output=True).stdout
    devices = [route["dev"] for route in json.loads(routes)]
    return min((int(Path("/sys/class/net", each, "mtu").read_text()) for each in devices), default=1500)


def snapshotter(folder: Path) -> str:
    """Return how containerd lays out images in `folder`: an overlay cannot stand on an overlay, as in a container."""
    kind = subprocess.run(["stat", "--file-system", "--format=%T", str(folder)], check=True, capture_output=True)
    return "native" if kind.stdout.strip() == b"overlayfs" else "overlayfs"


def cgroup_roots() -> list[Path]:
    """Return the roots of the control groups: one for each controller in version 1, one in version 2."""
    if (_CGROUPS / "cgroup.procs").exists():
        return [_CGROUPS]
    return sorted({each.resolve() for each in _CGROUPS.iterdir() if (each / "cgroup.procs").exists()})


def make_cgroup(root: Path, name: str) -> None:
    """Make a control group for all Pods, which together get more of a busy processor than one process beside them.

    Not where version 2 does not hand the controller on to it.
    """
    group = root / name
    group.mkdir(exist_ok=True)
    for file, weight in (("cpu.shares", 8192), ("cpu.weight", 800)):
        if (group / file).exists():
            (group / file).write_text(str(weight))


def remove_cgroup(group: Path) -> None:
    """End all processes of a control group and of those below it, and remove them."""
    deadline = time.monotonic() + _GONE_SECONDS
    while group.exists() and time.monotonic() < deadline:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                kill(int(pid) for pid in Path(folder, "cgroup.procs").read_text().split())
                Path(folder).rmdir()


def kill(pids: Iterable[int]) -> None:
    """End processes, and wait until they have."""
    ended = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ended.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
    for process in ended:
        select.select([process], [], [], _GONE_SECONDS)
        os.close(process)
