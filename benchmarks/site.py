"""Where the jobs run: a Docker daemon, an MLflow server, and a new registry for each round."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.base import load_base, push_base
from benchmarks.environments import PLATFORMS, Environment, Versions
from benchmarks.jobs import Step
from benchmarks.meter import Meter, metered
from builder.package_index import pip_config, uv_config
from builder.settings import Network
from scripts import machine
from scripts.demo_tools import Debian
from scripts.docker_daemon import Daemon, docker_daemon
from scripts.launch import Processes, clean_environ, free_port, running
from tests.builder_image import ca_bundle, docker, use_daemon

CHECKOUT = Path(__file__).parent.parent
RIVAL_BASE = "localhost/bench-base:3.11"
UV_IMAGE = "localhost/bench-uv:latest"
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_INDEX_VARIABLES = (
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "UV_INDEX",
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """What stands for the whole run.

    Attributes:
        folder: for whatever the jobs write.
        daemon: Docker's; None where there is none.
        mlflow: counts what passes to and from MLflow.
        python: an interpreter with what a user of ours installs, and nothing else.
    """

    folder: Path
    daemon: Daemon | None
    mlflow: Meter
    python: str

    @property
    def uri(self) -> str:
        """The MLflow server."""
        return f"http://127.0.0.1:{self.mlflow.port}"

    @property
    def daemon_folder(self) -> str:
        """The folder that the command lines of our own daemon's processes name; empty for another daemon."""
        host = self.daemon.environ.get("DOCKER_HOST", "") if self.daemon and self.daemon.own else ""
        return str(Path(host.removeprefix("unix://")).parent) if host else ""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Every job once, on one environment and one registry that began empty.

    Attributes:
        site: where.
        environment: which kind of model.
        versions: what is published.
        number: of the round, from 1.
        registry: counts what passes to and from the registry.
    """

    site: Site
    environment: Environment
    versions: Versions
    number: int
    registry: Meter
    _contexts: list[Path] = field(default_factory=list)

    @property
    def host(self) -> str:
        """The registry, as references name it."""
        return f"127.0.0.1:{self.registry.port}"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder, which is deleted afterwards."""
        with tempfile.TemporaryDirectory(dir=self.site.folder, prefix="job-") as folder:
            yield Path(folder)

    def step(self, folder: Path, *argv: str, **environ: str) -> Step:
        """Return a command that runs in `folder`, with empty caches there."""
        # A home of its own: whatever keeps a cache keeps it there.
        caches = {
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "UV_CACHE_DIR": str(folder / "cache/uv"),
        }
        daemon = self.site.daemon.environ if self.site.daemon and self.site.daemon.own else {}
        return Step(argv=argv, cwd=folder, environ=clean_environ(**{**caches, **daemon, **environ}))


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """Start what stands for the whole run, and stop it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        daemon = stack.enter_context(docker_daemon())
        server = machine.mlflow(folder, free_port())
        stack.enter_context(running(Processes(), server))
        meter = stack.enter_context(metered(server.port))
        if daemon:
            use_daemon(daemon)
            load_images(folder)
        yield Site(folder=folder, daemon=daemon, mlflow=meter, python=installed(folder / "ours"))


@contextlib.contextmanager
def new_round(place: Site, environment: Environment, versions: Versions, number: int) -> Iterator[Round]:
    """Start a registry that holds the base images alone, and stop it."""
    with tempfile.TemporaryDirectory(dir=place.folder, prefix="registry-") as folder:
        program = Debian().registry(Path(folder), free_port())
        with running(Processes(), program), metered(program.port) as meter:
            push_base(f"127.0.0.1:{meter.port}", PLATFORMS)
            if place.daemon:
                name = f"127.0.0.1:{meter.port}/base/rival:3.11"
                docker("tag", RIVAL_BASE, name)
                docker("push", name)
                docker("rmi", name)
            yield Round(site=place, environment=environment, versions=versions, number=number, registry=meter)


def load_images(folder: Path) -> None:
    """Give Docker the base image, with what RUN steps need on this machine's network, and uv."""
    context = folder / "base"
    context.mkdir()
    bundle, named = ca_bundle(), machine.pip_configuration().get("PIP_CONFIG_FILE")
    variables = {name: os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)}
    network = Network(ca_bundle=bundle, pip_config=Path(named) if named else None, index_variables=variables)
    (context / "pip.conf").write_text(pip_config(network, _BUNDLE if bundle else ""))
    (context / "uv.toml").write_text(uv_config(network))
    lines = [f"FROM {load_base(folder)}", "COPY pip.conf /etc/pip.conf", "COPY uv.toml /etc/uv/uv.toml"]
    if bundle:
        shutil.copyfile(bundle, context / "bundle.pem")
        lines.append(f"COPY bundle.pem {_BUNDLE}")
    (context / "Dockerfile").write_text("\n".join(lines))
    docker("build", "--quiet", f"--tag={RIVAL_BASE}", str(context))

    context = folder / "uv"
    context.mkdir()
    shutil.copyfile(uv(), context / "uv")
    (context / "uv").chmod(0o755)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY uv /uv\n")
    docker("build", "--quiet", f"--tag={UV_IMAGE}", str(context))


def installed(folder: Path, checkout: Path = CHECKOUT) -> str:
    """Install what a user of ours installs, as the builder image has it; return its interpreter.

    The tests' own environment has all of MLflow, whose import takes nearly twice as long.

    Args:
        folder: where to.
        checkout: of this program, whose requirements are installed.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    python, locked = str(folder / "bin" / "python"), str(checkout / "requirements" / "builder.txt")
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(folder)],
        ["pip", "sync", "--quiet", "--python", python, "--compile-bytecode", "--require-hashes", locked],
    ):
        subprocess.run([str(uv()), *command], check=True, env=environ)
    subprocess.run([python, "-m", "compileall", "-q", str(checkout / "builder")], check=True, env=environ)
    return python


def uv() -> Path:
    """Return the program uv of our own environment."""
    return Path(sys.executable).with_name("uv")


def version_of(*command: str) -> str:
    """Return the first line that a command prints; empty where it is not there."""
    try:
        printed = subprocess.run(command, check=False, capture_output=True, text=True, env=clean_environ()).stdout
    except FileNotFoundError:
        return ""
    return next(iter(printed.splitlines()), "")
