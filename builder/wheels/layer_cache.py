"""A cache of wheels' layers in a registry: known layers are reused, others are made from downloaded wheels."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar

import httpx2

from builder.errors import BuildFailed, ServiceUnavailable, TryAgain, cause_of
from builder.log import get_logger, moved, stage, transferred
from builder.masking import one_line
from builder.oci import Blob, FileBlob
from builder.oci.layer import Layer
from builder.oci.registry import RemoteBlob
from builder.oci.store import LayerStore
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.process import side_by_side
from builder.reference import Repository
from builder.wheels.install import Compiler, WheelLayer, layer_key
from builder.wheels.shared_libraries import from_note
from builder.wheels.wheel import InvalidWheel, open_wheel

# Few, so that most wheels keep a layer of their own; more than one, so that a change does not make all of it again.
_SHARED = 4


@dataclass(frozen=True, slots=True)
class Group:
    """One wheel or more that share a layer, in the order of their names."""

    wheels: tuple[LockedWheel, ...]

    @property
    def source(self) -> str:
        """The key of the layer's content: a wheel's SHA-256, or a hash of several; 64 hexadecimal digits."""
        if len(self.wheels) == 1:
            return self.wheels[0].sha256
        return hashlib.sha256("\n".join(wheel.sha256 for wheel in self.wheels).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the wheels; one of unknown size counts as empty."""
        return sum(wheel.size or 0 for wheel in self.wheels)

    @property
    def title(self) -> str:
        """The wheels' file names, for people."""
        return " ".join(wheel.filename for wheel in self.wheels)


def grouped(wheels: Iterable[LockedWheel], most: int) -> tuple[Group, ...]:
    """Return wheels in groups, one for each layer; the same wheels always give the same groups.

    Where there are more wheels than layers, the smallest share some. A wheel's name decides which, so that a new
    version of one wheel leaves the others together.

    Args:
        wheels: each once.
        most: the largest number of layers, more than 4.
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
# Bytes of the wheels that are made into layers at a time, unless one is larger; the temporary folder has about twice
# that. An environment of torch for GPUs has ten wheels of 200 to 900 MB.
_MOST_BYTES = 1 << 30
_SECONDS = 60.0
_SHOWN = 200
_MOST_NAMED = 10

Result = TypeVar("Result")


@dataclass
class Transfers:
    """Counts of layers and bytes.

    Attributes:
        known: layers that the registry had.
        made: layers that were made.
        received: bytes of downloaded wheels.
        sent: bytes of pushed layers.
    """

    known: int = 0
    made: int = 0
    received: int = 0
    sent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The comparison of a cached item with a new derivation of it.

    Attributes:
        state: `missing` if it is not in the cache, or has lost its content; `not derivable` if it cannot be made again,
            such as the layer of a wheel that no index has.
        detail: the difference, or why it is not derivable; empty elsewhere.
    """

    state: Literal["same", "different", "missing", "not derivable"]
    detail: str = ""


class ByteSemaphore:
    """A semaphore that counts bytes.

    Args:
        most: bytes that may be held at a time. A thread that needs more waits until nobody else holds any.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def acquired(self, size: int) -> Iterator[None]:
        """Hold so many bytes for as long as the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._most)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


class WheelLayers:
    """The layers of wheels, cached in a registry. A context manager that removes its temporary files.

    Args:
        store: the cache.
        client: downloads wheels.
        python: the model's Python, `3.11`.
        compiler: makes the bytecode; None for layers without.
        folder: for wheels and layers in the making: twice 1 GiB, or twice the largest wheel, and at most 112 MiB for
            each shared library that is being read.
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
        self._in_work = ByteSemaphore(_MOST_BYTES)
        self.transfers = Transfers()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the temporary files."""
        self._temporary.cleanup()

    def key(self, group: Group) -> str:
        """Return the tag of a group's layer."""
        return layer_key(group.source, python=self._python, bytecode=self._compiler)

    def known(self, groups: Iterable[Group]) -> dict[str, Layer]:
        """Return the layers that the registry has, by their groups' sources; one request each, side by side."""
        found = _together(self._kept, _unique(groups))
        return {source: layer for source, layer in found if layer is not None}

    def placed(self, groups: Iterable[Group], repository: Repository | None) -> dict[str, Layer]:
        """Return the layers of groups by their sources, when each is in the cache and in a repository.

        Args:
            groups: the groups.
            repository: the repository that is to have the layers; None for the cache alone.

        Raises:
            InvalidWheel: a wheel cannot be installed.
            WheelNotFound, WheelMismatch: an index no longer has a wheel.
            BuilderError: an index or the registry fails.
        """
        wanted = _unique(groups)
        with stage("lookups"):
            looked = dict(_together(lambda group: self._taken(group, repository), wanted))
        layers = {source: layer for source, layer in looked.items() if layer is not None}
        missing = {source: group for source, group in wanted.items() if source not in layers}
        self.transfers.known += len(layers)
        if missing:
            size = sum(group.size for group in missing.values())
            _log.info("making wheel layers", layers=len(missing), known=len(layers), wheel_bytes=size)
            moved("wheels", more=size)
            moved("layers", more=len(missing))
        with stage("wheel layers"):
            made = dict(_together(lambda group: self._made(group, repository), missing, threads=_MAKING))
        return {**layers, **made}

    def verified(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Verdict]]:
        """Make the layers of groups again, and compare them with those in the cache; yield each group when it is done.

        Nothing is written to the registry. Where no layer is in the cache, nothing is downloaded.

        Raises:
            BuilderError: an index or the registry fails.
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
            # An index that does not answer gives no verdict; one that does not have the wheel does.
            return Verdict(state="not derivable", detail=error.what)
        if kept != right:
            return Verdict(state="different", detail=_differences(kept, right))
        try:
            for _ in registry.blob_stream(repository, kept.descriptor):
                pass
        except ServiceUnavailable as error:
            # The content was read and is wrong, or ended too early each time. Otherwise the registry fails.
            if not cause_of(error, BuildFailed, httpx2.RemoteProtocolError):
                raise
            detail = f"the registry's content of {kept.digest} is another: {error.what}"
            return Verdict(state="different", detail=detail)
        return Verdict(state="same")

    def _taken(self, group: Group, repository: Repository | None) -> Layer | None:
        """Return a cached layer, placed in the repository; None where it has to be made."""
        layer = self._kept(group)
        if layer is None or not self._place(layer, repository, None):
            return None
        return layer

    def _kept(self, group: Group) -> Layer | None:
        """Return a cached layer; None where there is none, or one with an invalid note."""
        layer = self._store.layer(self.key(group), source=group.source)
        try:
            if layer is not None:
                from_note(layer.note)
        except ValueError as error:
            _log.warning("the cached layer is invalid; rebuilding it", tag=self.key(group), why=str(error))
            return None
        return layer

    def _place(self, layer: Layer, repository: Repository | None, blob: Blob | None) -> bool:
        """Put a cached layer into a repository; return False where the cache has lost its content.

        Args:
            layer: the layer.
            repository: its destination; None to look into the cache alone.
            blob: its content; None for that in the cache.
        """
        kept = self._store.repository
        registry = self._store.registry
        if repository is None or repository == kept:
            return registry.has_blob(kept, layer.digest)
        if registry.mount_blob(repository, layer.digest, kept):
            transferred(str(layer.digest), layer.size, sent=0)
            return True
        if blob is None:
            # The registry mounts nothing, or has lost the content.
            if not registry.has_blob(kept, layer.digest):
                _log.warning("the cached layer has lost its content; rebuilding it", digest=str(layer.digest))
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
            self._in_work.acquired(group.size),
            tempfile.TemporaryDirectory(dir=self._temporary.name, ignore_cleanup_errors=True) as name,
        ):
            folder = Path(name)
            wheels = []
            # Backwards: within a layer the first of two files in one place counts, and of two layers the last one. So
            # an environment is the same however its wheels are grouped.
            for wheel in reversed(group.wheels):
                path = folder / wheel.filename[-200:]
                with stage("download"):
                    self._client.download(wheel, path, progress=partial(moved, "wheels"))
                self._count(received=path.stat().st_size)
                wheels.append(open_wheel(path, filename=wheel.filename))
            made = WheelLayer(*wheels, python=self._python, bytecode=self._compiler)
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
            for filename, files in made.misrecorded.items():
                named = one_line(", ".join(files[:_MOST_NAMED]), 500)
                _log.warning("files differ from the wheel's RECORD", wheel=filename, count=len(files), files=named)
            yield made.layer, FileBlob(path=target, digest=made.layer.digest, size=made.layer.size)

    def _count(self, *, sent: int = 0, received: int = 0, made: int = 0) -> None:
        with self._lock:
            self.transfers.sent += sent
            self.transfers.received += received
            self.transfers.made += made


def compiler_for(python: str, folder: Path | None = None) -> Compiler | None:
    """Return a compiler for a model's Python; None, and a line in the log, where there is none.

    Args:
        python: the model's Python: `3.11`.
        folder: WHEEL_COMPILERS.

    Raises:
        InvalidSettings: the folder's interpreter does not work.
    """
    found = Compiler.find(python, folder)
    if found is None:
        runs_on = platform.python_version()
        _log.info("no bytecode: there is no interpreter of the model's Python", python=python, runs_on=runs_on)
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
