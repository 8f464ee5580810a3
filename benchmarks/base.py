"""The base image of every job, made here from Debian packages."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from scripts import machine
from scripts.base_image import base_image
from scripts.launch import clean_environ
from tests.builder_image import docker


def push_base(host: str, platforms: Sequence[str] = ()) -> str:
    """Push the base image, for this machine's platform unless others are named, and return its reference."""
    reference = f"{host}/base/python:3.11-slim"
    copy = ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false"]
    layout = base_image(platforms or [machine.native_platform()])
    subprocess.run([*copy, f"oci:{layout}", f"docker://{reference}"], check=True, env=clean_environ())
    return reference


def load_base(folder: Path) -> str:
    """Bring the base image to Docker, and return its name."""
    name, archive = "localhost/python-base:bench", folder / "base.tar"
    layout = base_image([machine.native_platform()])
    copy = ["skopeo", "copy", "--quiet", f"oci:{layout}", f"docker-archive:{archive}:{name}"]
    subprocess.run(copy, check=True, env=clean_environ())
    docker("load", "--quiet", f"--input={archive}")
    archive.unlink()
    return name


def load_kaniko(named: str) -> str:
    """Return the name of the Kaniko image: the one that is named, or the one in an archive, which Docker loads."""
    if not Path(named).is_file():
        return named
    return docker("load", "--quiet", f"--input={named}").stdout.removeprefix("Loaded image: ").strip()
