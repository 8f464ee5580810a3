"""What must be known of the files in a base image before packages can be laid out for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import NoReturn

from builder.errors import InvalidVersion
from builder.images.base import BaseImage
from builder.images.descriptor import (
    OCI_LAYER,
    Descriptor,
    Malformed,
    from_bytes,
    mapping,
    refuse,
    sequence,
    strings,
    to_bytes,
)
from builder.images.registry import Registry
from builder.images.rootfs import File, Folder, RootFs
from builder.images.untar import REGULAR, Archive, Budget, Entry, inflated

_VERSION = 3
_ZSTD, _PLAIN = f"{OCI_LAYER}+zstd", OCI_LAYER
# What a base's layers may hold, not compressed: all together, and each beside a hundred times what it is compressed.
_MOST_BYTES, _MOST_EACH, _MOST_RATIO = 32 << 30, 256 << 20, 100

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHON = re.compile(r"python(\d{1,2}\.\d{1,3})")
_MINOR = re.compile(r"\d{1,2}\.\d{1,3}")
_FULL = re.compile(r"(\d{1,2}\.\d{1,3})(?:\.\d+)?(?:[a-z]+\d+)?")
# What may stand in a file of Python's own settings, and in a link.
_SAFE = re.compile(r"(?:/[A-Za-z0-9._+@~-]{1,255})+")
_OTHERS = re.compile(r"pypy|graalpy")
_LIBC = re.compile(r"(?:.*/)?libc(?:\.so\.6|-2\.\d+\.so)")
_RELEASE = re.compile(rb"release version (\d{1,3})\.(\d{1,3})")
_MOST_LIBC = 16 << 20
_LIBRARIES = ("/lib64", "/lib", "/usr/lib64", "/usr/lib")
_LIBRARY = re.compile(r"(?=[^/]*\.so)[A-Za-z0-9._+-]{1,255}")
# What ldconfig reads: a folder a line. What is no folder's path (a comment, `include`, `hwcap`) is passed over.
_LOADER = re.compile(r"(?:\./|/)?etc/ld\.so\.conf(?:\.d/[^/]+\.conf)?")
_MOST_LOADER = 1 << 14
_MOST_FOLDERS = 1000
# CUDA's images have some 2,000 libraries, with names of 25 characters.
_MOST_LIBRARIES = 1 << 20
_MUSL = re.compile(r"ld-musl-[A-Za-z0-9_-]+\.so\.1")
# Where the model's environment goes.
_MODEL = "/opt/model"


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFacts:
    """What there is in a base image.

    Attributes:
        interpreters: for each minor version of CPython, such as `3.11`, the absolute path of its interpreter, without
            links on the way.
        glibc: major and minor version; the lowest where there are several, None where there is none.
        musl: whether musl's dynamic loader is there.
        occupied: whether something stands at /opt/model, or in the way to it: an /opt that is no directory.
        java: whether there is a Java to be run: a program `java` in PATH or JAVA_HOME; None where that is not known.
        libraries: the names of the shared libraries where programs look for them; None where they are not known.
    """

    interpreters: Mapping[str, str]
    glibc: tuple[int, int] | None
    musl: bool
    occupied: bool
    java: bool | None = None
    libraries: tuple[str, ...] | None = None

    def to_json(self) -> bytes:
        """Return the facts as JSON, the same bytes for the same facts."""
        return to_bytes(
            {
                "version": _VERSION,
                "interpreters": dict(self.interpreters),
                "glibc": list(self.glibc) if self.glibc else None,
                "musl": self.musl,
                "occupied": self.occupied,
                "java": self.java,
                "libraries": None if self.libraries is None else list(self.libraries),
            }
        )

    @classmethod
    def from_json(cls, content: bytes) -> BaseFacts:
        """Return the facts that `to_json` wrote.

        Raises:
            Malformed: it did not write this.
        """
        value = from_bytes(content)
        keys = {"version", "interpreters", "glibc", "musl", "occupied", "java", "libraries"}
        if set(value) != keys or type(value["version"]) is not int or value["version"] != _VERSION:
            refuse("it does not hold the facts of a base image, or those of another version")
        interpreters = strings(mapping(value["interpreters"], "interpreters"), "interpreters")
        if not all(_MINOR.fullmatch(minor) and _SAFE.fullmatch(path) for minor, path in interpreters.items()):
            refuse("interpreters are not paths by minor version")
        glibc = None if value["glibc"] is None else sequence(value["glibc"], "glibc")
        if glibc is not None and ([type(each) for each in glibc] != [int, int] or min(glibc) < 0):
            refuse("glibc is not a version")
        if not isinstance(value["musl"], bool) or not isinstance(value["occupied"], bool):
            refuse("musl or occupied is not true or false")
        if not isinstance(value["java"], bool | None):
            refuse("java is not true, false or null")
        libraries = None if value["libraries"] is None else sequence(value["libraries"], "libraries")
        if libraries and not all(isinstance(each, str) and _LIBRARY.fullmatch(each) for each in libraries):
            refuse("libraries are not names")
        return cls(
            interpreters=interpreters,
            glibc=(glibc[0], glibc[1]) if glibc else None,
            musl=value["musl"],
            occupied=value["occupied"],
            java=value["java"],
            libraries=None if libraries is None else tuple(libraries),
        )


def inspect_base(registry: Registry, base: BaseImage) -> BaseFacts:
    """Return what there is in a base image; each of its layers is read once, as it streams by.

    Layers compressed with zstd cannot be read. Of an image that has one, PYTHON_VERSION in its environment is believed,
    as the images of docker.io/library/python have it, and nothing more is known.

    Raises:
        InvalidVersion: a layer cannot be read, or is a bomb.
        BuilderError: the registry does not give it; see `Registry.blob_stream`.
    """
    if any(layer.media_type == _ZSTD for layer in base.layers):
        return _believed(base)
    if sum(layer.size for layer in base.layers) > _MOST_BYTES:
        _unusable(base, f"its layers are larger than {_MOST_BYTES} bytes")
    rootfs, budget, left = RootFs(), Budget(), _MOST_BYTES
    for layer in base.layers:
        try:
            with contextlib.closing(registry.blob_stream(base.reference.repository, layer)) as chunks:
                left -= _add(rootfs, chunks, layer, left, budget)
        except Malformed as error:
            _unusable(base, f"its layer {layer.digest} cannot be read: {error}", error)
    try:
        return _facts(rootfs, base)
    except Malformed as error:
        _unusable(base, f"its files cannot be told: {error}", error)


def _add(rootfs: RootFs, chunks: Iterator[bytes], layer: Descriptor, left: int, budget: Budget) -> int:
    """Add a layer and return the size of its archive, as far as it was read, in bytes."""
    size = 0

    def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            size += len(piece)
            yield piece

    rootfs.begin_layer()
    try:
        if layer.media_type == _PLAIN:
            pieces: Iterator[bytes] = _plain(chunks, left)
        else:
            pieces = inflated(chunks, min(left, _MOST_EACH + _MOST_RATIO * layer.size), budget)
        archive = Archive(counted(pieces), budget)
        for entry in archive:
            release = _release(entry, archive)
            rootfs.add(entry, release, b"" if release else _text(entry, archive))
    except Malformed:
        # What was damaged on the way is no fault of the image: its digest is checked at its end.
        _drain(chunks)
        raise
    _drain(chunks)
    return size


def _drain(chunks: Iterator[bytes]) -> None:
    for _ in chunks:
        pass


def _plain(chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
    for chunk in chunks:
        most -= len(chunk)
        if most < 0:
            refuse(f"the image has more than {_MOST_BYTES} bytes")
        if chunk:
            yield chunk


def _release(entry: Entry, archive: Archive) -> tuple[int, int] | None:
    """Return the version of the C library in a file, if it is one of GNU's."""
    if entry.kind != REGULAR or entry.sparse or entry.size > _MOST_LIBC or not _LIBC.fullmatch(entry.path):
        return None
    found = _RELEASE.search(archive.content())
    return (int(found[1]), int(found[2])) if found else None


def _text(entry: Entry, archive: Archive) -> bytes:
    """Return the content of a file that names the folders of libraries."""
    if entry.kind != REGULAR or entry.sparse or entry.size > _MOST_LOADER or not _LOADER.fullmatch(entry.path):
        return b""
    return archive.content()


def _facts(rootfs: RootFs, base: BaseImage) -> BaseFacts:
    opt, _ = rootfs.find("/opt", last=False)
    model, _ = rootfs.find(_MODEL, last=False)
    libraries = list(_libraries(rootfs))
    path = base.environ.get("PATH") or _PATH
    interpreters = _interpreters(rootfs, path)
    glibc = min((found for each in libraries if (found := _glibc(rootfs, each))), default=None)
    folders = chain(libraries, _more_libraries(rootfs, base, interpreters.values()))
    home = base.environ.get("JAVA_HOME")
    programs = [*path.split(":"), *([f"{home}/bin"] if home else [])]
    return BaseFacts(
        interpreters=interpreters,
        glibc=glibc,
        musl=any(_MUSL.fullmatch(name) for each in libraries for name in _names(rootfs, each)),
        occupied=model is not None or not isinstance(opt, Folder | None),
        java=any(_is_program(rootfs, f"{each}/java") for each in programs if each.startswith("/")),
        # Where the C library is elsewhere, its loader looks elsewhere.
        libraries=_found(rootfs, folders) if glibc else None,
    )


def _found(rootfs: RootFs, folders: Iterable[str]) -> tuple[str, ...] | None:
    """Return the names of the libraries in some folders; None where they are too many."""
    real = {rootfs.find(folder)[1] for folder in islice(folders, _MOST_FOLDERS)}
    found = {
        name
        for folder in real
        for name in _names(rootfs, folder)
        if _LIBRARY.fullmatch(name) and isinstance(rootfs.find(f"{folder}/{name}")[0], File)
    }
    return tuple(sorted(found)) if sum(map(len, found)) + 3 * len(found) <= _MOST_LIBRARIES else None


def _is_program(rootfs: RootFs, path: str) -> bool:
    found, _ = rootfs.find(path)
    return isinstance(found, File) and found.program


def _libraries(rootfs: RootFs) -> Iterator[str]:
    """Yield the directories of libraries, and Debian's for one architecture each (`/lib/x86_64-linux-gnu`)."""
    for path in _LIBRARIES:
        yield path
        yield from (f"{path}/{name}" for name in _names(rootfs, path) if "-linux-" in name)


def _more_libraries(rootfs: RootFs, base: BaseImage, interpreters: Iterable[str]) -> Iterator[str]:
    """Yield the directories where Python looks for libraries that are not the system's."""
    yield from ("/usr/local/lib", "/usr/local/lib64")
    # Where conda's interpreter and those of others that bring their own libraries look.
    yield from (f"{each.rpartition('/')[0]}/../lib" for each in interpreters)
    configured = [f"/etc/ld.so.conf.d/{name}" for name in _names(rootfs, "/etc/ld.so.conf.d")]
    for each in ("/etc/ld.so.conf", *configured):
        file, _ = rootfs.find(each)
        lines = file.text.decode("latin-1").splitlines() if isinstance(file, File) else []
        yield from (line.strip() for line in lines if line.startswith("/"))
    yield from (each for each in base.environ.get("LD_LIBRARY_PATH", "").split(":") if each.startswith("/"))


def _glibc(rootfs: RootFs, folder: str) -> tuple[int, int] | None:
    found, _ = rootfs.find(f"{folder}/libc.so.6")
    return found.release if isinstance(found, File) else None


def _interpreters(rootfs: RootFs, path: str) -> dict[str, str]:
    opt = (f"/opt/{name}/bin" for name in sorted(_names(rootfs, "/opt")))
    first = [each for each in path.split(":") if each.startswith("/")]
    found: dict[str, str] = {}
    for folder in chain(first, ("/usr/local/bin", "/usr/bin"), opt, ("/bin",), sorted(rootfs.folders("bin"))):
        for name in sorted(_names(rootfs, folder)):
            version = _PYTHON.fullmatch(name)
            if version and version[1] not in found and (real := _interpreter(rootfs, f"{folder}/{name}")):
                found[version[1]] = real
    return found


def _interpreter(rootfs: RootFs, path: str) -> str | None:
    """Return where an interpreter is that a path leads to, if it is one that environments can be made for."""
    file, real = rootfs.find(path)
    if not isinstance(file, File) or not file.program or not _SAFE.fullmatch(real):
        return None
    folder, _, name = real.rpartition("/")
    # Not another implementation, and not the copy of an interpreter in an environment.
    copied, _ = rootfs.find(f"{folder}/../pyvenv.cfg")
    return None if copied or _OTHERS.match(name) else real


def _names(rootfs: RootFs, path: str) -> list[str]:
    folder, _ = rootfs.find(path)
    return list(folder.children) if isinstance(folder, Folder) else []


def _believed(base: BaseImage) -> BaseFacts:
    version = _FULL.fullmatch(base.environ.get("PYTHON_VERSION", ""))
    if version is None:
        _unusable(base, "a layer of it is compressed with zstd, which cannot be read here")
    interpreters = {version[1]: f"/usr/local/bin/python{version[1]}"}
    return BaseFacts(interpreters=interpreters, glibc=None, musl=False, occupied=False)


def _unusable(base: BaseImage, why: str, cause: Exception | None = None) -> NoReturn:
    message = f"The base image {base.reference} cannot be used for {base.platform}: {why}."
    remedy = "Take another base image, or give the version a Dockerfile.template, which an engine builds."
    raise InvalidVersion(message, remedy=remedy) from cause
