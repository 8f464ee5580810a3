"""The builder image, made by Docker from the checkout, and what runs in it.

It needs a Docker daemon, and a Kaniko image that is at hand or can be pulled: KANIKO_IMAGE (a name, or an archive that
`docker save` wrote), else the one that the Dockerfile names. PYTHON_IMAGE stands for the Python base, PYTHON_3_9_IMAGE
and so on for the interpreters that only compile; without them, they are made from Debian packages as far as Debian has
those versions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder.dockerfile.engine import machine_platform
from scripts.base_image import INTERPRETERS, interpreter_image
from scripts.base_image import base_image as make_base_image
from scripts.cache import cache_folder, locked
from scripts.docker_daemon import Daemon
from scripts.launch import clean_environ
from scripts.machine import ca_bundle, native_platform, pip_config
from tests.waiting import LONG_HANG

ROOT = Path(__file__).parents[1]
SENT = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "builder", "docker", "pyproject.toml", "requirements")
DRIVER = Path(__file__).with_name("kaniko_driver.py")
PYTHON = "/kaniko/venv/bin/python3"
LABEL = "builder-test"
ARCHITECTURE = machine_platform().architecture


# What leads Docker's command to the daemon of the tests, where that is not the one it finds by itself.
_daemon: dict[str, str] = {}


def use_daemon(daemon: Daemon) -> None:
    """Lead `docker` to a daemon."""
    if daemon.own:
        _daemon.update(daemon.environ)


def docker(*arguments: str, check: bool = True, timeout: float = LONG_HANG) -> subprocess.CompletedProcess[str]:
    """Run a docker command; gives what it printed, raises where it fails."""
    # The classic builder: what builds with it builds with BuildKit too, and it is part of every Docker.
    environ = clean_environ(DOCKER_BUILDKIT="0", **_daemon)
    done = subprocess.run(
        ["docker", *arguments], check=False, text=True, capture_output=True, env=environ, timeout=timeout
    )
    if check and done.returncode:
        message = f"docker {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        raise AssertionError(message)
    return done


def build_context(folder: Path) -> Path:
    """Copy what the Dockerfile needs into `folder`, with this machine's CA bundle and pip.conf, and return it."""
    for name in (*SENT, "templates"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    if bundle := ca_bundle():
        shutil.copyfile(bundle, folder / "docker" / "ca-bundle.pem")
    if config := pip_config():
        shutil.copyfile(config, folder / "docker" / "pip.conf")
    return folder


@pytest.fixture(scope="session")
def _docker(docker_daemon: Daemon | None) -> None:
    if docker_daemon is None:
        pytest.skip("no Docker daemon answers or can be started: the builder image is neither built nor run")
    use_daemon(docker_daemon)


@pytest.fixture(scope="session")
def kaniko_image(_docker: None) -> str:
    """Name of a Kaniko image that Docker has."""
    default = re.search(r"^ARG KANIKO_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default
    name = os.environ.get("KANIKO_IMAGE") or default[1]
    if Path(name).is_file():
        loaded = docker("load", "--quiet", f"--input={name}").stdout
        return loaded.removeprefix("Loaded image: ").strip()
    if docker("image", "inspect", name, check=False).returncode and docker("pull", name, check=False).returncode:
        pytest.skip(f"{name} is not at hand and cannot be pulled; name another one, or an archive, in KANIKO_IMAGE")
    return name


@pytest.fixture(scope="session")
def python_image(_docker: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a Python base image that Docker has."""
    if named := os.environ.get("PYTHON_IMAGE"):
        return named
    layout = make_base_image(["linux/amd64", "linux/arm64", "linux/arm/v7"])
    return _loaded(layout, f"localhost/python-base:{layout.parent.name}", tmp_path_factory)


def _loaded(layout: Path, name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Bring a layout's image of this machine's platform to Docker, under a name, and return the name."""
    with locked(cache_folder("tests") / "python-base"):
        if docker("image", "inspect", name, check=False).returncode == 0:
            return name
        archive = tmp_path_factory.mktemp("python") / "image.tar"
        subprocess.run(
            [
                "skopeo",
                "copy",
                "--quiet",
                f"--override-arch={ARCHITECTURE}",
                f"oci:{layout}",
                f"docker-archive:{archive}:{name}",
            ],
            check=True,
            env=clean_environ(),
        )
        docker("load", "--quiet", f"--input={archive}")
        archive.unlink()
    return name


@pytest.fixture(scope="session")
def interpreter_images(python_image: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The build arguments that name the images of the interpreters that only compile."""
    images = {}
    for minor in range(9, 15):
        name, python = f"PYTHON_3_{minor}_IMAGE", f"3.{minor}"
        if os.environ.get(name):
            images[name] = os.environ[name]
        elif python in INTERPRETERS:
            layout = interpreter_image(python, native_platform())
            tag = f"localhost/python-base:{layout.parent.name}-{python}"
            images[name] = _loaded(layout, tag, tmp_path_factory)
        else:
            images[name] = python_image
    return images


@pytest.fixture(scope="session")
def image_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build context of the builder image."""
    return build_context(tmp_path_factory.mktemp("image"))


def build(context: Path, tag: str, **arguments: str) -> str:
    """Build the builder image with Docker, and return its digest: the tag may be another checkout's a moment later."""
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    # Whoever comes second finds every layer made.
    with locked(cache_folder("tests") / tag.replace("/", "-")):
        return docker("build", "--quiet", "--network=host", f"--tag={tag}", *options, str(context)).stdout.strip()


@pytest.fixture(scope="session")
def builder_image(image_context: Path, kaniko_image: str, python_image: str, interpreter_images: dict[str, str]) -> str:
    """The builder image, with Kaniko."""
    arguments = {"KANIKO_IMAGE": kaniko_image, "PYTHON_IMAGE": python_image, **interpreter_images}
    return build(image_context, "localhost/builder-test", **arguments)


@pytest.fixture(scope="session")
def engineless_image(image_context: Path, python_image: str, interpreter_images: dict[str, str]) -> str:
    """The builder image without an engine."""
    arguments = {
        "KANIKO_IMAGE": "scratch",
        "PYTHON_IMAGE": python_image,
        "BUILDER_USER": "65532",
        "VERSION": "1.2.3",
        "REVISION": "0123abc",
        **interpreter_images,
    }
    return build(image_context, "localhost/builder-test-engineless", **arguments)


@dataclass(frozen=True)
class Container:
    """Runs the engine in fresh containers of the builder image, with Docker's default capabilities and seccomp."""

    image: str
    folder: Path

    @property
    def layouts(self) -> Path:
        """The folder of the layouts, one for each job, by its number."""
        return self.folder / "layouts"

    def build(self, *jobs: dict[str, Any], options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Build jobs one after another in one container, and return what became of each (see kaniko_driver.py)."""
        self.layouts.mkdir(exist_ok=True)
        name = f"{LABEL}-{uuid.uuid4().hex[:12]}"
        try:
            done = docker(
                "run",
                "--rm",
                "--network=host",
                f"--name={name}",
                f"--volume={self.layouts}:/kaniko/workspace/layouts",
                f"--volume={DRIVER}:/kaniko/driver.py:ro",
                *options,
                f"--entrypoint={PYTHON}",
                self.image,
                "-I",
                "/kaniko/driver.py",
                json.dumps(jobs),
            )
        finally:
            docker("rm", "--force", name, check=False)
        return json.loads(done.stdout)


@pytest.fixture(scope="session")
def containers(builder_image: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Container]:
    """Make a place for fresh containers with the engine; its layouts are empty."""
    return lambda: Container(builder_image, tmp_path_factory.mktemp("kaniko"))
