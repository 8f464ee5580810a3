"""The rivals: each downloads the version with MLflow's own command, builds an image of it, and pushes that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import dockerfiles
from benchmarks.base import load_kaniko
from benchmarks.environments import Version
from benchmarks.jobs import Cost, JobSkipped, Outcome, Step, perform
from benchmarks.measured import outcome
from benchmarks.site import RIVAL_BASE, Round
from scripts.docker_daemon import Daemon
from scripts.launch import clean_environ
from tests.builder_image import docker

DOCKER = "docker build"
BUILDKIT_COLD = "tuned BuildKit, cold"
BUILDKIT_HOT = "tuned BuildKit, hot cache, model changed"
BUILDAH = "Buildah"
KANIKO = "Kaniko"
MLFLOW = "mlflow models build-docker"
Rival = Callable[[Round], Iterator[Outcome]]


def docker_build(turn: Round) -> Iterator[Outcome]:
    """Build in the usual order with Docker's classic builder, and push."""
    need_daemon(turn)

    def job(context: Path, image: str) -> list[Step]:
        (context / "Dockerfile").write_text(dockerfiles.plain(turn.environment, RIVAL_BASE))
        build = ("docker", "build", "--quiet", "--no-cache", "--network=host", f"--tag={image}", str(context))
        return [turn.step(context, *build, DOCKER_BUILDKIT="0"), turn.step(context, "docker", "push", image)]

    yield attempt(turn, DOCKER, f"{turn.host}/docker:1", turn.versions.first, job)


def buildkit(turn: Round) -> Iterator[Outcome]:
    """Build as well as can be with BuildKit, cold, then with what that left and another model."""
    daemon = need_daemon(turn)
    command = buildkit_command(turn, daemon)
    cache = f"bench-{uuid.uuid4().hex[:12]}"

    def job(context: Path, image: str) -> list[Step]:
        (context / "Dockerfile").write_text(dockerfiles.tuned(turn.environment, RIVAL_BASE, cache))
        build = (command, "build", "--quiet", "--network=host", f"--tag={image}", str(context))
        return [turn.step(context, *build, DOCKER_BUILDKIT="1"), turn.step(context, command, "push", image)]

    yield attempt(turn, BUILDKIT_COLD, f"{turn.host}/buildkit:1", turn.versions.first, job)
    yield attempt(turn, BUILDKIT_HOT, f"{turn.host}/buildkit:2", turn.versions.changed, job)
    if daemon.own:
        docker("builder", "prune", "--all", "--force")


def buildah(turn: Round) -> Iterator[Outcome]:
    """Build in the usual order with Buildah, the base already pulled, and push."""
    need_daemon(turn)
    if not shutil.which("buildah"):
        message = "buildah is not installed"
        raise JobSkipped(message)
    base = f"{turn.host}/base/rival:3.11"
    with turn.scratch() as storage:
        command = ("buildah", f"--root={storage}/root", f"--runroot={storage}/run")
        pull = [*command, "pull", "--quiet", "--tls-verify=false", base]
        subprocess.run(pull, check=True, capture_output=True, env=clean_environ())

        def job(context: Path, image: str) -> list[Step]:
            (context / "Dockerfile").write_text(dockerfiles.plain(turn.environment, base))
            options = ("--isolation=chroot", "--network=host", "--pull=false", "--quiet", f"--tag={image}")
            build = turn.step(context, *command, "bud", *options, str(context))
            return [build, turn.step(context, *command, "push", "--quiet", "--tls-verify=false", image)]

        try:
            yield attempt(turn, BUILDAH, f"{turn.host}/buildah:1", turn.versions.first, job)
        finally:
            # Its storage has a mount of its own, and files of other users.
            subprocess.run([*command, "rmi", "--all", "--force"], check=False, capture_output=True, env=clean_environ())
            subprocess.run(["/bin/umount", f"{storage}/root/overlay"], check=False, capture_output=True)


def kaniko(turn: Round) -> Iterator[Outcome]:
    """Build in the usual order with Kaniko's own image, which pushes."""
    named = os.environ.get("KANIKO_IMAGE", "")
    if not named:
        message = "KANIKO_IMAGE names no image and no archive"
        raise JobSkipped(message)
    need_daemon(turn)
    executor = load_kaniko(named)

    def job(context: Path, image: str) -> list[Step]:
        (context / "Dockerfile").write_text(dockerfiles.plain(turn.environment, f"{turn.host}/base/rival:3.11"))
        run = ("docker", "run", "--rm", "--network=host", "--entrypoint=/kaniko/executor")
        options = ("--context=dir:///workspace", f"--destination={image}", "--custom-platform=linux/amd64", "--cleanup")
        return [turn.step(context, *run, f"--volume={context}:/workspace:ro", executor, *options)]

    yield attempt(turn, KANIKO, f"{turn.host}/kaniko:1", turn.versions.first, job)


def mlflow_docker(turn: Round) -> Iterator[Outcome]:
    """Let MLflow write its Dockerfile, build that, and push.

    `mlflow models build-docker` is `mlflow models generate-dockerfile`, and `docker build` without the option that
    gives RUN steps the machine's network; so the two are called one after the other. Its base image has a fixed name,
    which our own daemon can hold; in another daemon it would hide the real one.
    """
    daemon = need_daemon(turn)
    if turn.environment.client:
        message = "the version brings a client, which MLflow's command knows nothing of"
        raise JobSkipped(message)
    if not daemon.own:
        message = "its base image cannot be replaced in a daemon that is not the benchmark's own"
        raise JobSkipped(message)
    version = turn.versions.first
    image = f"{turn.host}/mlflow:1"
    with turn.scratch() as context:
        uri = {"MLFLOW_TRACKING_URI": turn.site.uri}
        generate = (sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "--env-manager", "local")
        steps = [
            turn.step(context, *generate, "-m", f"models:/{version.name}/{version.version}", "-d", "made", **uri),
            turn.step(context, "docker", "build", "--quiet", "--no-cache", "--network=host", f"--tag={image}", "made"),
            turn.step(context, "docker", "push", image),
        ]
        name = base_of_mlflow(turn, context, steps[0])
        docker("tag", RIVAL_BASE, name)
        yield outcome(turn, MLFLOW, image, lambda: cost(turn, steps))


def base_of_mlflow(turn: Round, context: Path, generate: Step) -> str:
    """Return the base image that MLflow's Dockerfile names."""
    trial = Step(argv=(*generate.argv[:-1], "trial"), cwd=context, environ=generate.environ)
    cost(turn, [trial])
    lines = (context / "trial" / "Dockerfile").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("FROM "))


def attempt(turn: Round, name: str, image: str, version: Version, job: Callable[[Path, str], list[Step]]) -> Outcome:
    """Download a version, build and push it; return what became of that."""
    with turn.scratch() as context:
        # Its steps are made before the clock runs, and its download is the first of them.
        steps = [download(turn, version, context), *job(context, image)]
        return outcome(turn, name, image, lambda: cost(turn, steps, daemon=name != BUILDAH))


def download(turn: Round, version: Version, context: Path) -> Step:
    """Return MLflow's own command that downloads a version's artifacts."""
    target = str(context / version.folder)
    command = (sys.executable, "-m", "mlflow", "artifacts", "download", *version.source, "--dst-path", target)
    return turn.step(context, *command, MLFLOW_TRACKING_URI=turn.site.uri)


def cost(turn: Round, steps: list[Step], *, daemon: bool = True) -> Cost:
    """Perform the steps; what our own daemon holds in memory counts, unless none of them asks it."""
    return perform(steps, turn.registry, turn.site.mlflow, turn.site.daemon_folder if daemon else "")


def need_daemon(turn: Round) -> Daemon:
    """Return Docker's daemon.

    Raises:
        JobSkipped: there is none.
    """
    if turn.site.daemon is None:
        message = "no Docker daemon answers or can be started"
        raise JobSkipped(message)
    return turn.site.daemon


def buildkit_command(turn: Round, daemon: Daemon) -> str:
    """Return a `docker` command that builds with BuildKit: newer ones need a plug-in for it, older ones do not.

    Raises:
        JobSkipped: none does.
    """
    environ = clean_environ(DOCKER_BUILDKIT="1", **(daemon.environ if daemon.own else {}))
    with turn.scratch() as context:
        (context / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
        for folder in os.get_exec_path():
            command = Path(folder) / "docker"
            if command.is_file():
                trial = [str(command), "build", "--quiet", str(context)]
                if not subprocess.run(trial, check=False, capture_output=True, env=environ).returncode:
                    return str(command)
    message = "no docker command here builds with BuildKit (is buildx missing?)"
    raise JobSkipped(message)


RIVALS: dict[str, Rival] = {
    "docker": docker_build,
    "buildkit": buildkit,
    "buildah": buildah,
    "kaniko": kaniko,
    "mlflow-docker": mlflow_docker,
}
TITLES = {"docker": DOCKER, "buildkit": BUILDKIT_COLD, "buildah": BUILDAH, "kaniko": KANIKO, "mlflow-docker": MLFLOW}
