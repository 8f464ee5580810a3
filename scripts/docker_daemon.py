"""A Docker daemon: the one that is there, or one of our own for as long as it is needed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# A daemon answers within seconds; on busy processors within a minute.
_START_SECONDS = 300
_STOP_SECONDS = 60
_ANSWER_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A daemon that answers.

    Attributes:
        environ: the variables that lead docker-py's client to it.
        own: whether it is ours; its containers are then on the machine's own network.
    """

    environ: dict[str, str]
    own: bool


@contextlib.contextmanager
def docker_daemon() -> Iterator[Daemon | None]:
    """Give a daemon: the one at DOCKER_HOST, or the machine's, or one that is started; None where none can be."""
    if _answers():
        yield Daemon(environ=dict(os.environ), own=False)
        return
    if os.environ.get("DOCKER_HOST") or os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "ip"))):
        yield None
        return
    # A socket's path has at most 107 bytes, so it is not a folder of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="dockerd-"))
    try:
        with _bridge() as bridge, _own_daemon(folder, bridge) as daemon:
            yield daemon
    finally:
        # The one mount that the daemon leaves behind: the machine's network namespace, of a container on it.
        namespace = folder / "exec" / "netns" / "default"
        if namespace.exists():
            subprocess.run(["umount", str(namespace)], check=False, capture_output=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def _own_daemon(folder: Path, bridge: str) -> Iterator[Daemon | None]:
    address = f"unix://{folder}/docker.sock"
    command = [
        "dockerd",
        f"--host={address}",
        f"--data-root={folder}/data",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/pid",
        f"--bridge={bridge}",
        # Its containers are on the machine's network, so its firewall needs no rule.
        "--iptables=false",
        "--ip6tables=false",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None and not _answers(address) and time.monotonic() < deadline:
            time.sleep(0.2)
        yield Daemon(environ={"DOCKER_HOST": address}, own=True) if _answers(address) else None
    finally:
        # It ends its containerd and its containers itself.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(address: str = "") -> bool:
    """Return whether a daemon answers at an address, or where Docker's command looks for one by itself."""
    command = ["docker", *([f"--host={address}"] if address else []), "version", "--format={{.Server.Version}}"]
    try:
        return subprocess.run(command, check=False, capture_output=True, timeout=_ANSWER_SECONDS).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


@contextlib.contextmanager
def _bridge() -> Iterator[str]:
    """Make a bridge for our daemon; with none it would delete the bridge of another one."""
    name = f"dockerd{os.getpid() % 10**8}"
    subprocess.run(["ip", "link", "add", "name", name, "type", "bridge"], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)
