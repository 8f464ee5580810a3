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

import os
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from builder.build.bounded_output import BoundedOutput
from builder.build.kaniko_files import Files, staged
from builder.build.kaniko_output import KanikoOutput
from builder.build.process import Runner, run
from builder.errors import InvalidSettings, PermissionRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from builder.build.engine import BuildJob, Output

_ROOT = Path("/kaniko")
_FORBIDDEN = Path("/tmp")  # noqa: S108  # a context below it keeps it from being unpacked, and apt-get fails
# What a build that failed leaves below Kaniko's folder, and RUN steps' cache mounts: of another author, perhaps.
_LEFT = ("stages", "bases", "deps", "layers", "buildcontext", "swap", "caches")


class Kaniko:
    """The engine of the builder image.

    Args:
        root: the folder that holds the executor and that Kaniko leaves alone.
        etc: the folder in which RUN steps look for pip's and uv's configuration.
        runner: runs the executor; see `builder.build.process.run`.
    """

    name = "kaniko"

    def __init__(self, *, root: Path = _ROOT, etc: Path = Path("/etc"), runner: Runner = run) -> None:
        self._root = root
        self._executor = root / "executor"
        self._etc = etc
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
        message = f"{path} does not stand below {self._root}, and Kaniko deletes what stands elsewhere."
        remedy = f"Set BUILDER_WORKSPACE to a folder below {self._root}; under /tmp apt-get would fail as well."
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
            "--compressed-caching=false",  # else every layer stands in memory twice: docs/decisions/0008
            "--pre-cleanup",  # an earlier build that was ended by force has left its root as it was
            "--cleanup",
            "--log-format=text",
            "--verbosity=info",
        ]
        if job.cache:
            argv += ["--cache", f"--cache-repo={job.cache}"]
        argv += [f"--insecure-registry={host}" for host in sorted(job.network.insecure_registries)]
        argv += [f"--ignore-path={path}" for path in files.seen]
        # Without a value it is the one of Kaniko's environment: a proxy's password does not belong into argv.
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
            "USER": "root",  # it asks for its user, and has no C library to look it up
            "DOCKER_CONFIG": str(files.docker_config),
            "SSL_CERT_DIR": str(certificates),
            **({"SSL_CERT_FILE": str(files.ca_bundle)} if files.ca_bundle else {}),
            **self._proxies(job),
            # Without it --reproducible makes the base's layers anew, and no registry could mount them.
            "FF_KANIKO_REPRODUCIBLE_PRESERVE_BASE_LAYERS": "true",
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let a build find nothing of an earlier one, and leave nothing to a later one."""
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
