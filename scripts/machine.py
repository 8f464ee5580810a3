"""What this machine is: its platform, what it can emulate, and what it has to run a server or a container."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.launch import Program, free_port

_MOST = 1024

# The job runner's five processes would cost more than the server, and nothing here asks for a job.
MLFLOW_ENVIRON = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def native_platform() -> str:
    """Return this machine's platform, as images name it."""
    name = platform.machine().lower()
    return f"linux/{({'x86_64': 'amd64', 'aarch64': 'arm64'}).get(name, name)}"


def emulated_platform() -> str | None:
    """Return the other common platform, if the kernel starts its programs through an emulator; None if it does not."""
    emulator = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}[other_platform()]
    try:
        enabled = Path(f"/proc/sys/fs/binfmt_misc/qemu-{emulator}").read_text().startswith("enabled")
    except OSError:
        return None
    return other_platform() if enabled else None


def other_platform() -> str:
    """Return the one of the two common platforms that this machine is not."""
    return "linux/amd64" if native_platform() == "linux/arm64" else "linux/arm64"


def container_runners() -> list[list[str]]:
    """Return the ways to run a container here, the first choice first: a plain one may not work everywhere."""
    found = []
    if shutil.which("podman"):
        # Where a process may not raise its limits, or both versions of cgroups are mounted, crun fails before the
        # container starts. runc does not, with limits that are surely below ours.
        limits = [
            f"--ulimit={name}={most}:{most}"
            for name, most in (("nofile", _limit(resource.RLIMIT_NOFILE)), ("nproc", _limit(resource.RLIMIT_NPROC)))
        ]
        found += [["podman", "run"], ["podman", "run", "--runtime=runc", *limits]]
    if shutil.which("docker"):
        found.append(["docker", "run"])
    return found


class CannotRun(Exception):
    """No container of an image can be run here; what the last tool said is the message."""


@contextlib.contextmanager
def started_container(image: str, platform: str) -> Iterator[tuple[str, list[str]]]:
    """Run a published image without a network, and remove container and image afterwards.

    Args:
        image: its reference.
        platform: which of its images.

    Yields:
        The container's name, and the command that started it, which begins with the tool.

    Raises:
        CannotRun: no tool runs it.
    """
    said = "neither podman nor docker is installed"
    for runner in container_runners():
        tool, name = runner[0], f"published-{free_port()}"
        trust = ["--tls-verify=false"] if tool == "podman" else []
        command = [*runner, "--rm", "--detach", "--name", name, "--network=none", "--platform", platform, *trust, image]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr
            continue
        try:
            yield name, command
        finally:
            # Killed, since a program that is a container's first process ignores what asks it to end.
            for words in (["kill", name], ["rm", "--force", name], ["rmi", "--force", image]):
                subprocess.run([tool, *words], check=False, capture_output=True)
        return
    raise CannotRun(said)


def ca_bundle() -> Path | None:
    """Return the CA bundle that this machine's programs are told to use; None where it is the usual one."""
    named = (os.environ.get(name) for name in ("PIP_CERT", "SSL_CERT_FILE"))
    return next((Path(path) for path in named if path and Path(path).is_file()), None)


def pip_config() -> Path | None:
    """Return this machine's pip.conf; None where it has none."""
    named = (os.environ.get("PIP_CONFIG_FILE", ""), "/etc/pip.conf")
    return next((Path(path) for path in named if path and Path(path).is_file()), None)


def pip_configuration() -> dict[str, str]:
    """Return PIP_CONFIG_FILE where this machine has a pip.conf, so that RUN steps find their packages as it does."""
    found = pip_config()
    return {"PIP_CONFIG_FILE": str(found)} if found else {}


def mlflow(folder: Path, port: int, *options: str, address: str = "127.0.0.1") -> Program:
    """Return an MLflow server; without `options` it has a database, and hands on artifacts itself, in `folder`."""
    defaults = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db")
    defaults += ("--artifacts-destination", str(folder / "artifacts"))
    command = (sys.executable, "-m", "mlflow", "server", "--workers", "1")
    return Program(
        name="mlflow",
        kind="python",
        argv=(*command, "--host", "{listen}", "--port", str(port), *(options or defaults)),
        port=port,
        ready=f"http://{address}:{port}/health",
        folder=folder,
        address=address,
        environ=MLFLOW_ENVIRON,
    )


def _limit(which: int) -> int:
    hard = resource.getrlimit(which)[1]
    return _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
