"""Container runtimes: podman and Docker by their command lines, and an image's content in files that they take."""

from __future__ import annotations

import io
import json
import platform as machine
import re
import resource
import secrets
import shutil
import struct
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from builder.errors import BuildFailed
from builder.masking import one_line
from builder.oci import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Blob, BytesBlob, Descriptor, to_bytes, verified
from builder.process import Output, Runner, run
from builder.reference import Platform

_BLOCK = 512
_ELF_HEADER, _PROGRAM_HEADER, _LOADED_AT = 64, 56, 0x400000
# ELF's number of an architecture, and the system call exit(0) in its machine code.
_EXIT = {
    "amd64": (62, bytes.fromhex("b83c00000031ff0f05")),
    "arm64": (183, bytes.fromhex("a80b80d2000080d2010000d4")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What an image is made of.

    Attributes:
        config: the image config's bytes.
        layers: the layers, first to last, by OCI's media types, and what reads each; reading one may download it.
    """

    config: bytes = field(repr=False)
    layers: Sequence[tuple[Descriptor, Blob]] = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum({layer.digest: layer.size for layer, _ in self.layers}.values())


def write_layout(folder: Path, name: str, content: Content) -> None:
    """Write an image as an OCI image layout with one image.

    Args:
        folder: the layout; it is made.
        name: what the layout calls the image.
        content: the image.

    Raises:
        OSError: the disk is full.
        BuilderError: what reading a layer raises.
    """
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def keep(blob: Blob) -> None:
        with (blobs / blob.digest.hex).open("wb") as file:
            file.writelines(verified(blob))

    manifest = to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": Descriptor.of(content.config, OCI_CONFIG).to_json(),
            "layers": [layer.to_json() for layer, _ in content.layers],
        }
    )
    named = {
        **Descriptor.of(manifest, OCI_MANIFEST).to_json(),
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    index = to_bytes({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [named]})
    (folder / "oci-layout").write_bytes(to_bytes({"imageLayoutVersion": "1.0.0"}))
    (folder / "index.json").write_bytes(index)
    for blob in {blob.digest: blob for blob in (*_blobs(content), BytesBlob(manifest))}.values():
        keep(blob)


def write_archive(path: Path, name: str, content: Content) -> None:
    """Write an image as `docker save` does.

    Args:
        path: the file.
        name: what the image is called, `localhost/name:tag`.
        content: the image.

    Raises:
        OSError: the disk is full.
        BuilderError: what reading a layer raises.
    """
    entry = {
        "Config": f"{BytesBlob(content.config).digest.hex}",
        "RepoTags": [name],
        "Layers": [layer.digest.hex for layer, _ in content.layers],
    }
    with path.open("wb") as file:
        for blob in {blob.digest: blob for blob in _blobs(content)}.values():
            _add(file, blob.digest.hex, blob)
        _add(file, "manifest.json", BytesBlob(json.dumps([entry]).encode()))
        file.write(bytes(2 * _BLOCK))


def native_platform() -> Platform:
    """Return this machine's platform."""
    return Platform.parse(f"linux/{machine.machine().lower()}")


def probe(platform: Platform) -> Content | None:
    """Return the smallest image that runs: a program that ends at once, with exit code 0; None where none is known."""
    if platform.architecture not in _EXIT:
        return None
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        program = _program(*_EXIT[platform.architecture])
        info = tarfile.TarInfo("probe")
        info.size, info.mode = len(program), 0o755
        archive.addfile(info, io.BytesIO(program))
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(folder)
    blob = BytesBlob(layer.getvalue())
    config = {
        "os": platform.os,
        "architecture": platform.architecture,
        "config": {"Cmd": ["/probe"], "User": "10001:0"},
        "rootfs": {"type": "layers", "diff_ids": [str(blob.digest)]},
    }
    return Content(config=to_bytes(config), layers=[(Descriptor.of(blob.content, OCI_LAYER), blob)])


def _blobs(content: Content) -> list[Blob]:
    return [BytesBlob(content.config), *(blob for _, blob in content.layers)]


def _program(machine: int, code: bytes) -> bytes:
    """Return an ELF file of one segment (elf(5))."""
    size = _ELF_HEADER + _PROGRAM_HEADER + len(code)
    entry = _LOADED_AT + _ELF_HEADER + _PROGRAM_HEADER
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, entry, _ELF_HEADER, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOADED_AT, _LOADED_AT, size, size, 0x10000)
    return header + segment + code


def _add(file: IO[bytes], name: str, blob: Blob) -> None:
    info = tarfile.TarInfo(name)
    info.size = blob.size
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.writelines(verified(blob))
    file.write(bytes(-blob.size % _BLOCK))


class CannotRun(Exception):
    """A container cannot be run here: no fault of the image; the message says why, on one line."""


class NoContainers(CannotRun):
    """The runtime runs nothing on this machine, whatever the image."""


class Unfit(CannotRun):
    """This image can never be run in such a way: that is for its author to change."""


class CannotStart(Exception):
    """This image's container does not start where others do; the message is the runtime's, on one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a container may use.

    Attributes:
        memory: bytes, its /tmp included.
        seconds: how long it may live, whatever becomes of us.
        volumes: folders beside /tmp that it may write to, in memory too.
    """

    memory: int
    seconds: int
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a container ended.

    Attributes:
        code: its exit code.
        of_memory: whether it was killed for the memory it used.
    """

    code: int
    of_memory: bool


# A prefix of our own; the number behind it is the time after which anybody may remove what has the name.
PREFIX = "model-image-smoke-test"


def new_name(until: float, unique: str) -> str:
    """Return a name for an image and for its container.

    Args:
        until: seconds since the epoch, after which another publisher may remove them.
        unique: lower-case letters and digits.
    """
    return f"{PREFIX}-{until:.0f}-{unique}"


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
# proc(5): in /proc/net/tcp the second field is the local address, and state 0A is LISTEN.
_LISTENS = re.compile(r"\s*[0-9]+: [0-9A-F]{8,32}:([0-9A-F]{4}) [0-9A-F]{8,32}:[0-9A-F]{4} 0A ")
_SOCKETS = ("/proc/net/tcp", "/proc/net/tcp6")
_READ_SOCKETS = f"import sys\nfor name in {_SOCKETS!r}:\n    sys.stdout.write(open(name).read())\n"
_SHORT_QUERY = 30.0
# What runtimes end with where a container has no such program.
_NO_PROGRAM = frozenset({126, 127})
# podman says so where it cannot keep a container within its memory.
_UNBOUNDED = re.compile(r"limits are not supported and ignored|does not support memory limit", re.IGNORECASE)


def listening(lines: Iterable[str] | None = None) -> frozenset[int]:
    """Return the TCP ports that are open.

    Args:
        lines: those of /proc/net/tcp and /proc/net/tcp6; None for those of this process's network namespace.
    """
    if lines is None:
        here = [Path(name) for name in _SOCKETS]
        lines = [line for path in here if path.exists() for line in path.read_text(encoding="ascii").splitlines()]
    return frozenset(int(match[1], 16) for line in lines if (match := _LISTENS.match(line)))


def without_volumes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image config that declares no volume: a runtime would make each one a folder on the machine's disk."""
    runtime = config.get("config")
    return {**config, "config": {**runtime, "Volumes": {}}} if isinstance(runtime, Mapping) else dict(config)


class ContainerRuntime:
    """Runs containers on this machine: without network, read-only, without a capability, bounded.

    A runtime is used by its command line.

    Args:
        environ: variables that lead it to its storage or daemon.
        platform: this machine's.
        runner: runs programs; see `builder.process.run`.
    """

    name: str
    # Where people find what a container printed, if `log` cannot; empty if it can.
    log_is_at = ""
    _options: tuple[str, ...] = ()

    def __init__(self, environ: Mapping[str, str], platform: Platform, *, runner: Runner = run) -> None:
        self._environ = dict(environ)
        self._platform = platform
        self._runner = runner
        self._way: tuple[str, ...] | None = None

    def available(self) -> bool:
        """Return whether the program is installed; it may still be unable to run anything."""
        return shutil.which(self.name, path=_PATH) is not None

    def check(self) -> bool:
        """Run the smallest image, once, so that a container which does not start is known to be at fault itself.

        Containers are then run in the way that worked for it.

        Returns:
            False where that cannot be tried, since no such image is known for the platform.

        Raises:
            NoContainers: it does not run.
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
        """Load an image.

        Args:
            content: the image.
            name: what it is called from now on: letters, digits and dashes.
            folder: the workspace, where a folder is made for what has to be written for that, and removed.

        Raises:
            CannotRun: it cannot be loaded.
            BuilderError: what reading a layer raises.
        """
        with tempfile.TemporaryDirectory(prefix="smoke-", dir=folder) as place:
            said = self._load(content, name, Path(place))
        if said:
            message = f"{self.name} could not load the image: {said}"
            raise CannotRun(message)

    def start(self, name: str, limits: Limits) -> None:
        """Start a container of the image of that name in the background; the container has the same name.

        Raises:
            CannotRun: perhaps no container can be run here: none was seen to.
            CannotStart: others can, and this one cannot.
        """
        known = self._way is not None
        if said := self._start(name, limits):
            if known:
                raise CannotStart(said)
            message = f"{self.name} did not start it: {said}"
            raise CannotRun(message)

    def execute(self, name: str, argv: Sequence[str], output: Output, *, timeout: float) -> int | None:
        """Run a program within a container, as its user; return its exit code, None where it took too long."""
        return self._call(["exec", name, *argv], timeout=timeout, output=output)[0]

    def run_python(self, name: str, program: str, *arguments: str, output: Output, timeout: float) -> None:
        """Run a program of ours on a container's Python, as far as that is possible.

        Args:
            name: the container's.
            program: its text.
            arguments: its arguments.
            output: takes what it prints, line by line.
            timeout: seconds it may take.
        """
        self.execute(name, ["python", "-I", "-c", program, *arguments], output, timeout=timeout)

    def path(self, path: str) -> str:
        """Return where programs that `run_python` runs find a folder of the image."""
        return path

    def open_ports(self, name: str) -> frozenset[int] | None:
        """Return the TCP ports that are open in a container; None where its image has no program that tells."""
        for argv in (["cat", *_SOCKETS], ["python", "-I", "-c", _READ_SOCKETS], ["python3", "-I", "-c", _READ_SOCKETS]):
            lines: list[str] = []

            def kept(line: str, lines: list[str] = lines) -> None:
                if len(lines) < _MOST_LINES:
                    lines.append(line)

            code = self.execute(name, argv, kept, timeout=_SHORT_QUERY)
            if code not in _NO_PROGRAM:
                return listening(lines)
        return None

    def confirm(self) -> None:
        """See, after a container was asked, that it was the image's."""

    def ended(self, name: str, *, within: float = 0) -> Ended | None:
        """Return how a container ended, None while it runs; wait for its end so many seconds."""
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
        """Kill and remove a container, and remove its image, whether they are there or not."""
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
        """Remove what publishers that were killed have left here: containers and images whose time is over."""
        containers = self._call(["ps", "--all", f"--filter=name={PREFIX}", "--format={{.Names}}"])[1]
        images = self._call(["images", "--format={{.Repository}}"])[1]
        left = [*((["rm", "--force", "--volumes"], name) for name in containers), *((["rmi"], name) for name in images)]
        for command, name in left:
            match = _OURS.fullmatch(name)
            if match and int(match[1]) < now:
                self._call([*command, name])

    def _load(self, content: Content, name: str, folder: Path) -> str:
        """Load an image; return the runtime's reason where it could not.

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


class Podman(ContainerRuntime):
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
        # Ends it even where the publisher was killed.
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


class Docker(ContainerRuntime):
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
