"""From locked wheels to layers in a registry: the known are reused, the rest downloaded, made and pushed."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar

import httpx

from builder.errors import BuildFailed, ServiceUnavailable, TryAgain, cause_of
from builder.log import get_logger, moved, stage
from builder.masking import one_line
from builder.oci.descriptor import Blob, FileBlob
from builder.oci.layer import Layer
from builder.oci.registry import RemoteBlob
from builder.oci.store import LayerStore
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.parallel import side_by_side
from builder.reference import Repository
from builder.wheels.install import Compiler, GroupLayer, WheelLayer, layer_key
from builder.wheels.shared_libraries import from_note
from builder.wheels.wheel import InvalidWheel, open_wheel

# Few, so that most wheels keep a layer of their own; more than one, so that a change does not make all of it again.
_SHARED = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Wheels that share a layer, in the order of their names.

    Attributes:
        wheels: one or more.
    """

    wheels: tuple[LockedWheel, ...]

    @property
    def source(self) -> str:
        """What the layer is made from: a wheel's SHA-256, or a hash of those of several; 64 hexadecimal digits."""
        if len(self.wheels) == 1:
            return self.wheels[0].sha256
        return hashlib.sha256("\n".join(wheel.sha256 for wheel in self.wheels).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the wheels, as far as they are known."""
        return sum(wheel.size or 0 for wheel in self.wheels)

    @property
    def title(self) -> str:
        """The wheels' file names, for people."""
        return " ".join(wheel.filename for wheel in self.wheels)


def grouped(wheels: Iterable[LockedWheel], most: int) -> tuple[Group, ...]:
    """Return wheels in groups, each of which is a layer; the same wheels always give the same groups.

    Where there are more wheels than layers, the smallest share some: which one is decided by their name, so that a new
    version of one wheel leaves the others together.

    Args:
        wheels: each once.
        most: the most layers, more than 4.
    """
    ordered = sorted(wheels, key=lambda wheel: wheel.name)
    if len(ordered) <= most:
        return tuple(Group((wheel,)) for wheel in ordered)
    by_size = sorted(ordered, key=lambda wheel: (wheel.size or 0, wheel.name))
    sharing = by_size[: len(ordered) - most + _SHARED]
    shared: dict[int, list[LockedWheel]] = {}
    for wheel in sharing:
        shared.setdefault(hashlib.sha256(wheel.name.encode()).digest()[0] % _SHARED, []).append(wheel)
    alone = [(wheel,) for wheel in by_size[len(sharing) :]]
    together = [tuple(sorted(each, key=lambda wheel: wheel.name)) for each in shared.values()]
    return tuple(Group(each) for each in sorted([*alone, *together], key=lambda each: each[0].name))


_log = get_logger("wheels")
_LOOKING = 16
_MAKING = 6
# Bytes of the wheels that layers are made from at a time, unless one is larger; what is in the temporary folder is
# about twice that. An environment of torch for GPUs has ten wheels of 200 to 900 MB.
_MOST_BYTES = 1 << 30
_SECONDS = 60.0
_SHOWN = 200
_MOST_NAMED = 10

Result = TypeVar("Result")


@dataclass
class Traffic:
    """What was moved; counted by several threads.

    Attributes:
        known: layers that the registry had.
        made: layers that were made.
        received: bytes of wheels that were downloaded.
        sent: bytes of layers that were pushed.
    """

    known: int = 0
    made: int = 0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is kept, held against what it should be.

    Attributes:
        state: `missing` is what is not kept, or has lost its content; `not derivable` what nobody can make again, such
            as the layer of a wheel that no index has.
        detail: how it differs, or why it cannot be told; empty elsewhere.
    """

    state: Literal["same", "different", "missing", "not derivable"]
    detail: str = ""


class Room:
    """Room that threads share: those for whom there is none wait until others give theirs back.

    Args:
        most: how much there is. Who wants more than that gets it alone.
    """

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Take room for as long as the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._most)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


class WheelLayers:
    """The layers of wheels, kept in a registry. A context manager that removes its temporary files.

    Args:
        store: where layers are kept.
        client: asks package indexes.
        python: the model's Python, `3.11`.
        compiler: makes the bytecode; None for layers without.
        folder: where wheels and layers stand while they are made: twice 1 GiB, or twice the largest wheel, and at most
            112 MiB of a shared library for each that is being read.
    """

    def __init__(
        self,
        store: LayerStore,
        client: IndexClient,
        *,
        python: str,
        compiler: Compiler | None,
        folder: Path | None = None,
    ) -> None:
        self._store = store
        self._client = client
        self._python = python
        self._compiler = compiler
        # Where the process is asked to end, threads still write there.
        self._temporary = tempfile.TemporaryDirectory(prefix="wheels-", dir=folder, ignore_cleanup_errors=True)
        self._lock = threading.Lock()
        self._room = Room(_MOST_BYTES)
        self.traffic = Traffic()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is left of temporary files."""
        self._temporary.cleanup()

    def key(self, group: Group) -> str:
        """Return the tag that a group's layer is kept under."""
        return layer_key(group.source, python=self._python, bytecode=self._compiler)

    def known(self, groups: Iterable[Group]) -> dict[str, Layer]:
        """Return the layers that the registry has, by their groups' sources; one request each, side by side."""
        found = _together(self._kept, _unique(groups))
        return {source: layer for source, layer in found if layer is not None}

    def placed(self, groups: Iterable[Group], repository: Repository | None) -> dict[str, Layer]:
        """Return the layers of groups by their sources; each is in the store, and in a repository, when this returns.

        Args:
            groups: what is wanted.
            repository: the repository that is to have the layers; None for the store alone.

        Raises:
            InvalidWheel: a wheel cannot be installed.
            WheelNotFound, WheelMismatch: an index does not have it any more.
            BuilderError: an index or the registry cannot be had.
        """
        wanted = _unique(groups)
        with stage("lookups"):
            looked = dict(_together(lambda group: self._taken(group, repository), wanted))
        layers = {source: layer for source, layer in looked.items() if layer is not None}
        missing = {source: group for source, group in wanted.items() if source not in layers}
        self.traffic.known += len(layers)
        if missing:
            size = sum(group.size for group in missing.values())
            _log.info("making wheel layers", layers=len(missing), known=len(layers), wheel_bytes=size)
            moved("wheels", more=size)
            moved("layers", more=len(missing))
        with stage("wheel layers"):
            made = dict(_together(lambda group: self._made(group, repository), missing, threads=_MAKING))
        return {**layers, **made}

    def verified(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Verdict]]:
        """Make the layers of groups again, and hold what is kept against them; yield each group as it is done.

        Nothing is written to the registry. Where no layer is kept, nothing is downloaded.

        Raises:
            BuilderError: an index or the registry cannot be had.
        """
        unique = _unique(groups)
        for source, verdict in _together(self._verdict, unique, threads=_MAKING):
            yield unique[source], verdict

    def _verdict(self, group: Group) -> Verdict:
        registry, repository = self._store.registry, self._store.repository
        kept = self._store.layer(self.key(group), source=group.source)
        if kept is None or not registry.has_blob(repository, kept.digest):
            return Verdict(state="missing")
        try:
            with self._layer(group) as (right, _):
                pass
        except (BuildFailed, InvalidWheel) as error:
            # An index that is away is no verdict; one that has never heard of the wheel is.
            return Verdict(state="not derivable", detail=error.what)
        if kept != right:
            return Verdict(state="different", detail=_differences(kept, right))
        try:
            for _ in registry.blob_stream(repository, kept.descriptor):
                pass
        except ServiceUnavailable as error:
            # Read and wrong, or ended too early each time. Else the registry is away, which no layer could help.
            if not cause_of(error, BuildFailed, httpx.RemoteProtocolError):
                raise
            detail = f"what the registry gives for {kept.digest} is not that: {error.what}"
            return Verdict(state="different", detail=detail)
        return Verdict(state="same")

    def _taken(self, group: Group, repository: Repository | None) -> Layer | None:
        """Return a layer that the registry has, placed in the repository; None where it has to be made."""
        layer = self._kept(group)
        if layer is None or not self._place(layer, repository, None):
            return None
        return layer

    def _kept(self, group: Group) -> Layer | None:
        """Return a layer that is kept; None where there is none, or one without the libraries of its wheels."""
        layer = self._store.layer(self.key(group), source=group.source)
        try:
            if layer is not None:
                from_note(layer.note)
        except ValueError as error:
            _log.warning("a kept layer is none, and is made again", tag=self.key(group), why=str(error))
            return None
        return layer

    def _place(self, layer: Layer, repository: Repository | None, blob: Blob | None) -> bool:
        """Put a kept layer into a repository; return whether that could be done.

        Args:
            layer: the layer.
            repository: where to; None to see that the store has it.
            blob: its content; None for the store's.
        """
        kept = self._store.repository
        registry = self._store.registry
        if repository is None or repository == kept:
            return registry.has_blob(kept, layer.digest)
        if registry.mount_blob(repository, layer.digest, kept):
            return True
        if blob is None:
            # A registry that mounts nothing, or one that has lost the content.
            if not registry.has_blob(kept, layer.digest):
                _log.warning("a kept layer has lost its content, and is made again", digest=str(layer.digest))
                return False
            blob = RemoteBlob(registry=registry, repository=kept, descriptor=layer.descriptor)
        sent = registry.push_blob(repository, blob)
        self._count(sent=sent)
        return True

    def _made(self, group: Group, repository: Repository | None) -> Layer:
        with self._layer(group) as (layer, blob):
            with stage("push"):
                self._store.keep(self.key(group), layer, blob, source=group.source, title=group.title[:1000])
                self._count(sent=layer.size, made=1)
                self._place(layer, repository, blob)
            moved("layers", 1)
            return layer

    @contextlib.contextmanager
    def _layer(self, group: Group) -> Iterator[tuple[Layer, Blob]]:
        """Give a group's layer, made from its wheels."""
        with (
            self._room.taken(group.size),
            tempfile.TemporaryDirectory(dir=self._temporary.name, ignore_cleanup_errors=True) as name,
        ):
            folder = Path(name)
            wheels = []
            # Backwards: in a layer the first of two files in one place is kept, of two layers the last one's counts. So
            # an environment is the same however its wheels are grouped.
            for wheel in reversed(group.wheels):
                path = folder / wheel.filename[-200:]
                with stage("download"):
                    self._client.download(wheel, path, progress=partial(moved, "wheels"))
                self._count(received=path.stat().st_size)
                opened = open_wheel(path, filename=wheel.filename)
                wheels.append(WheelLayer(opened, python=self._python, bytecode=self._compiler))
            made = GroupLayer(wheels)
            target = folder / "layer.tar.gz"
            try:
                with stage("making"), target.open("xb", buffering=0) as file:
                    for chunk in made:
                        file.write(chunk)
            except OSError as error:
                message = f"The layer of {group.title[:200]} cannot be written: {error.strerror}."
                raise TryAgain(
                    message, remedy="Free space in the temporary folder, or name a larger one in TMPDIR."
                ) from error
            for path in folder.glob("*.whl"):
                path.unlink()
            if made.without_bytecode:
                _log.info("no bytecode", wheels=group.title[:200], files=len(made.without_bytecode))
            for wheel, layer in zip(reversed(group.wheels), wheels, strict=True):
                if layer.misrecorded:
                    _warn_of_record(wheel.filename, layer.misrecorded)
            yield made.layer, FileBlob(path=target, digest=made.layer.digest, size=made.layer.size)

    def _count(self, *, sent: int = 0, received: int = 0, made: int = 0) -> None:
        with self._lock:
            self.traffic.sent += sent
            self.traffic.received += received
            self.traffic.made += made


def _warn_of_record(filename: str, files: Sequence[str]) -> None:
    named = one_line(", ".join(files[:_MOST_NAMED]), 500)
    _log.warning("files are others than the wheel's RECORD says", wheel=filename, count=len(files), files=named)


def compiler_for(python: str) -> Compiler | None:
    """Return what compiles for a model's Python here; None, and a line in the log, where nothing does."""
    found = Compiler.find(python)
    if found is None:
        runs_on = platform.python_version()
        _log.info("no bytecode: this program runs on another Python than the model", python=python, runs_on=runs_on)
    return found


def _differences(kept: Layer, right: Layer) -> str:
    what = {"digest": "digest", "size": "size", "diff id": "diff_id", "uncompressed size": "uncompressed"}
    pairs = [
        (name, getattr(kept, field), getattr(right, field)) for name, field in (what | {"type": "media_type"}).items()
    ]
    if kept.note != right.note:
        pairs.append(("list of libraries", kept.note[:_SHOWN] or "missing", right.note[:_SHOWN]))
    return ", ".join(f"its {name} is {is_} and should be {should}" for name, is_, should in pairs if is_ != should)


def _unique(groups: Iterable[Group]) -> dict[str, Group]:
    """Return groups by their sources, the largest first: of platforms that share a wheel, one may not know its size."""
    unique: dict[str, Group] = {}
    for group in sorted(groups, key=lambda group: -group.size):
        unique.setdefault(group.source, group)
    return unique


def _together(
    work: Callable[[Group], Result], groups: Mapping[str, Group], *, threads: int = _LOOKING
) -> Iterator[tuple[str, Result]]:  # fmt: skip
    """Yield what `work` returns for groups, with their sources."""

    def one(item: tuple[str, Group]) -> tuple[str, Result]:
        return item[0], work(item[1])

    for result in side_by_side(one, list(groups.items()), threads=threads, every=_SECONDS):
        if result is not None:
            yield result
