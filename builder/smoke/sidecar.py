"""The smoke test in a Pod: the image runs as a sidecar of the container that pushes, and is asked over loopback.

The publisher cannot start containers in a Pod; the kubelet does. It pulls the image of an init container only when that
container's turn comes, so `builder candidate` puts the image under SMOKE_TEST_CANDIDATE before, and `builder push` asks
it afterwards. See docs/decisions/0056-smoke-test-in-the-pod.md.

The candidate differs from the image by one small layer with a program of ours, which is its entry point: it starts the
image's own command as its child, and tells by a listening port whether that runs, and by another one how it ended. So
the kubelet always sees the container run, however soon the command ends, without which it would never start the
container that pushes; and the container ends at once when it is told to, whatever the command does with signals.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from builder.errors import BuildFailed, InvalidSettings, TryAgain
from builder.log import get_logger
from builder.oci import OCI_LAYER, BytesBlob, Descriptor, from_bytes
from builder.oci.manifest import PREFIX, Image, image_of
from builder.oci.registry import Registry
from builder.process import Output, Runner, run
from builder.reference import Platform, Reference, Repository
from builder.smoke.runtime import ContainerRuntime, Content, Ended, Limits, Unfit, listening, without_volumes

# Ports of the first process: while the command runs, and that to which its exit code (at most 255) is added. They are
# above those from which Linux takes the ports of outgoing connections.
RUNNING, ENDED = 0xF1FF, 0xF200
_KILLED = 137
# In the root of the candidate: no image needs a file of that name.
_FIRST_PROCESS = ".model-image-first-process"
_ATTEMPT = f"{PREFIX}candidate-of"
_EXAMPLES = ("serving_input_example.json", "input_example.json")
_USER = re.compile(r"0*[1-9][0-9]{0,9}(?::.*)?")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Before a program that asks: it ends with the command that it asks.
_WHILE_IT_RUNS = r"""
import os as _os, re as _re, threading as _threading, time as _time
def _watch():
    while not _re.search(r" {address}:F2[0-9A-F]{{2}} 00000000:0000 0A ", open("/proc/net/tcp").read()):
        _time.sleep(0.2)
    _os._exit(0)
_threading.Thread(target=_watch, daemon=True).start()
"""
# Seconds until a container that the kubelet has started has a port open; and between two looks at the ports.
_STARTING = 30.0
_PAUSE = 0.2
_log = get_logger("smoke")

# ELF: the address of the file in memory, the sizes of its two headers, the place of the data behind the program.
_LOADED_AT, _HEADERS, _DATA = 0x400000, 64 + 56, 0x200
# sigset_t of SIGTERM and SIGCHLD.
_SIGNALS = 1 << 14 | 1 << 16
# ELF's number of an architecture, and builder/smoke/first_process.<architecture>.s in its machine code.
_PROGRAMS = {
    "amd64": (
        62,
        bytes.fromhex(
            "488b04244c8d64c4104883ec200fb71c2518024000e8c70000004589ee31ffe81a010000b8390000000f054189c785c0"
            "7537bf01000000e8020100008b1c2510024000488b3b4885ff74178b3425080240004c89e2b83b0000000f054883c308"
            "ebe1bf7f000000eb71bf0002400031f631d241ba08000000b8800000000f0583f80f7454bfffffffff4889e6ba010000"
            "004531d2b83d0000000f0585c07eca4439f875e08b1c2489d9c1eb0881e3ff00000083e17f74068d99800000000fb70c"
            "251a02400001cbe8150000004489f7b8030000000f05ebac31ffb83c0000000f05bf02000000be0100080031d2b82900"
            "00000f054189c5c74424080200000066c1c30866895c240a8b04251c0240008944240c31c048894424104489ef488d74"
            "2408ba10000000b8310000000f054489efbe01000000b8320000000f05c3be0002400031d241ba08000000b80e000000"
            "0f05c3"
        ),
    ),
    "arm64": (
        183,
        bytes.fromhex(
            "e00340f9f36f208b73420091ff8300d11c4080d21c08a0f2943340793a000094f603152a000080d24f000094200280d2"
            "010080d2020080d2030080d2040080d2881b80d2010000d4f703002aa0010035200080d244000094940b40f9808640f8"
            "c00000b4810740f9e20313aaa81b80d2010000d4faffff17e00f80d220000014e0031caa010080d2020080d2030180d2"
            "281180d2010000d41f3c0071e002005400008092e1030091220080d2030080d2882080d2010000d41f0000712dfeff54"
            "1f00176be1feff54e10340b9343c0853211800724000005434000211813740799402010b08000094e003162a280780d2"
            "010000d4ebffff17000080d2a80b80d2010000d4400080d2210080d20101a0f2020080d2c81880d2010000d4f503002a"
            "9406c05a41008052e1030079f4070079811f40b9e10700b9ff0700f9e003152ae1030091020280d2081980d2010000d4"
            "e003152a210080d2281980d2010000d4c0035fd6e1031caa020080d2030180d2e81080d2010000d4c0035fd6"
        ),
    ),
}


def first_process(architecture: str, address: bytes, paths: Sequence[str], command: Sequence[str]) -> bytes:
    """Return the program that a candidate begins with, an ELF file.

    Args:
        architecture: as OCI calls it; one of `amd64` and `arm64`.
        address: where it listens: the four bytes of an IPv4 address.
        paths: where the command's program may be: the first that can be executed is. None ends at once with 127.
        command: the whole command.
    """
    machine, code = _PROGRAMS[architecture]
    strings = bytearray()
    addresses: list[int] = []
    # Behind the signals, two pointers, two ports and the address: the tables, and then what they point to.
    tables = 3 * 8 + 8
    at = _LOADED_AT + _DATA + tables + 8 * (len(command) + len(paths) + 2)
    for text in (*command, *paths):
        addresses.append(at + len(strings))
        strings += text.encode() + b"\0"
    arguments, places = addresses[: len(command)], addresses[len(command) :]
    begin = _LOADED_AT + _DATA + tables
    data = struct.pack("<QQQHH4s", _SIGNALS, begin, begin + 8 * (len(command) + 1), RUNNING, ENDED, address)
    data += struct.pack(f"<{len(addresses) + 2}Q", *arguments, 0, *places, 0) + strings
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, _LOADED_AT + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = _DATA + len(data)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOADED_AT, _LOADED_AT, size, size, 0x10000)
    return (header + segment + code).ljust(_DATA, b"\0") + data


def candidate_of(content: Content | None, platform: Platform, attempt: str) -> tuple[Image, BytesBlob]:
    """Return an image that runs the command of another one as its child, and its last layer, which is not compressed.

    Args:
        content: the other image; None for one that runs nothing.
        platform: its platform, which has to be one of `unfit`'s.
        attempt: what the candidate is made for; those of two have different digests, and listen at different addresses.
    """
    config = from_bytes(content.config) if content else {}
    runtime = config.get("config")
    runtime = dict(runtime) if isinstance(runtime, Mapping) else {"User": "10001:0"}
    command = [word for name in ("Entrypoint", "Cmd") for word in _words(runtime.get(name))]
    places = _places(command, runtime) if command else []
    program = first_process(platform.architecture, address_of(attempt), places, command)
    layer = BytesBlob(_archive(program))
    rootfs = config.get("rootfs")
    diff_ids = list(rootfs["diff_ids"]) if isinstance(rootfs, Mapping) else []
    changed = {
        **without_volumes(config),
        "os": platform.os,
        "architecture": platform.architecture,
        "config": {
            **{name: value for name, value in runtime.items() if name not in {"Cmd", "Volumes", "Healthcheck"}},
            "Entrypoint": [f"/{_FIRST_PROCESS}"],
            "Labels": {_ATTEMPT: attempt},
        },
        "rootfs": {"type": "layers", "diff_ids": [*diff_ids, str(layer.digest)]},
        "history": [],
    }
    layers = tuple(descriptor for descriptor, _ in content.layers) if content else ()
    return image_of(platform, changed, (*layers, Descriptor.of(layer.content, OCI_LAYER)), {}), layer


def address_of(attempt: str) -> bytes:
    """Return the loopback address at which the candidate of an attempt listens."""
    return b"\x7f" + hashlib.sha256(attempt.encode()).digest()[:2] + b"\x02"


def unfit(platform: Platform, config: Mapping[str, Any] | None = None) -> str:
    """Return why an image cannot be run as a sidecar; empty where it can.

    Args:
        platform: the image's.
        config: the image config; None for what the platform alone decides.
    """
    if platform.os != "linux" or platform.architecture not in _PROGRAMS:
        return f"a Pod on {platform} has no such test"
    runtime = (config or {}).get("config")
    user = runtime.get("User") if isinstance(runtime, Mapping) else ""
    if config is not None and not (isinstance(user, str) and _USER.fullmatch(user)):
        return "its user is not a number other than 0, and the sidecar may not run as root"
    return ""


def _words(value: object) -> list[str]:
    words = [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
    return [word.replace("\0", "") for word in words]


def _places(command: Sequence[str], runtime: Mapping[str, Any]) -> list[str]:
    """Return where a command's program may be, as container runtimes look it up."""
    if "/" in command[0]:
        return [command[0]]
    entries = dict(entry.partition("=")[::2] for entry in _words(runtime.get("Env")))
    return [f"{folder or '.'}/{command[0]}" for folder in (entries.get("PATH") or _PATH).split(":")]


def _archive(program: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(_FIRST_PROCESS)
        info.size, info.mode = len(program), 0o755
        archive.addfile(info, io.BytesIO(program))
    return buffer.getvalue()


class Sidecar(ContainerRuntime):
    """The sidecar of this Pod: the kubelet runs it, and its ports are those of this network namespace.

    Args:
        registry: that of the candidate and of the images.
        reference: SMOKE_TEST_CANDIDATE.
        platform: this machine's, and so the Pod's.
        pod: the Pod's name: the same in its containers, and no other Pod's.
        runner: runs programs; see `builder.process.run`.
    """

    name = "the Pod"

    def __init__(
        self, registry: Registry, reference: Reference, platform: Platform, *, pod: str, runner: Runner = run
    ) -> None:
        super().__init__({}, platform, runner=runner)
        self._registry = registry
        self._reference = reference
        self._pod = pod
        self._context = Path("/nonexistent")
        self._expected: Image | None = None
        self._started = False
        # As /proc/net/tcp writes it.
        self._address = address_of(pod)[::-1].hex().upper()
        self.log_is_at = f"kubectl logs {pod} -c smoke"

    def offer(self, content: Content | None, sources: Sequence[Repository]) -> None:
        """Put an image where the kubelet takes the sidecar from.

        Args:
            content: the image; None for one that runs nothing, which also takes the place of one that cannot be run.
            sources: repositories that have its layers.

        Raises:
            InvalidSettings: no candidate can be made for this machine.
            BuilderError: a registry refuses.
        """
        if why := unfit(self._platform):
            message = f"SMOKE_TEST_CANDIDATE is set, and {why}."
            raise InvalidSettings(message, remedy="Leave out the component k8s/smoke-test.")
        if content is not None and (why := unfit(self._platform, from_bytes(content.config))):
            _log.info("the image will not be run", why=why)
            content = None
        image, last = candidate_of(content, self._platform, self._pod)
        repository = self._reference.repository
        for blob in (*(blob for _, blob in (content.layers if content else ())), last, BytesBlob(image.config)):
            self._registry.push_blob(repository, blob, sources)
        digest = self._registry.put_manifest(
            repository, image.manifest, image.descriptor.media_type, self._reference.tag
        )
        _log.info("candidate", reference=str(self._reference), digest=str(digest), runs=content is not None)

    def available(self) -> bool:
        """Return True: the kubelet has started this container after the sidecar."""
        return True

    def check(self) -> bool:
        """Return True: the kubelet runs containers."""
        return True

    def load(self, content: Content, name: str, folder: Path) -> None:  # noqa: ARG002 - the kubelet has loaded it
        """See that the candidate is this image.

        Raises:
            Unfit: it cannot be run in a Pod.
            TryAgain: the candidate is another one by now.
        """
        if why := unfit(self._platform, from_bytes(content.config)):
            raise Unfit(why)
        self._context = folder / "context"
        self._expected, _ = candidate_of(content, self._platform, self._pod)
        self.confirm()

    def start(self, name: str, limits: Limits) -> None:  # noqa: ARG002 - the manifest bounds it
        """Wait until the sidecar runs, or has ended.

        Raises:
            InvalidSettings: this Pod has none.
        """
        until = time.monotonic() + _STARTING
        while self._state() is None:
            if time.monotonic() > until:
                message = f"SMOKE_TEST_CANDIDATE is {self._reference}, and no container of that image runs in this Pod."
                remedy = (
                    "Use the component k8s/smoke-test, with the same reference as the image of its container smoke."
                )
                raise InvalidSettings(message, remedy=remedy)
            time.sleep(_PAUSE)
        self._started = True

    def confirm(self) -> None:
        """See that the candidate's name is still the image's that is being tested.

        The kubelet pulled it after `builder candidate` had put it there. So what ran is this image only if no other
        Pod has moved the tag since.

        Raises:
            TryAgain: another one has.
        """
        found = self._registry.manifest(self._reference)
        if self._expected is None or found is None or found.digest != self._expected.descriptor.digest:
            message = f"Another candidate took the place of this one at {self._reference} during its smoke test."
            remedy = (
                "Let Pods of one SMOKE_TEST_CANDIDATE run one at a time: SWEEP_PARALLEL=1, LISTEN_PARALLEL=1, and one "
                "replica of the listener."
            )
            raise TryAgain(message, remedy=remedy)

    def run_python(self, name: str, program: str, *arguments: str, output: Output, timeout: float) -> None:  # noqa: ARG002
        """Run a program of ours on this process's Python, in a process without our environment."""
        # Without site-packages: it looks for MLflow's release there, and the image has another.
        argv = [sys.executable, "-I", "-S", "-c", _WHILE_IT_RUNS.format(address=self._address) + program, *arguments]
        with tempfile.TemporaryDirectory(prefix="builder-runtime-") as own:
            try:
                self._runner(argv, env={"PATH": _PATH}, cwd=Path(own), timeout=timeout, output=output, name="python")
            except BuildFailed as error:
                _log.info("the query was ended", why=error.what)

    def path(self, path: str) -> str:
        """Return the folder of the context that became a folder of the image; one that is not there where none did.

        Only the model's own folder counts, since an author could else have any file of this container sent.
        """
        parts = [part for part in PurePosixPath(path).parts if part != "/"]
        for begin in range(len(parts)):
            folder = self._context.joinpath(*parts[begin:])
            inside = ".." not in parts and folder.resolve() == self._context.resolve().joinpath(*parts[begin:])
            if inside and (folder / "MLmodel").is_file():
                return (
                    str(folder) if not any((folder / example).is_symlink() for example in _EXAMPLES) else "/nonexistent"
                )
        return "/nonexistent"

    def open_ports(self, name: str) -> frozenset[int] | None:  # noqa: ARG002 - there is one
        """Return the ports that are open in this Pod."""
        return listening()

    def ended(self, name: str, *, within: float = 0) -> Ended | None:  # noqa: ARG002 - there is one
        """Return how the sidecar's command ended, None while it runs; wait for its end so many seconds."""
        until = time.monotonic() + within
        while True:
            state = self._state()
            if state is not None and state >= ENDED:
                return Ended(code=state - ENDED, of_memory=False)
            if self._started and state is None:
                # The first process is gone, too: as when memory runs out, which kills the whole container.
                return Ended(code=_KILLED, of_memory=False)
            if time.monotonic() >= until:
                return None
            time.sleep(min(_PAUSE, max(until - time.monotonic(), 0)))

    def _state(self) -> int | None:
        """Return the port at which the first process listens: RUNNING, or ENDED and an exit code; None where none is.

        It is this Pod's candidate: another one listens at another address.
        """
        lines = Path("/proc/net/tcp").read_text(encoding="ascii")
        found = re.findall(rf" {self._address}:(F1FF|F2[0-9A-F]{{2}}) 00000000:0000 0A ", lines)
        return max((int(port, 16) for port in found), default=None)

    def log(self, name: str) -> list[str]:  # noqa: ARG002 - there is one
        """Return nothing: only the API server has it."""
        return []

    def remove(self, name: str) -> None:
        """Do nothing: the kubelet ends the sidecar with the Pod."""

    def sweep(self, now: float) -> None:
        """Do nothing: the kubelet keeps no container."""
