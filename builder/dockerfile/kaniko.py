"""Kaniko: runs a Dockerfile in its own root file system, without a daemon, inside the builder image."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.dockerfile.engine import BoundedOutput, Printed, failure
from builder.errors import EngineKilled, InvalidSettings, PermissionRefused
from builder.package_index import certificate, copy_bundle, pip_config, uv_config
from builder.process import Runner, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from builder.dockerfile.engine import BuildJob
    from builder.errors import BuilderError
    from builder.process import Output
    from builder.reference import Platform


@dataclass(frozen=True, slots=True)
class Files:
    """Our own files of one build.

    Attributes:
        folder: where they are, below Kaniko's own folder.
        docker_config: folder of a Docker config.json, perhaps with no credential in it.
        ca_bundle: the CA bundle of the network; None for the system's.
        seen: configuration files outside that folder, for RUN steps.
    """

    folder: Path
    docker_config: Path
    ca_bundle: Path | None
    seen: tuple[Path, ...]


@contextmanager
def staged(job: BuildJob, root: Path, etc: Path) -> Iterator[Files]:
    """Put a build's files where Kaniko leaves them alone, and remove them afterwards.

    Args:
        job: the build.
        root: Kaniko's own folder.
        etc: the folder in which RUN steps look for pip's and uv's configuration.

    Raises:
        InvalidSettings: a file that the settings name cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=root) as name:
        folder = Path(name)
        folder.chmod(0o755)  # a RUN step of another user reads the CA bundle
        docker_config = folder / "docker"
        docker_config.mkdir(mode=0o700)
        if job.docker_config and (job.docker_config / "config.json").exists():
            shutil.copyfile(job.docker_config / "config.json", docker_config / "config.json")
        ca_bundle = _copied(job.network.ca_bundle, folder / "ca-bundle.pem")
        trusted = certificate(job.network)
        trusted = _copied(trusted, folder / "pip.pem") if trusted != job.network.ca_bundle else ca_bundle
        texts = {
            etc / "pip.conf": pip_config(job.network, str(trusted or "")),
            etc / "uv" / "uv.toml": uv_config(job.network),
        }
        with ExitStack() as stack:
            # A file mounted there is left as it is, and Kaniko leaves mounts out of the image by itself.
            seen = tuple(path for path, text in texts.items() if text and not _is_mounted(path))
            for path in seen:
                stack.enter_context(_written(path, texts[path]))
            yield Files(folder, docker_config, ca_bundle, seen)


def _copied(source: Path | None, target: Path) -> Path | None:
    """Copy a file to where Kaniko leaves it alone and every RUN step can read it; None stays None."""
    if source is None:
        return None
    copy_bundle(source, target)
    return target


def _is_mounted(path: Path) -> bool:
    """Return whether something is mounted on exactly this path (proc(5), mountinfo's fifth field)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == str(path) for line in lines)


@contextmanager
def _written(path: Path, text: str) -> Iterator[None]:
    """Give a file this content for the duration of the context, and restore it afterwards."""
    before = path.read_bytes() if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, text.encode())
    try:
        yield
    finally:
        _replace(path, before)


def _replace(path: Path, content: bytes | None) -> None:
    """Write a new file in a file's place, through no link that a RUN step may have left there; None removes it."""
    path.unlink(missing_ok=True)
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
            file.write(content)


_KILLED = -9
# logrus' text format: time="…" level=info msg="…", with Go's quoting.
_LOGGED = re.compile(r'time="[^"]*" level=(?P<level>[a-z]+) msg=(?P<message>"(?:[^"\\]|\\.)*"?|\S*)')
_INSTRUCTION = re.compile(
    r"(?:ADD|COPY|RUN|USER|WORKDIR|ENV|ARG|LABEL|CMD|ENTRYPOINT|EXPOSE|VOLUME|SHELL|HEALTHCHECK)\s"
)
# Every instruction is logged up to four times, and the same two lines begin every build.
_NOISE = re.compile(r"(?:Cmd|Args|Running): |active feature flags: |credential providers by priority: ")
# What it ends with, after the last log line and not in the log's format.
_OWN_WORDS = re.compile(r"error (?:building|pushing|resolving|checking|changing) |panic: |fatal error: ")
_STEP_FAILED = "failed to execute command"
_WRAPPING = re.compile(
    r"^(?:error building image: |error building stage: |failed to execute command: |"
    r"unable to complete operation after \d+ attempts, last error: |waiting for process to exit: )+"
)


class KanikoOutput:
    """Takes Kaniko's lines; knows afterwards why it failed.

    Args:
        output: called with each line that is worth a reader's time.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._step = ""
        self._printed = Printed()
        self._words = ""  # Kaniko's own last words

    def __call__(self, line: str) -> None:
        """Take one line."""
        logged = _LOGGED.fullmatch(line)
        if not logged:
            self._take_raw(line)
            return
        level, message = logged["level"], _unquoted(logged["message"])
        if _NOISE.match(message):
            return
        if _INSTRUCTION.match(message):
            self._step = message
            self._printed.clear()
        if level in {"error", "fatal", "panic"}:
            self._words = message
        self._output(message if level == "info" else f"{level}: {message}")

    def _take_raw(self, line: str) -> None:
        if _OWN_WORDS.match(line):
            self._words = line
        else:
            self._printed.take(line)
        self._output(line)

    def failure(self, code: int, platform: Platform) -> BuilderError:
        """Return the error for an executor that ended with `code`."""
        if code == _KILLED:
            message = f"Kaniko was killed while it built {platform}."
            return EngineKilled(message, remedy="Most often memory ran out: raise the container's memory limit.")
        words = self._words or self._printed.last
        in_step = _STEP_FAILED in words
        return failure(
            "Kaniko",
            platform,
            _WRAPPING.sub("", words) or f"exit code {code}",
            step=self._step if in_step else "",
            printed=self._printed if in_step else None,
        )


def _unquoted(text: str) -> str:
    """Return what Go quoted; its few escapes that JSON does not know stay as they are."""
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text.strip('"')


_ROOT = Path("/kaniko")
_FORBIDDEN = Path("/tmp")  # noqa: S108  # a context below it keeps it from being unpacked, and apt-get fails
# Leftovers of a failed build below Kaniko's folder, and RUN steps' cache mounts, perhaps of another author.
_LEFT = ("stages", "bases", "deps", "layers", "buildcontext", "swap", "caches")


class Kaniko:
    """The engine of the builder image.

    Args:
        root: the folder that holds the executor and that Kaniko leaves alone.
        etc: the folder in which RUN steps look for pip's and uv's configuration.
        runner: runs the executor; see `builder.process.run`.
    """

    name = "kaniko"

    def __init__(self, *, root: Path = _ROOT, etc: Path = Path("/etc"), runner: Runner = run) -> None:
        self._root = root
        self._executor = root / "executor"
        self._etc = etc
        self._runner = runner

    def available(self) -> bool:
        """Return whether this is the builder image, with Kaniko in it.

        The image's mark is checked as well as the executor: Kaniko deletes the file system it runs in, so it is never
        chosen on a machine that merely has its program.
        """
        return os.access(self._executor, os.X_OK) and (self._root / "builder").is_dir()

    def build(self, job: BuildJob, output: Output) -> None:
        """Build one image into `job.layout`.

        Raises:
            BuildFailed: the Dockerfile cannot be built, or took too long.
            ServiceUnavailable: the registry of the base image is unavailable.
            TryAgain: a disk is full, or the executor was killed, as when memory runs out.
            InvalidSettings: the workspace is not where Kaniko leaves it alone, or a file of the settings cannot be
                read.
            PermissionRefused: this is not root.
        """
        if os.geteuid() != 0:
            message = "Kaniko has to run as root: it unpacks the base image into its own root file system."
            raise PermissionRefused(message, remedy="Run only the build phase's container as user 0.")
        for path in (job.context, job.dockerfile, job.layout):
            self._check_place(path)
        said = KanikoOutput(BoundedOutput(output))
        with self._alone(), staged(job, self._root, self._etc) as files:
            job.layout.mkdir(parents=True, exist_ok=True)
            code = self._runner(
                self._argv(job, files),
                env=self._environment(job, files),
                cwd=self._root,
                timeout=job.timeout,
                output=said,
                name="Kaniko",
            )
        if code:
            raise said.failure(code, job.platform)
        _make_readable(job.layout)

    def _check_place(self, path: Path) -> None:
        place = path.resolve()
        if place.is_relative_to(self._root.resolve()) and not place.is_relative_to(_FORBIDDEN):
            return
        message = f"{path} is not below {self._root}, and Kaniko deletes everything elsewhere."
        remedy = f"Set BUILDER_WORKSPACE to a folder below {self._root}; below /tmp apt-get would fail as well."
        raise InvalidSettings(message, remedy=remedy)

    def _argv(self, job: BuildJob, files: Files) -> list[str]:
        argv = [
            str(self._executor),
            f"--context=dir://{job.context}",
            f"--dockerfile={job.dockerfile}",
            f"--custom-platform={job.platform}",
            f"--oci-layout-path={job.layout}",
            "--no-push",
            "--no-push-cache",
            "--reproducible",
            "--compressed-caching=false",  # else every layer is in memory twice: docs/decisions/0008
            "--pre-cleanup",  # an earlier build that was ended by force has left its root as it was
            "--cleanup",
            "--log-format=text",
            "--verbosity=info",
        ]
        if job.cache:
            argv += ["--cache", f"--cache-repo={job.cache}"]
        argv += [f"--insecure-registry={host}" for host in sorted(job.network.insecure_registries)]
        argv += [f"--ignore-path={path}" for path in files.seen]
        # Without a value, Kaniko takes it from its environment: a proxy's password does not belong in argv.
        argv += [f"--build-arg={name}" for name in self._proxies(job)]
        if files.ca_bundle:
            # Seen by the RUN steps of a Dockerfile that says ARG SSL_CERT_FILE; others do not notice.
            argv.append("--build-arg=SSL_CERT_FILE")
        if self._is_first_process():
            argv.append("--force")
        return argv

    @staticmethod
    def _proxies(job: BuildJob) -> Mapping[str, str]:
        """Return the proxy variables in both spellings: programs disagree on which one counts."""
        return {spelt: value for name, value in job.network.proxies.items() for spelt in (name, name.lower())}

    def _is_first_process(self) -> bool:
        """Return whether the container's first process is one of ours, so that this is a container for certain.

        Kaniko recognises containers by traces that not every runtime leaves (no service account, cgroup v2, a root that
        is no overlay), and refuses elsewhere unless it is forced.
        """
        if os.getpid() == 1:
            return True
        try:
            return Path("/proc/1/exe").resolve().is_relative_to(self._root)
        except OSError:
            return False

    def _environment(self, job: BuildJob, files: Files) -> Mapping[str, str]:
        certificates = self._root / "ssl" / "certs"
        return {
            "PATH": f"/usr/local/bin:{self._root}",  # where the image keeps its credential helpers
            "HOME": str(files.folder),
            "USER": "root",  # it needs its user's name, and has no C library to look it up
            "DOCKER_CONFIG": str(files.docker_config),
            "SSL_CERT_DIR": str(certificates),
            **({"SSL_CERT_FILE": str(files.ca_bundle)} if files.ca_bundle else {}),
            **self._proxies(job),
            # Without it, --reproducible makes the base's layers anew, and no registry could mount them.
            "FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS": "true",
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Remove an earlier build's leftovers before a build, and its own afterwards."""
        try:
            self._forget()
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        (self._root / "Dockerfile").unlink(missing_ok=True)
        for name in _LEFT:
            shutil.rmtree(self._root / name, ignore_errors=True)


def _make_readable(layout: Path) -> None:
    """Let every user read a layout: the push phase's container is not root."""
    for _, _, names, folder in os.fwalk(layout):
        os.fchmod(folder, 0o755)
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.fchmod(file, 0o644)
                os.close(file)
