"""Run servers in containers.

One image serves them all: the Python base that is made from Debian packages, which has the C library that Debian's
registry and our own Python environment need. Both are mounted into it read-only, under the same paths as here, and so
is the server's folder; a program's command is then the same in a container and out of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

from docker.errors import ImageNotFound, NotFound
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

import docker
from scripts.base_image import base_layer
from scripts.docker_daemon import Daemon
from scripts.go_tools import tool
from scripts.launch import Processes, Program, Running
from scripts.machine import native_platform

_REPOSITORY = "model-image-builder/test-base"
_CHECKOUT = Path(__file__).parent.parent


class Container:
    """A server in a container."""

    def __init__(self, container: DockerContainer) -> None:
        self._container = container

    def log(self) -> str:
        """Return what the server wrote so far."""
        return self._container.get_wrapped_container().logs().decode(errors="replace")

    def alive(self) -> bool:
        """Return whether it still runs."""
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        return wrapped.status in {"created", "running"}

    def stop(self) -> None:
        """Remove it."""
        with contextlib.suppress(NotFound):
            self._container.stop()


class Containers:
    """Starts programs in containers of a Docker daemon.

    Args:
        daemon: the daemon that runs them.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.on_this_machine = daemon.own
        # Its reaper would be one more image, and every container is removed by the fixture that started it.
        testcontainers_config.ryuk_disabled = True
        self._image = self._find_or_make_image()

    def start(self, program: Program) -> Running:
        """Start `program`; the caller waits for it to answer, and stops it."""
        if program.kind == "python" and not _python_can_be_mounted():
            return Processes().start(program)
        listen = "127.0.0.1" if self.on_this_machine else "0.0.0.0"  # noqa: S104 - inside a container's own network
        container = DockerContainer(self._image, docker_client_kw={"environment": self._daemon.environ})
        container.with_command([word.replace("{listen}", listen) for word in program.argv])
        container.with_envs(HOME="/tmp", LANG="C.UTF-8", **program.environ)  # noqa: S108 - in the container
        for folder in (program.folder, *program.more_folders):
            container.with_volume_mapping(str(folder), str(folder), "rw")
        for path in _mounted(program.kind):
            container.with_volume_mapping(str(path), str(path), "ro")
        options = {"user": f"{os.getuid()}:{os.getgid()}", "working_dir": str(program.folder)}
        if self.on_this_machine:
            options["network_mode"] = "host"
        else:
            # Its own method knows no address to bind to, and would open the port to the network.
            container.ports[f"{program.port}/tcp"] = ("127.0.0.1", program.port)
        container.with_kwargs(**options)
        return Container(container.start())

    def _find_or_make_image(self) -> str:
        layer = base_layer(native_platform())
        name = f"{_REPOSITORY}:{layer.parent.name}"
        with contextlib.closing(docker.from_env(environment=self._daemon.environ)) as client:
            try:
                client.images.get(name)
            except ImageNotFound:
                client.api.import_image_from_file(str(layer), repository=_REPOSITORY, tag=layer.parent.name)
        return name


def _mounted(kind: str) -> list[Path]:
    """Return what a program's kind needs beside the image."""
    if kind == "registry":
        return [Path(shutil.which("docker-registry") or "/usr/bin/docker-registry")]
    if kind == "registry-v3":
        return [tool("registry")]
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), _CHECKOUT}
    return sorted(prefix for prefix in prefixes if prefix != Path("/usr"))


def _python_can_be_mounted() -> bool:
    """Return whether this Python runs in the image: it brings itself along, or is the image's own version."""
    return sys.platform == "linux" and (sys.base_prefix != "/usr" or sys.version_info[:2] == (3, 11))
