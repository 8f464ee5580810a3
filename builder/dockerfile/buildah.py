"""Buildah: runs a Dockerfile without a daemon, on a laptop, in the tests, and wherever Kaniko is absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builder.dockerfile.engine import BoundedOutput, Printed, failure
from builder.dockerfile.parser import Dockerfile, Instruction, opens_heredoc
from builder.errors import BuilderError, BuildFailed, EngineKilled, InvalidSettings, InvalidVersion
from builder.masking import one_line
from builder.package_index import certificate, copy_bundle, pip_config, uv_config
from builder.process import Runner, run
from builder.reference import Reference, is_loopback

if TYPE_CHECKING:
    from builder.dockerfile.engine import BuildJob
    from builder.process import Output
    from builder.reference import Platform


# Where RUN steps see the CA bundles. Buildah leaves the empty folder in the image, and an empty /etc/pip.conf if the
# base has none, but never their content.
SEEN = Path("/run/builder")
SEEN_BUNDLE = SEEN / "ca-bundle.pem"
_SEEN_PIP_BUNDLE = SEEN / "pip.pem"


@dataclass(frozen=True, slots=True)
class Files:
    """One run's own files.

    Attributes:
        folder: all of them, and room for temporary ones; only this user can enter it.
        home: an empty home folder.
        authfile: the credentials for pulls, perhaps none.
        policy: the signature policy, which hosts often lack.
        registries: which hosts are reached over plain HTTP.
        containers: an empty containers.conf.
        image_id: file that Buildah writes the image's id to.
        ca_bundle: the CA bundle for Buildah's own pulls; None for the system's.
        volumes: pairs of a file or folder here and where RUN steps see it.
    """

    folder: Path
    home: Path
    authfile: Path
    policy: Path
    registries: Path
    containers: Path
    image_id: Path
    ca_bundle: Path | None
    volumes: tuple[tuple[Path, Path], ...]


@contextmanager
def staged(job: BuildJob, parent: Path) -> Iterator[Files]:
    """Write the files of a run into a new folder below `parent`, and remove it afterwards.

    Raises:
        InvalidSettings: a file that the settings name cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix=".buildah-", dir=parent) as name:
        folder = Path(name)
        home = folder / "home"
        home.mkdir()
        yield Files(
            folder=folder,
            home=home,
            authfile=_authfile(job, folder / "auth.json"),
            policy=_written(folder / "policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]})),
            registries=_written(folder / "registries.conf", registries_conf(job)),
            containers=_written(folder / "containers.conf", ""),
            image_id=folder / "image-id",
            ca_bundle=job.network.ca_bundle,
            volumes=tuple(_volumes(job, folder)),
        )


def registries_conf(job: BuildJob) -> str:
    """Return a registries.conf: Docker Hub for short names; plain HTTP for the named hosts and for loopback.

    Loopback has a host for every port, so those that this job can meet are listed: its Dockerfile's and its cache's.
    """
    hosts = {*job.network.insecure_registries}
    images = Dockerfile.parse(job.dockerfile.read_text(errors="replace")).images(_platform_arguments(job))
    for image in images:
        try:
            hosts.add(Reference.parse(image).repository.host)
        except InvalidVersion:
            continue  # Buildah will say so
    if job.cache:
        hosts.add(job.cache.host)
    insecure = sorted(host for host in hosts if host in job.network.insecure_registries or is_loopback(host))
    entries = "".join(f"\n[[registry]]\nlocation = {json.dumps(host)}\ninsecure = true\n" for host in insecure)
    return f'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "disabled"\n{entries}'


def _platform_arguments(job: BuildJob) -> dict[str, str]:
    platform = job.platform
    return {
        "TARGETPLATFORM": str(platform),
        "TARGETOS": platform.os,
        "TARGETARCH": platform.architecture,
        "TARGETVARIANT": platform.variant,
    }


def _authfile(job: BuildJob, path: Path) -> Path:
    """Write the pull credentials: those of the job's Docker config, or none."""
    source = job.docker_config / "config.json" if job.docker_config else None
    content = "{}"
    if source is not None and source.is_file():
        try:
            content = source.read_text()
        except (OSError, UnicodeDecodeError) as error:
            message = f"{source} cannot be read: {type(error).__name__}."
            raise InvalidSettings(message, remedy="Name a folder with a config.json in BUILD_DOCKER_CONFIG.") from error
    return _written(path, content)


def _volumes(job: BuildJob, folder: Path) -> Iterator[tuple[Path, Path]]:
    network = job.network
    trusted = certificate(network)
    seen = folder / "seen"
    if network.ca_bundle or trusted:
        seen.mkdir()
        seen.chmod(0o755)  # a RUN step of another user reads it
        yield seen, SEEN
    if network.ca_bundle:
        copy_bundle(network.ca_bundle, seen / SEEN_BUNDLE.name)
    pip_bundle = SEEN_BUNDLE if network.ca_bundle else None
    if trusted and trusted != network.ca_bundle:
        copy_bundle(trusted, seen / _SEEN_PIP_BUNDLE.name)
        pip_bundle = _SEEN_PIP_BUNDLE
    if text := pip_config(network, str(pip_bundle or "")):
        yield _written(folder / "pip.conf", text, mode=0o644), Path("/etc/pip.conf")
    if text := uv_config(network):
        yield _written(folder / "uv.toml", text, mode=0o644), Path("/etc/uv/uv.toml")


def _written(path: Path, text: str, *, mode: int = 0o600) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
_KILLED = frozenset({-signal.SIGKILL, 128 + signal.SIGKILL})
_SHORT = 60.0
_SAFE_MOUNTS = (1, 38, 1)
# The releases that know what BuildKit's Dockerfiles may have. Kaniko's fork has here-documents since 1.25.4,
# and ignores --link.
_SINCE = {"here-documents": (1, 33), "--link": (1, 41)}
_VERSION = re.compile(r"buildah version (\d+)\.(\d+)\.(\d+)")
_SOURCELESS = re.compile(
    r"type=(?:cache|tmpfs|secret|ssh)"
    r"(?:,(?:target|dst|destination|sharing|mode|uid|gid|required|tmpfs-size|size)=[A-Za-z0-9_./-]+"
    r"|,id=[A-Za-z0-9_-]+|,ro|,rw|,readonly|,required)*"
)
_STEP = re.compile(r"(?:\[\d+/\d+\] )?STEP \d+(?:/\d+)?: (.*)")
_FAILED_STEP = re.compile(r'Error: building at STEP "(?P<step>.*?)": (?P<said>.*)')
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_EXIT_STATUS = re.compile(r"(?:while running runtime: )?exit status (\d+)")
_NOISE = re.compile(
    r"subprocess exited |\[Warning\] one or more build args were not consumed|"
    r'time="[^"]*" level=(?:warning|info|debug) '
)
_UNKNOWN_INSTRUCTION = re.compile(r'Unknown instruction: "([^"]*)"')


class Buildah:
    """The engine that needs no daemon and no image of its own.

    Args:
        runner: runs programs; see `builder.process.run`.
        storage: folder for images and the layer cache; None for the user's own container storage.
    """

    name = "buildah"

    def __init__(self, *, runner: Runner = run, storage: Path | None = None) -> None:
        self._runner = runner
        self._storage = storage
        self._namespaces: tuple[str, ...] | None = None

    def available(self) -> bool:
        """Return whether Buildah is installed."""
        return shutil.which("buildah", path=_PATH) is not None

    def build(self, job: BuildJob, output: Output) -> None:
        """Build one image into `job.layout`.

        Raises:
            BuildFailed: the Dockerfile cannot be built, or took too long.
            ServiceUnavailable: the registry of the base image is unavailable.
            TryAgain: a disk is full, or Buildah was killed, as when memory runs out.
            InvalidSettings: a file of the settings cannot be read.
            InvalidVersion: the Dockerfile has no FROM.
        """
        job.layout.parent.mkdir(parents=True, exist_ok=True)
        with staged(job, job.layout.parent) as files:
            self._refuse(job, files)
            output = BoundedOutput(output)
            said = _BuildahOutput(output)
            try:
                code = self._run(self._build_argv(job, files), job, files, said, timeout=job.timeout)
            except BaseException:
                self._remove_containers(job, files)
                raise
            if code:
                raise said.failure(code, job.platform)
            said = _BuildahOutput(output)
            # The layout's name alone: a colon in a path before it would be taken for the begin of a tag.
            argv = ["push", "--quiet", f"--signature-policy={files.policy}", "--format=oci"]
            argv += [self._image_id(files.image_id), f"oci:{job.layout.name}"]
            if code := self._run(argv, job, files, said, timeout=job.timeout):
                raise said.failure(code, job.platform)

    @staticmethod
    def _image_id(path: Path) -> str:
        """Return the image's id, which a RUN step that left its chroot could have replaced by another argument."""
        found = path.read_text(errors="replace").strip()
        if not _IMAGE_ID.fullmatch(found):
            message = f"Buildah wrote {found[:100]!r} in place of the image's id."
            raise BuildFailed(message, remedy="Build again. The log may say why.")
        return found

    def _refuse(self, job: BuildJob, files: Files) -> None:
        """Refuse features that this Buildah does not support, and mounts that it does not confine to the build."""
        dockerfile = Dockerfile.parse(job.dockerfile.read_text(errors="replace"))
        mounts = [step for step, value in dockerfile.mounts() if not _SOURCELESS.fullmatch(value)]
        newer = [(step, what) for step in dockerfile.instructions for what in _newer(step)]
        if not mounts and not newer:
            return
        lines: list[str] = []
        self._run(["--version"], job, files, lines.append, timeout=_SHORT)
        found = _VERSION.search("\n".join(lines))
        version = tuple(int(part) for part in found.groups()) if found else (0,)
        this = f"this Buildah ({'.'.join(map(str, version))})"
        if mounts and version < _SAFE_MOUNTS:
            message = (
                f"Line {mounts[0].first} of the Dockerfile has a RUN --mount that names a source, and {this} lets such "
                "a mount reach any file of the machine (CVE-2024-1753)."
            )
            raise BuildFailed(message, remedy="Use COPY --from instead, or install Buildah 1.38.1 or newer.")
        for step, what in newer:
            if version < _SINCE[what]:
                one = "a here-document (<<)" if what == "here-documents" else f"{step.keyword} --link"
                message = f"Line {step.first} of the Dockerfile has {one}, which {this} does not support."
                raise BuildFailed(message, remedy=_instead(what))

    def _build_argv(self, job: BuildJob, files: Files) -> list[str]:
        argv = [
            "build",
            "--isolation=chroot",
            "--network=host",
            "--cap-drop=CAP_SYS_CHROOT",
            "--layers",
            "--force-rm",
            "--format=oci",
            f"--platform={job.platform}",
            f"--file={job.dockerfile}",
            f"--iidfile={files.image_id}",
            f"--authfile={files.authfile}",
            f"--signature-policy={files.policy}",
        ]
        argv += [f"--volume={source}:{target}:ro" for source, target in files.volumes]
        if job.network.ca_bundle:
            # Seen by the RUN steps of a Dockerfile that says ARG SSL_CERT_FILE; others do not notice.
            argv.append(f"--build-arg=SSL_CERT_FILE={SEEN_BUNDLE}")
        if job.cache:
            argv.append(f"--cache-from={job.cache}")
        return [*argv, str(job.context)]

    def _run(self, arguments: Sequence[str], job: BuildJob, files: Files, output: Output, *, timeout: float) -> int:
        if self._namespaces is None:
            self._namespaces = self._usable_namespaces(job, files)
            if not self._namespaces:
                output("no PID namespace can be made here: RUN steps see this machine's processes")
        return self._runner(
            [*self._namespaces, "buildah", *self._storage_flags(), *arguments],
            env=self._environment(job, files),
            cwd=job.layout.parent,
            timeout=timeout,
            output=output,
            name="Buildah",
        )

    def _usable_namespaces(self, job: BuildJob, files: Files) -> tuple[str, ...]:
        """Return the command that makes namespaces; empty if this user or container may not make them."""
        try:
            code = self._runner(
                [*_NAMESPACES, "true"],
                env=self._environment(job, files),
                cwd=files.folder,
                timeout=_SHORT,
                output=lambda _: None,
                name="unshare",
            )
        except BuildFailed:
            return ()
        return () if code else _NAMESPACES

    def _storage_root(self) -> Path:
        if self._storage:
            return self._storage / "storage"
        if os.geteuid() == 0:
            return Path("/var/lib/containers/storage")
        # Buildah gets it as a flag as well, since its HOME is not the user's.
        return Path.home() / ".local/share/containers/storage"

    def _storage_flags(self) -> list[str]:
        if self._storage:
            return [f"--root={self._storage_root()}", f"--runroot={self._storage / 'run'}"]
        return [] if os.geteuid() == 0 else [f"--root={self._storage_root()}"]

    @staticmethod
    def _environment(job: BuildJob, files: Files) -> Mapping[str, str]:
        runtime = Path(f"/run/user/{os.geteuid()}")
        proxies = job.network.proxies.items()
        return {
            "PATH": _PATH,
            "HOME": str(files.home),
            "TMPDIR": str(files.folder),
            "CONTAINERS_CONF": str(files.containers),
            "CONTAINERS_REGISTRIES_CONF": str(files.registries),
            "REGISTRY_AUTH_FILE": str(files.authfile),
            **({"XDG_RUNTIME_DIR": str(runtime)} if os.geteuid() and runtime.is_dir() else {}),
            **({"SSL_CERT_FILE": str(files.ca_bundle)} if files.ca_bundle else {}),
            # Both spellings: programs disagree on which one counts.
            **{spelt: value for name, value in proxies for spelt in (name, name.lower())},
        }

    def _remove_containers(self, job: BuildJob, files: Files) -> None:
        """Remove the working containers of a run that was ended before it could tidy up.

        Their names cannot be chosen. They are recognized by the mount of our folder in their description; if a later
        Buildah writes that elsewhere, they stay until `buildah rm`.
        """
        mark = str(files.folder)
        for state in self._storage_root().glob("*-containers/*/userdata/buildah.json"):
            try:
                ours = mark in state.read_text(errors="replace")
            except OSError:
                continue  # somebody else's, and just removed
            if ours:
                self._run(["rm", state.parts[-3]], job, files, lambda _: None, timeout=_SHORT)


def _newer(step: Instruction) -> Iterator[str]:
    """Yield the features of an instruction that not every Buildah supports."""
    if step.heredoc:
        yield "here-documents"
    if step.keyword in {"COPY", "ADD"} and "link" in step.flags()[0]:
        yield "--link"


def _instead(what: str) -> str:
    """Return the remedy for a feature that this Buildah does not support."""
    release = ".".join(map(str, _SINCE[what]))
    if what == "--link":
        return f"Leave --link out, install Buildah {release} or newer, or build with Kaniko (the builder image)."
    return (
        "Join the lines with '&& \\', or log them as a file for COPY. Or install Buildah "
        f"{release} or newer (Debian 13 has it, Ubuntu 24.04 does not), or build with Kaniko (the builder image)."
    )


class _BuildahOutput:
    """Buildah's output: passed on without its noise, and remembered as far as a failure needs it."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._printed = Printed()
        self._steps = ("", "")  # the last two
        self._error = ""  # Buildah's own last words

    def __call__(self, line: str) -> None:
        """Take one line."""
        if _NOISE.match(line):
            return
        if step := _STEP.match(line):
            self._steps = self._steps[1], step[1]
            self._printed.clear()
        elif line.startswith("Error: "):
            self._error = line
        else:
            self._printed.take(line)
        self._output(line)

    def failure(self, code: int, platform: Platform) -> BuilderError:
        """Return the error for a Buildah that ended with `code`."""
        if code in _KILLED:
            message = f"Buildah was killed while it built {platform}."
            return EngineKilled(message, remedy="Most often memory ran out: give the machine or the container more.")
        match = _FAILED_STEP.match(self._error)
        if match is None:
            words = self._error.removeprefix("Error: ") or self._printed.last or f"exit code {code}"
            return failure("Buildah", platform, words)
        said = match["said"]
        if unknown := _UNKNOWN_INSTRUCTION.search(said):
            if opens_heredoc(self._steps[0]):
                message = f"This Buildah does not support the here-document of '{one_line(self._steps[0], 200)}'."
                return BuildFailed(message, remedy=_instead("here-documents"))
            return failure("Buildah", platform, f"the Dockerfile does not parse: unknown instruction {unknown[1]!r}")
        status = _EXIT_STATUS.fullmatch(said)
        return failure(
            "Buildah",
            platform,
            f"exit code {status[1]}" if status else said,
            step=match["step"],
            printed=self._printed if status else None,
        )
