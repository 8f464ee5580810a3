"""podman and Docker, by their command lines.

Facts that shape this module (podman 4.3, Docker 20.10 and 28; `podman-run(1)`, `docker run --help`):

- podman gives containers the proxies of its own environment, and what `env` in containers.conf says; Docker's client
  those of its config.json. Either may hold a password. So both see a configuration of ours, and of the environment only
  what leads them to their storage or daemon.
- a folder that an image declares as a volume would be writable, without a limit, on the machine's disk: no image that
  is run declares one, and /tmp and those folders are in memory, within the container's limit.
- mounts.conf names folders of the machine that podman brings into every container; Red Hat's is its subscription. The
  option for another file is podman's own, not that of its remote client.
- `kill` and `rm` of a container that ignores SIGTERM: only SIGKILL does not wait for it.
- where a process may not raise its limits, podman's own cannot be set; limits that are surely below ours can.
"""

from __future__ import annotations

import re
import resource
import secrets
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from builder.build.engine import Output
from builder.build.process import Runner, run
from builder.errors import BuildFailed, one_line
from builder.reference import Platform
from builder.smoke.containers import PREFIX, CannotRun, CannotStart, Ended, Limits, NoContainers, new_name
from builder.smoke.content import Content, probe, write_archive, write_layout

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHORT = 60.0
_LOADING = 3600.0
_LOG_LINES = 40
_MOST_LINES = 2000
_MOST_FILES = 1024
_PROCESSES = 2048
_PROBE = Limits(memory=64 << 20, seconds=int(_SHORT))
_STATE = re.compile(r"state=(\w+) (\d+) (true|false)")
_OURS = re.compile(rf"(?:localhost/)?{PREFIX}-(\d{{1,12}})-[a-z0-9]+")
_KILLED = 137
# podman says so where it cannot keep a container within its memory.
_UNBOUNDED = re.compile(r"limits are not supported and ignored|does not support memory limit", re.IGNORECASE)


class CommandLine:
    """A container runtime that is used by its command line.

    Args:
        environ: variables that lead it to its storage or daemon.
        platform: this machine's.
        runner: runs programs; see `builder.build.process.run`.
    """

    name: str
    _options: tuple[str, ...] = ()

    def __init__(self, environ: Mapping[str, str], platform: Platform, *, runner: Runner = run) -> None:
        self._environ = dict(environ)
        self._platform = platform
        self._runner = runner
        self._way: tuple[str, ...] | None = None

    def available(self) -> bool:
        """Return whether the program is installed."""
        return shutil.which(self.name, path=_PATH) is not None

    def check(self) -> bool:
        """Run the smallest image, once: containers can be run here, and are run in the way that worked for it.

        Returns:
            False where that cannot be told, since no such image is known for the platform.
        """
        content, name = probe(self._platform), new_name(time.time() + _SHORT, secrets.token_hex(6))
        if self._way is not None or content is None:
            return self._way is not None
        with tempfile.TemporaryDirectory(prefix="builder-probe-") as folder:
            try:
                if said := self._load(content, name, Path(folder)) or self._start(name, _PROBE):
                    message = f"{self.name} runs no container here: {said}"
                    raise NoContainers(message)
            finally:
                self.remove(name)
        return True

    def load(self, content: Content, name: str, folder: Path) -> None:
        """Take an image."""
        if said := self._load(content, name, folder):
            message = f"{self.name} could not load the image: {said}"
            raise CannotRun(message)

    def start(self, name: str, limits: Limits) -> None:
        """Start a container in the background."""
        known = self._way is not None
        if said := self._start(name, limits):
            if known:
                raise CannotStart(said)
            message = f"{self.name} did not start it: {said}"
            raise CannotRun(message)

    def execute(self, name: str, argv: Sequence[str], output: Output, *, timeout: float) -> int | None:
        """Run a program within a container."""
        return self._call(["exec", name, *argv], timeout=timeout, output=output)[0]

    def ended(self, name: str, *, within: float = 0) -> Ended | None:
        """Return how a container ended, None while it runs."""
        if within > 0:
            self._call(["wait", name], timeout=within)
        form = "state={{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}"
        lines = self._call(["inspect", f"--format={form}", name])[1]
        match = next((match for line in lines if (match := _STATE.match(line))), None)
        if match is None:
            message = f"{self.name} does not know its container any more: {_said(lines)}"
            raise CannotRun(message)
        if match[1] not in {"exited", "stopped", "dead", "removing"}:
            return None
        code = int(match[2])
        return Ended(code=code, of_memory=match[3] == "true" or code == _KILLED)

    def log(self, name: str) -> list[str]:
        """Return the last lines of what a container printed."""
        # Not by `--tail`: podman then gives a line that was written in pieces in the wrong order (seen with 4.3).
        lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._call(["logs", name], output=lines.append)
        return list(lines)

    def remove(self, name: str) -> None:
        """Kill and remove a container, and remove its image."""
        try:
            self._remove(name)
        except BaseException:
            # A request to end, or a deadline, came meanwhile: what is half removed is removed before it goes on.
            self._remove(name)
            raise

    def _remove(self, name: str) -> None:
        image = f"localhost/{name}"
        for argv in (["kill", "--signal=KILL", name], ["rm", "--force", "--volumes", name], ["rmi", "--force", image]):
            with suppress(CannotRun):
                self._call(argv)

    def sweep(self, now: float) -> None:
        """Remove what publishers that were killed have left here."""
        containers = self._call(["ps", "--all", f"--filter=name={PREFIX}", "--format={{.Names}}"])[1]
        images = self._call(["images", "--format={{.Repository}}"])[1]
        left = [*((["rm", "--force", "--volumes"], name) for name in containers), *((["rmi"], name) for name in images)]
        for command, name in left:
            match = _OURS.fullmatch(name)
            if match and int(match[1]) < now:
                self._call([*command, name])

    def _load(self, content: Content, name: str, folder: Path) -> str:
        """Take an image; return what was said against it.

        Raises:
            CannotRun: there is no room for it.
        """
        try:
            arguments = self._written(content, name, folder)
        except OSError as error:
            message = f"the image could not be written to {folder}: {error.strerror or error}"
            raise CannotRun(message) from error
        code, lines = self._call(arguments, timeout=_LOADING, folder=folder)
        return "" if code == 0 else _said(lines)

    def _start(self, name: str, limits: Limits) -> str:
        """Start a container; return what was said against it by the way that came furthest, empty where it runs."""
        said = ""
        for way in self._ways() if self._way is None else [self._way]:
            code, lines = self._call(
                ["run", "--detach", f"--name={name}", *way, *self._bounds(limits), f"localhost/{name}"]
            )
            if code == 0:
                if any(_UNBOUNDED.search(line) for line in lines):
                    message = f"{self.name} cannot bound a container's memory here"
                    raise NoContainers(message)
                self._way = way
                return ""
            said = _said(lines)
            self._call(["rm", "--force", "--volumes", name])
        return said

    def _ways(self) -> list[tuple[str, ...]]:
        return [()]

    def _bounds(self, limits: Limits) -> list[str]:
        writable = f"rw,nosuid,nodev,exec,mode=1777,size={limits.memory // 2}"
        return [
            "--pull=never",
            "--network=none",
            "--read-only",
            *(f"--tmpfs={folder}:{writable}" for folder in dict.fromkeys(("/tmp", *limits.volumes))),  # noqa: S108
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            f"--pids-limit={_PROCESSES}",
            f"--memory={limits.memory}",
            f"--memory-swap={limits.memory}",
            "--no-healthcheck",
            *self._options,
        ]

    def _call(
        self,
        arguments: Sequence[str],
        *,
        timeout: float = _SHORT,
        output: Output | None = None,
        folder: Path = Path("/"),
    ) -> tuple[int | None, list[str]]:
        """Run the program; return its exit code, None where it took too long, and its first lines.

        Raises:
            CannotRun: it cannot be started.
        """
        lines: list[str] = []

        def kept(line: str) -> None:
            if len(lines) < _MOST_LINES:
                lines.append(line)

        with tempfile.TemporaryDirectory(prefix="builder-runtime-") as own:
            try:
                environ = {"PATH": _PATH, **self._environ, **self._configuration(Path(own))}
                code = self._runner(
                    [self.name, *self._first_options(Path(own)), *arguments],
                    env=environ,
                    cwd=folder,
                    timeout=timeout,
                    output=output or kept,
                    name=self.name,
                )
            except BuildFailed as error:
                if isinstance(error.__cause__, OSError):
                    raise CannotRun(error.what) from error
                return None, lines
        return code, lines

    def _configuration(self, folder: Path) -> dict[str, str]:
        """Return the variables that keep the user's own configuration away from containers."""
        raise NotImplementedError

    def _first_options(self, _folder: Path) -> list[str]:
        """Return the options before a command; what they name is in the folder of `_configuration`."""
        return []

    def _written(self, content: Content, name: str, folder: Path) -> list[str]:
        """Write an image into a folder; return the arguments that take it from there."""
        raise NotImplementedError


class Podman(CommandLine):
    """podman: no daemon; what a container prints is in a file that is cut at 1 MB."""

    name = "podman"
    _options = (
        "--read-only-tmpfs=false",
        "--http-proxy=false",
        "--systemd=false",
        "--log-driver=k8s-file",
        "--log-opt=max-size=1mb",
    )

    def _ways(self) -> list[tuple[str, ...]]:
        limits = (("nofile", resource.RLIMIT_NOFILE, _MOST_FILES), ("nproc", resource.RLIMIT_NPROC, _PROCESSES))
        lower = tuple(f"--ulimit={name}={_limit(which, most)}:{_limit(which, most)}" for name, which, most in limits)
        return [(), ("--ulimit=host",), lower, ("--runtime=runc", *lower)]

    def _bounds(self, limits: Limits) -> list[str]:
        # Ends it even where nobody is left who would.
        return [*super()._bounds(limits), f"--timeout={limits.seconds}"]

    def _first_options(self, folder: Path) -> list[str]:
        return [f"--default-mounts-file={folder}/mounts.conf"] if sys.platform == "linux" else []

    def _configuration(self, folder: Path) -> dict[str, str]:
        (folder / "containers.conf").touch()
        (folder / "mounts.conf").touch()
        return {"CONTAINERS_CONF": str(folder / "containers.conf"), "TMPDIR": str(folder)}

    def _written(self, content: Content, name: str, folder: Path) -> list[str]:
        write_layout(folder / name, name, content)
        # podman 4 calls the image after the folder, relative to the working directory; 5 as the layout does.
        return ["pull", "--quiet", f"oci:{name}:{name}"]


class Docker(CommandLine):
    """Docker, if its daemon answers."""

    name = "docker"
    _options = ("--log-driver=json-file", "--log-opt=max-size=1m", "--log-opt=max-file=1")

    def available(self) -> bool:
        """Return whether the program is installed, and a daemon answers it."""
        if not super().available():
            return False
        self._find()
        return self._call(["version", "--format={{.Server.Version}}"])[0] == 0

    def _find(self) -> None:
        """Find the daemon that the user's own configuration names, before that is kept away."""
        if self._environ.get("DOCKER_HOST"):
            return
        lines: list[str] = []
        argv = ["docker", "context", "inspect", "--format={{.Endpoints.docker.Host}}"]
        with suppress(BuildFailed):
            self._runner(
                argv, env={"PATH": _PATH, **self._environ}, cwd=Path("/"), timeout=_SHORT, output=lines.append,
                name=self.name,
            )  # fmt: skip
        if lines and re.fullmatch(r"(?:unix|npipe|tcp|ssh)://\S+", lines[0]):
            self._environ["DOCKER_HOST"] = lines[0]

    def _configuration(self, folder: Path) -> dict[str, str]:
        return {"DOCKER_CONFIG": str(folder)}

    def _written(self, content: Content, name: str, folder: Path) -> list[str]:
        write_archive(folder / "image.tar", f"localhost/{name}:latest", content)
        return ["load", "--quiet", "--input=image.tar"]


def _limit(which: int, most: int) -> int:
    hard = resource.getrlimit(which)[1]
    return most if hard == resource.RLIM_INFINITY else min(hard, most)


def _said(lines: Sequence[str]) -> str:
    """Return a runtime's own last words."""
    words = [line for line in lines if line.strip() and not line.startswith("Run 'docker run --help'")]
    return one_line(words[-1] if words else "it did not say why", 300)
