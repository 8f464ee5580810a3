"""What the demo is played with: Debian's packages, or nothing but Docker.

Both bring the same four things, and the demo does not ask which it has: a registry, a base image, a builder with an
engine, and another program than ours that reads what was pushed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from scripts.base_image import base_image
from scripts.launch import Program
from scripts.machine import emulated_platform, other_platform

CHECKOUT = Path(__file__).parent.parent
BUILDER = str(Path(sys.executable).with_name("builder"))

_PYTHON = "docker.io/library/python"
_REGISTRY = "docker.io/library/registry:2"
_SKOPEO = "quay.io/skopeo/stable"
_IMAGE = "model-image-builder"
_PULL_TIMEOUT = "8s"
_DEBIAN = ("docker-registry", "skopeo", "buildah")
_READ = ("inspect", "--raw", "--tls-verify=false")


class Tools(Protocol):
    """Where the demo's programs and images come from."""

    def emulated(self) -> str | None:
        """Return the other platform that can be built for here; None where there is none."""
        ...

    def registry(self, folder: Path, port: int, address: str = "127.0.0.1") -> Program:
        """Return a registry, to be started; its content is gone with `folder`."""
        ...

    def base(self, host: str, platforms: Sequence[str]) -> str:
        """Return BASE_IMAGE: one that can be pulled, or one made here and pushed to the registry at `host`."""
        ...

    def builder(self) -> list[str]:
        """Return the `builder` command that can build; its settings come from the environment."""
        ...

    def read(self, reference: str) -> list[str]:
        """Return a command that prints the manifest at `reference`, and is not ours."""
        ...


def find_tools() -> Tools:
    """Return Debian's programs where all are there, else Docker's images."""
    return Debian() if all(map(shutil.which, _DEBIAN)) else Docker()


class Debian:
    """Programs of Debian packages; images are pulled where they can be, and made where not."""

    def emulated(self) -> str | None:
        """Return the platform that the kernel emulates."""
        return emulated_platform()

    def registry(self, folder: Path, port: int, address: str = "127.0.0.1") -> Program:
        """Return Debian's registry."""
        (folder / "registry.yml").write_text(
            "version: 0.1\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{address}:{port}'}}\n"
        )
        return _registry(("docker-registry", "serve", str(folder / "registry.yml")), folder, port, address)

    def base(self, host: str, platforms: Sequence[str]) -> str:
        """Return Docker Hub's Python, or one that is made of Debian packages."""
        inspect = ["skopeo", f"--command-timeout={_PULL_TIMEOUT}", "inspect", "--raw", f"docker://{_PYTHON}:3.11-slim"]
        if subprocess.run(inspect, check=False, capture_output=True).returncode == 0:
            return f"{_PYTHON}:{{python_version}}-slim"
        made = f"{host}/base/python:3.11-slim"
        copy = ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false"]
        subprocess.run([*copy, f"oci:{base_image(platforms)}", f"docker://{made}"], check=True)
        return made

    def builder(self) -> list[str]:
        """Return our program, which finds Buildah."""
        return [BUILDER]

    def read(self, reference: str) -> list[str]:
        """Return skopeo's command."""
        return ["skopeo", *_READ, f"docker://{reference}"]


class Docker:
    """Images alone, on the machine's own network; the builder is its image, with Kaniko."""

    def emulated(self) -> str | None:
        """Return the other platform if a container of it runs."""
        image = f"{_PYTHON}:3.11-slim"
        trial = ["docker", "run", "--rm", "--pull=always", f"--platform={other_platform()}", image, "true"]
        return None if subprocess.run(trial, check=False, capture_output=True).returncode else other_platform()

    def registry(self, folder: Path, port: int, address: str = "127.0.0.1") -> Program:
        """Return the distribution project's registry; its content is gone with its container."""
        setting = f"--env=REGISTRY_HTTP_ADDR={address}:{port}"
        return _registry(("docker", "run", "--rm", "--network=host", setting, _REGISTRY), folder, port, address)

    def base(self, host: str, platforms: Sequence[str]) -> str:  # noqa: ARG002 - one of two that are asked alike
        """Return Docker Hub's Python."""
        return f"{_PYTHON}:{{python_version}}-slim"

    def builder(self) -> list[str]:
        """Build the builder image where it is not there, and return how it is run."""
        subprocess.run([str(CHECKOUT / "scripts" / "image.sh")], check=True, stdout=sys.stderr)
        names = ("MODEL_NAME", "MODEL_VERSION", "MLFLOW_TRACKING_URI", "REGISTRY_URL", "BASE_IMAGE", "LOG_FORMAT")
        command = ["docker", "run", "--rm", "--network=host", *(f"--env={name}" for name in names)]
        for name in ("SSL_CERT_FILE", "PIP_CONFIG_FILE"):
            # Below /kaniko, where the engine leaves files alone.
            if path := os.environ.get(name):
                seen = f"/kaniko/network/{Path(path).name}"
                command += [f"--env={name}={seen}", f"--volume={path}:{seen}:ro"]
        return [*command, _IMAGE]

    def read(self, reference: str) -> list[str]:
        """Return skopeo's command, from its own image."""
        return ["docker", "run", "--rm", "--network=host", _SKOPEO, *_READ, f"docker://{reference}"]


def _registry(argv: tuple[str, ...], folder: Path, port: int, address: str) -> Program:
    ready = f"http://{address}:{port}/v2/"
    return Program(name="registry", kind="registry", argv=argv, port=port, address=address, ready=ready, folder=folder)
