"""Kaniko: runs a Dockerfile in its own root file system, without a daemon, inside the builder image.

Facts of the executor (https://github.com/osscontainertools/kaniko, v1.28) that shape this module:

- RUN steps run in Kaniko's own root. Before and after a build everything in it is deleted, except the folder that holds
  the executor, every mount point, and what `--ignore-path` names; the same paths are never part of the image. So the
  context, the layout and our own files stand below that folder, and a file such as /etc/pip.conf can be seen by RUN
  steps without a mount and without being in the image.
- A RUN step's environment is the image's own; of the executor's it sees nothing. Proxies are predefined build
  arguments: RUN steps see them, the image's history does not.
- With --cache it would also push cache layers, even with --no-push, unless --no-push-cache is there.
- It writes its layout's blobs readable by their owner alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.failure import failure
from builder.build.pip_config import certificate, pip_config
from builder.build.process import Runner, run
from builder.errors import InvalidSettings, PermissionRefused, TryAgain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from builder.build.engine import BuildJob, Output
    from builder.errors import BuilderError
    from builder.reference import Platform

_ROOT = Path("/kaniko")
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


@dataclass(frozen=True, slots=True)
class _Staged:
    """Our own files of one build, below Kaniko's folder."""

    folder: Path
    docker_config: Path
    ca_bundle: Path | None
    pip_config: Path | None


class Kaniko:
    """The engine of the builder image.

    Args:
        root: the folder that holds the executor and that Kaniko leaves alone.
        pip_config: where RUN steps look for pip's configuration.
        runner: runs the executor; see `builder.build.process.run`.
    """

    name = "kaniko"

    def __init__(self, *, root: Path = _ROOT, pip_config: Path = Path("/etc/pip.conf"), runner: Runner = run) -> None:
        self._root = root
        self._executor = root / "executor"
        self._pip_config = pip_config
        self._runner = runner

    def available(self) -> bool:
        """Return whether this is the builder image, with Kaniko in it.

        The image's mark is asked for as well as the executor: Kaniko deletes the file system it runs in, so it is never
        taken on a machine where somebody merely keeps its program.
        """
        return os.access(self._executor, os.X_OK) and (self._root / "builder").is_dir()

    def build(self, job: BuildJob, output: Output) -> None:
        """Build one image into `job.layout`.

        Raises:
            BuildFailed: the Dockerfile cannot be built, or took too long.
            ServiceUnavailable: the registry of the base image is away.
            TryAgain: a disk is full, or the executor was killed, as when memory runs out.
            InvalidSettings: the workspace does not stand where Kaniko leaves it alone, or a file of the settings
                cannot be read.
            PermissionRefused: this is not root.
        """
        if os.geteuid() != 0:
            message = "Kaniko has to run as root: it unpacks the base image into its own root file system."
            raise PermissionRefused(message, remedy="Run the build phase's container as user 0, and no other one.")
        for path in (job.context, job.dockerfile, job.layout):
            self._check_place(path)
        said = _Said(output)
        with self._staged(job) as staged:
            job.layout.mkdir(parents=True, exist_ok=True)
            code = self._runner(
                self._argv(job, staged),
                env=self._environment(job, staged),
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
        if place.is_relative_to(self._root.resolve()) and not place.is_relative_to("/tmp"):  # noqa: S108  # refused
            return
        message = f"{path} does not stand below {self._root}, and Kaniko deletes what stands elsewhere."
        remedy = f"Set BUILDER_WORKSPACE to a folder below {self._root}; under /tmp apt-get would fail as well."
        raise InvalidSettings(message, remedy=remedy)

    def _argv(self, job: BuildJob, staged: _Staged) -> list[str]:
        argv = [
            str(self._executor),
            f"--context=dir://{job.context}",
            f"--dockerfile={job.dockerfile}",
            f"--custom-platform={job.platform}",
            f"--oci-layout-path={job.layout}",
            "--no-push",
            "--no-push-cache",
            "--reproducible",
            "--cleanup",
            "--log-format=text",
            "--verbosity=info",
        ]
        if job.cache:
            argv += ["--cache", f"--cache-repo={job.cache}"]
        argv += [f"--insecure-registry={host}" for host in sorted(job.network.insecure_registries)]
        if staged.pip_config:
            argv.append(f"--ignore-path={staged.pip_config}")
        # Without a value it is the one of Kaniko's environment: a proxy's password does not belong into argv.
        argv += [f"--build-arg={name}" for name in self._proxies(job)]
        if staged.ca_bundle:
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

    def _environment(self, job: BuildJob, staged: _Staged) -> Mapping[str, str]:
        certificates = self._root / "ssl" / "certs"
        return {
            "PATH": f"/usr/local/bin:{self._root}",  # where the image keeps its credential helpers
            "HOME": str(staged.folder),
            "USER": "root",  # it asks for its user, and has no C library to look it up
            "DOCKER_CONFIG": str(staged.docker_config),
            "SSL_CERT_DIR": str(certificates),
            **({"SSL_CERT_FILE": str(staged.ca_bundle)} if staged.ca_bundle else {}),
            **self._proxies(job),
            # Without it --reproducible makes the base's layers anew, and no registry could mount them.
            "FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS": "true",
        }

    @contextmanager
    def _staged(self, job: BuildJob) -> Iterator[_Staged]:
        """Put our files where Kaniko leaves them alone, and take them away again."""
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._root) as name:
            folder = Path(name)
            folder.chmod(0o755)  # a RUN step of another user reads the CA bundle
            docker_config = folder / "docker"
            docker_config.mkdir(mode=0o700)
            if job.docker_config and (job.docker_config / "config.json").exists():
                shutil.copyfile(job.docker_config / "config.json", docker_config / "config.json")
            ca_bundle = _copied(job.network.ca_bundle, folder / "ca-bundle.pem")
            trusted = certificate(job.network)
            trusted = _copied(trusted, folder / "pip.pem") if trusted != job.network.ca_bundle else ca_bundle
            text = pip_config(job.network, str(trusted or ""))
            if not text or _is_mounted(self._pip_config):
                yield _Staged(folder, docker_config, ca_bundle, None)
                return
            with _written(self._pip_config, text):
                yield _Staged(folder, docker_config, ca_bundle, self._pip_config)


class _Said:
    """Kaniko's output: handed on without its noise, and remembered as far as a failure needs it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._step = ""
        self._printed = ""  # the last line of the step's own program
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
            self._step, self._printed = message, ""
        if level in {"error", "fatal", "panic"}:
            self._words = message
        self._output(message if level == "info" else f"{level}: {message}")

    def _take_raw(self, line: str) -> None:
        if _OWN_WORDS.match(line):
            self._words = line
        elif line.strip():
            self._printed = line
        self._output(line)

    def failure(self, code: int, platform: Platform) -> BuilderError:
        """Return the error for an executor that ended with `code`."""
        if code == _KILLED:
            message = f"Kaniko was killed while it built {platform}."
            return TryAgain(message, remedy="Most often memory ran out: raise the container's memory limit.")
        words = self._words or self._printed
        in_step = _STEP_FAILED in words
        return failure(
            "Kaniko",
            platform,
            _WRAPPING.sub("", words) or f"exit code {code}",
            step=self._step if in_step else "",
            output=self._printed if in_step else "",
        )


def _unquoted(text: str) -> str:
    """Return what Go quoted; its few escapes that JSON does not know stay as they are."""
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text.strip('"')


def _copied(source: Path | None, target: Path) -> Path | None:
    """Copy a file to where Kaniko leaves it alone and every RUN step can read it; None stays None."""
    if source is None:
        return None
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        message = f"The CA bundle {source} cannot be read: {error.strerror}."
        raise InvalidSettings(message, remedy="Name a readable file of certificates in SSL_CERT_FILE.") from error
    target.chmod(0o644)
    return target


def _is_mounted(path: Path) -> bool:
    """Return whether something is mounted on exactly this path (proc(5), mountinfo's fifth field)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == str(path) for line in lines)


@contextmanager
def _written(path: Path, text: str) -> Iterator[None]:
    """Give a file this content for a while; afterwards it is as it was."""
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


def _make_readable(layout: Path) -> None:
    """Let every user read a layout: the push phase's container is not root."""
    for _, _, names, folder in os.fwalk(layout):
        os.fchmod(folder, 0o755)
        for name in names:
            if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.fchmod(file, 0o644)
                os.close(file)
