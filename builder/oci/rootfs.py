"""The facts of a base image that decide which packages fit: interpreters, C library, shared libraries, Java.

Layers are read as they stream by. Only names are kept, in memory: no file is written, and no link is followed on disk.
"""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from tarfile import TarInfo
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from builder.errors import InvalidVersion
from builder.oci import OCI_LAYER, Descriptor, Malformed, from_bytes, refuse, to_bytes
from builder.oci.base_image import BaseImage
from builder.oci.layer import BLOCK
from builder.oci.registry import Registry

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Bytes that are inflated at a time; the rest is copied where a gzip member ends, so it is kept small.
_INPUT, _OUTPUT = 1 << 14, 1 << 20
_GZIP = 31
# Go's limit for one extended header that precedes an entry; here for all of them together.
_MOST_EXTRA = 1 << 20
# Gzip members, headers and pax records in an image: each costs time and need not hold a byte. The largest images have
# about a million entries, each with a pax header of a few records.
_MOST_READS = 8_000_000
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_EXTENDED = frozenset({_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK})
_SPARSE, _SPARSE_NAME = "GNU.sparse.", "GNU.sparse.name"
_MOST_SIZE = 1 << 50
# Octal digits, or GNU's binary form. `tarfile` takes signs, underscores and whatever follows a NUL as well.
_NUMBER = re.compile(rb" *[0-7]*[ \0]*|[\x80\xff].*", re.DOTALL)
_LONGEST_LENGTH = 20


class Budget:
    """The work that all layers of an image may take together."""

    def __init__(self, steps: int = _MOST_READS) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Count steps; raises `Malformed` where there were too many."""
        self._left -= steps
        if self._left < 0:
            refuse("it has too many headers and records")


def inflated(chunks: Iterable[bytes], most: int, budget: Budget) -> Generator[bytes, None, None]:
    """Yield the content of gzip members, at most 1 MiB at a time.

    Args:
        chunks: the members, one after the other, in pieces of any size.
        most: bytes that they may hold together.
        budget: each member is a step.

    Raises:
        Malformed: they are not gzip members, end too early, or hold more.
    """
    member, size = zlib.decompressobj(_GZIP), 0
    for chunk in chunks:
        for start in range(0, len(chunk), _INPUT):
            data = chunk[start : start + _INPUT]
            while data:
                if member.eof:
                    budget.spend()
                    member = zlib.decompressobj(_GZIP)
                try:
                    piece = member.decompress(data, _OUTPUT)
                except zlib.error as error:
                    refuse("it is not compressed with gzip, or is damaged", error)
                size += len(piece)
                if size > most:
                    refuse(f"it has more than {most} bytes when it is not compressed")
                if piece:
                    yield piece
                data = member.unused_data or member.unconsumed_tail
    if not member.eof:
        refuse("its compressed content is cut off")


class _Stream(io.RawIOBase):
    """Pieces of bytes as a file.

    Attributes:
        size: bytes that were read.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        with memoryview(buffer) as room:
            size = min(len(room), len(self._rest))
            room[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        self.size += size
        return size


class Archive:
    """A tar archive that is read once; contents that nobody takes are skipped.

    `tarfile` reads the headers, not the archive: its `TarFile` takes a damaged header for the end of the archive, keeps
    each member in memory, and reads extended headers of any size and number in quadratic time
    (docs/decisions/0047-zlib-and-tarfile.md).

    Args:
        pieces: the archive, in pieces of any size.
        budget: each header and each pax record is a step; None for one of this archive's own.
    """

    def __init__(self, pieces: Iterator[bytes], budget: Budget | None = None) -> None:
        self._raw = _Stream(pieces)
        self._file = io.BufferedReader(self._raw)
        self._budget = budget or Budget()
        self._left = 0

    @property
    def size(self) -> int:
        """Bytes of the archive, as far as it was read."""
        return self._raw.size

    def __iter__(self) -> Iterator[TarInfo]:
        """Yield the entries, up to the end of the archive.

        An entry's `size` is that of its content in the archive, which is not the file's where it has `pax_headers` for
        a sparse file, or the type of one.

        Raises:
            Malformed: it is not a tar archive, or ends too early.
        """
        extra: dict[str, str] = {}
        left = _MOST_EXTRA
        while header := self._header():
            entry = _parsed(header)
            if entry.type in _EXTENDED:
                left -= entry.size
                if left < 0:
                    refuse("an extended header is too large, or there are too many before one entry")
                content = self._read(entry.size)
                self._skip(-entry.size % BLOCK)
                extra |= self._extended(entry.type, content)
                continue
            _extend(entry, extra)
            extra, left = {}, _MOST_EXTRA
            more = entry.type == tarfile.GNUTYPE_SPARSE and header[482]
            while more:
                self._budget.spend()
                more = self._read(BLOCK)[504]
            self._left = entry.size
            yield entry
            self._skip(self._left + -entry.size % BLOCK)

    def content(self) -> bytes:
        """Return the content of the entry that was yielded last; to be called once at most."""
        size, self._left = self._left, 0
        return self._read(size)

    def _header(self) -> bytes:
        """Return the next header; empty at the end of the archive: two blocks of zeros, or simply nothing more."""
        self._budget.spend()
        header = self._file.read(BLOCK)
        if header and not any(header):
            if any(self._file.read(BLOCK)):
                refuse("it is not a tar archive, or is damaged")
            return b""
        return header

    def _extended(self, kind: bytes, content: bytes) -> dict[str, str]:
        """Return what an extended header says of the next entry; a global one is ignored, as in Go."""
        if kind == _PAX:
            return _records(content, self._budget)
        return {} if kind == _GLOBAL else {"path" if kind == _LONG_NAME else "linkpath": _text(content)}

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        if len(content) < size:
            refuse("it ends in the middle of a file")
        return content

    def _skip(self, size: int) -> None:
        while size > 0:
            size -= len(self._read(min(size, _OUTPUT)))


def _parsed(header: bytes) -> TarInfo:
    """Return the entry of a header."""
    try:
        entry = TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        refuse(f"it is not a tar archive, or is damaged: {error}", error)
    for number, stored in ((entry.mode, header[100:108]), (entry.size, header[124:136])):
        if not 0 <= number <= _MOST_SIZE or not _NUMBER.fullmatch(stored):
            refuse("it has a header with an impossible number")
    # `tarfile` makes a directory of an entry without a type by its name here, before a pax header gives another path.
    entry.type, entry.name = header[156:157], _text(header[:100])
    # It also takes times for the beginning of the path, in archives of GNU's older form.
    if header[257:263] == b"ustar\0" and header[345]:
        entry.name = f"{_text(header[345:500])}/{entry.name}"
    return entry


def _extend(entry: TarInfo, extra: dict[str, str]) -> None:
    """Change an entry by what extended headers say of it."""
    entry.name = extra.get(_SPARSE_NAME) or extra.get("path") or entry.name
    entry.linkname = extra.get("linkpath") or entry.linkname
    entry.pax_headers = extra
    if "size" in extra:
        entry.size = _decimal(extra["size"])
    if entry.type == tarfile.AREGTYPE and entry.name.endswith("/"):
        entry.type = tarfile.DIRTYPE
    if entry.type in tarfile.SUPPORTED_TYPES and not entry.isreg():
        entry.size = 0


def _records(content: bytes, budget: Budget) -> dict[str, str]:
    """Return the records of a pax header: each is its length, a blank, the key, `=`, the value and a line feed."""
    found = {}
    at = 0
    while at < len(content):
        budget.spend()
        blank = content.find(b" ", at, at + _LONGEST_LENGTH)
        length = content[at : max(at, blank)]
        end = at + int(length) if length.isdigit() else at
        key, equals, value = content[blank + 1 : max(blank, end - 1)].partition(b"=")
        if not equals or content[end - 1 : end] != b"\n" or b"\0" in key:
            refuse("it has a malformed pax header")
        if key in {b"path", b"linkpath", b"size"} or key.startswith(_SPARSE.encode()):
            if b"\0" in value:
                refuse("it has a name with a NUL in it")
            found[_text(key)] = _text(value)
        at = end
    return found


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(_MOST_SIZE)):
        refuse("it has a pax header with an impossible size")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
# The limits of Linux: bytes of a path and of a name, and links on the way to a file.
_LONGEST_PATH, _LONGEST_NAME, _MOST_LINKS = 4096, 255, 40
# The memory of an entry beside its names, roughly, and of an image.
_ENTRY_BYTES, _MOST_BYTES = 300, 256 << 20
# Steps from name to name in all paths together.
_MOST_STEPS = 50_000_000
_PROGRAM = 0o111


@dataclass(slots=True)
class File:
    """A file that is neither a directory nor a symbolic link.

    Attributes:
        layer: the number of the layer it comes from.
        program: whether it is a regular file that somebody may execute.
        content: as a whole, of a file that names the folders of libraries; empty for any other.
        glibc: major and minor version of GNU's C library, where the file is one.
    """

    layer: int
    program: bool = False
    content: bytes = b""
    glibc: tuple[int, int] | None = None


@dataclass(slots=True)
class Link:
    """A symbolic link and its target."""

    layer: int
    target: str


@dataclass(slots=True)
class Folder:
    """A directory.

    Attributes:
        layer: the number of the last layer that has it, or something in it.
        opaque: the number of the last layer that hides what those below have in it; -1 for none.
        children: by their names.
    """

    layer: int
    opaque: int = -1
    children: dict[str, Node] = field(default_factory=dict)


Node = File | Link | Folder


class RootFs:
    """The file system of an image. Layers are added from the first to the last."""

    def __init__(self) -> None:
        self._root = Folder(0)
        self._layer = 0
        self._bytes = 0
        self._steps = 0

    def begin_layer(self) -> None:
        """Begin the next layer."""
        self._layer += 1

    def add(self, entry: TarInfo, content: bytes = b"", glibc: tuple[int, int] | None = None) -> None:
        """Add an entry of the layer.

        Args:
            entry: as the layer's archive has it.
            content: see `File`.
            glibc: see `File`.

        Raises:
            Malformed: nobody could unpack it, or the image has too many names for the memory.
        """
        *parents, name = _parts(entry.name) or [""]
        if not name:
            return
        folder, _ = self._at(parents, make=not name.startswith(_WHITEOUT))
        if name.startswith(_WHITEOUT):
            if isinstance(folder, Folder):
                self._whiteout(folder, name)
            return
        if not isinstance(folder, Folder):
            refuse("it has a path that leads in a circle")
        existing = folder.children.get(name)
        if not entry.isdir():
            self._put(folder, name, self._leaf(entry, content, glibc))
        elif isinstance(existing, Folder):
            existing.layer = self._layer
        else:
            self._put(folder, name, Folder(self._layer, opaque=self._layer))

    def find(self, path: str, *, last: bool = True) -> tuple[Node | None, str]:
        """Return what a path leads to, or None, and its path without any link.

        Args:
            path: from the root.
            last: whether to follow a link at the path's end.
        """
        node, names = self._at(path.split("/"), last=last)
        return node, "/" + "/".join(names)

    def file(self, path: str) -> File | None:
        """Return the file that a path leads to; None where it leads to none."""
        found, _ = self.find(path)
        return found if isinstance(found, File) else None

    def names(self, path: str) -> list[str]:
        """Return the names in the directory that a path leads to."""
        folder, _ = self.find(path)
        return list(folder.children) if isinstance(folder, Folder) else []

    def folders(self, name: str) -> Iterator[str]:
        """Yield the paths of all directories of a name, in no order."""
        todo: list[tuple[str, Folder]] = [("", self._root)]
        while todo:
            path, folder = todo.pop()
            for each, node in folder.children.items():
                if isinstance(node, Folder):
                    todo.append((f"{path}/{each}", node))
                    if each == name:
                        yield f"{path}/{each}"

    def _leaf(self, entry: TarInfo, content: bytes, glibc: tuple[int, int] | None) -> File | Link:
        if entry.issym():
            if len(entry.linkname) > _LONGEST_PATH:
                refuse("it has a link that is too long")
            self._bytes += len(entry.linkname)
            return Link(self._layer, entry.linkname)
        if entry.islnk():
            other, _ = self._at(_parts(entry.linkname), last=False)
            return replace(other, layer=self._layer) if isinstance(other, File | Link) else File(self._layer)
        self._bytes += len(content)
        return File(self._layer, entry.isreg() and bool(entry.mode & _PROGRAM), content, glibc)

    def _put(self, folder: Folder, name: str, node: Node) -> None:
        if len(name) > _LONGEST_NAME:
            refuse("it has a name that is too long")
        self._bytes += _ENTRY_BYTES + len(name)
        if self._bytes > _MOST_BYTES:
            refuse("it has too many names")
        folder.children[name] = node

    def _whiteout(self, folder: Folder, name: str) -> None:
        if name == _OPAQUE:
            self._hide(folder)
            return
        name = name.removeprefix(_WHITEOUT)
        node = folder.children.get(name)
        if node is None:
            return
        if node.layer < self._layer:
            del folder.children[name]
        elif isinstance(node, Folder):
            self._hide(node)

    def _hide(self, folder: Folder) -> None:
        """Remove what the layers below have in a directory; what this layer has there stays."""
        todo = [folder]
        while todo:
            each = todo.pop()
            if each.opaque == self._layer:
                continue
            each.opaque = self._layer
            each.children = {name: node for name, node in each.children.items() if node.layer == self._layer}
            todo += [node for node in each.children.values() if isinstance(node, Folder)]

    def _at(self, parts: list[str], *, make: bool = False, last: bool = True) -> tuple[Node | None, list[str]]:
        """Return what a path leads to, and the path without links; None where there is nothing, or too many links.

        Args:
            parts: of the path.
            make: whether the whole path is of directories, which are made where they are missing, for this layer.
            last: whether to follow a link at its end.
        """
        names: list[str] = []
        folders = [self._root]
        todo, links = parts[::-1], 0
        while todo:
            name = todo.pop()
            self._step()
            if name in {"", "."}:
                continue
            if name == "..":
                # The root is its own parent.
                del names[-1:], folders[max(1, len(folders) - 1) :]
                continue
            node = folders[-1].children.get(name)
            if isinstance(node, Link) and (todo or last):
                links += 1
                if links > _MOST_LINKS:
                    return None, names
                if node.target.startswith("/"):
                    names, folders = [], [self._root]
                todo += node.target.split("/")[::-1]
                continue
            names.append(name)
            if make and not isinstance(node, Folder):
                node = Folder(self._layer, opaque=self._layer)
                self._put(folders[-1], name, node)
            if not isinstance(node, Folder):
                return (None if todo else node), names
            if make:
                node.layer = self._layer
            folders.append(node)
        return folders[-1], names

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            refuse("its paths and links are too long")


def _parts(path: str) -> list[str]:
    """Return the names of a path in an archive; `..` leads no further than to the root, as engines have it."""
    if len(path) > _LONGEST_PATH:
        refuse("it has a path that is too long")
    found: list[str] = []
    for name in path.split("/"):
        if name == "..":
            del found[-1:]
        elif name not in {"", "."}:
            found.append(name)
    return found


_ZSTD = f"{OCI_LAYER}+zstd"
# The most bytes in a base's layers, not compressed: in all, and in each beyond a hundred times its compressed size.
_MOST_CONTENT, _MOST_EACH, _MOST_RATIO = 32 << 30, 256 << 20, 100

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHON = re.compile(r"python([0-9]{1,2}\.[0-9]{1,3})")
_FULL = re.compile(r"([0-9]{1,2}\.[0-9]{1,3})(?:\.[0-9]+)?(?:[a-z]+[0-9]+)?")
# Paths that are safe in a file of Python's own settings, and in a link.
_SAFE = r"(?:/[A-Za-z0-9._+@~-]{1,255})+"
_OTHERS = re.compile(r"pypy|graalpy")
_LIBC = re.compile(r"(?:.*/)?libc(?:\.so\.6|-2\.\d+\.so)")
_RELEASE = re.compile(rb"release version ([0-9]{1,3})\.([0-9]{1,3})")
_MOST_LIBC = 16 << 20
_LIBRARIES = ("/lib64", "/lib", "/usr/lib64", "/usr/lib")
_LIBRARY = r"[A-Za-z0-9._+-]*\.so[A-Za-z0-9._+-]*"
# Files that ldconfig reads: a folder a line. Other lines (a comment, `include`, `hwcap`) are skipped.
_LOADER = re.compile(r"(?:\./|/)?etc/ld\.so\.conf(?:\.d/[^/]+\.conf)?")
_MOST_LOADER = 1 << 14
_MOST_FOLDERS = 1000
# CUDA's images have some 2,000 libraries, with names of 25 characters.
_MOST_LIBRARIES = 1 << 20
_MUSL = re.compile(r"ld-musl-[A-Za-z0-9_-]+\.so\.1")
# Where the model's environment goes.
_MODEL = "/opt/model"

_Minor = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}\.[0-9]{1,3}$")]
# As many digits as `_RELEASE` takes, in kept facts too: each minor version up to glibc's makes tags for wheels.
_Number = Annotated[int, Field(ge=0, le=999)]
_Path = Annotated[str, StringConstraints(pattern=f"^{_SAFE}$")]
_Library = Annotated[str, StringConstraints(pattern=f"^{_LIBRARY}$", max_length=_LONGEST_NAME)]


class BaseFacts(BaseModel):
    """What a base image has in it.

    Attributes:
        interpreters: for each minor version of CPython, such as `3.11`, the absolute path of its interpreter, without
            links on the way.
        glibc: major and minor version; the lowest where there are several, None where there is none.
        musl: whether musl's dynamic loader is there.
        occupied: whether there is something at /opt/model, or in the way to it: an /opt that is not a directory.
        java: whether there is a Java to be run: a program `java` in PATH or JAVA_HOME; None where that is not known.
        libraries: the names of the shared libraries where programs look for them; None where they are not known.
        version: of this form.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    interpreters: dict[_Minor, _Path]
    glibc: tuple[_Number, _Number] | None
    musl: bool
    occupied: bool
    java: bool | None = None
    libraries: tuple[_Library, ...] | None = None
    version: Literal[3] = 3

    def to_json(self) -> bytes:
        """Return the facts as JSON, the same bytes for the same facts."""
        return to_bytes(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, content: bytes) -> BaseFacts:
        """Return the facts that `to_json` wrote.

        Raises:
            Malformed: it did not write this.
        """
        if set(from_bytes(content)) != set(cls.model_fields):
            refuse("it does not hold the facts of a base image")
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            refuse("it does not hold the facts of a base image, or those of another version", error)


def inspect_base(registry: Registry, base: BaseImage) -> BaseFacts:
    """Return what a base image has in it; each of its layers is read once, as it streams by.

    Layers compressed with zstd cannot be read. Of an image that has one, PYTHON_VERSION in its environment is believed,
    as the images of docker.io/library/python have it, and nothing more is known.

    Raises:
        InvalidVersion: a layer cannot be read, or is a bomb.
        BuilderError: the registry does not give it; see `Registry.blob_stream`.
    """
    if any(layer.media_type == _ZSTD for layer in base.layers):
        return _believed(base)
    if sum(layer.size for layer in base.layers) > _MOST_CONTENT:
        _unusable(base, f"its layers are larger than {_MOST_CONTENT} bytes")
    rootfs, budget, left = RootFs(), Budget(), _MOST_CONTENT
    for layer in base.layers:
        try:
            with contextlib.closing(registry.blob_stream(base.reference.repository, layer)) as chunks:
                left -= _add(rootfs, chunks, layer, left, budget)
        except Malformed as error:
            _unusable(base, f"its layer {layer.digest} cannot be read: {error}", error)
    try:
        return _facts(rootfs, base)
    except Malformed as error:
        _unusable(base, f"its files cannot be examined: {error}", error)


def _add(rootfs: RootFs, chunks: Iterator[bytes], layer: Descriptor, left: int, budget: Budget) -> int:
    """Add a layer and return the size of its archive, as far as it was read, in bytes."""
    rootfs.begin_layer()
    if layer.media_type == OCI_LAYER:
        if layer.size > left:
            refuse(f"the image has more than {_MOST_CONTENT} bytes")
        pieces = chunks
    else:
        pieces = inflated(chunks, min(left, _MOST_EACH + _MOST_RATIO * layer.size), budget)
    archive = Archive(pieces, budget)
    try:
        for entry in archive:
            rootfs.add(entry, *_content(entry, archive))
    except Malformed:
        # What was damaged on the way is not the image's fault: its digest is checked at its end.
        _drain(chunks)
        raise
    _drain(chunks)
    return archive.size


def _drain(chunks: Iterator[bytes]) -> None:
    for _ in chunks:
        pass


def _content(entry: TarInfo, archive: Archive) -> tuple[bytes, tuple[int, int] | None]:
    """Return the content of a file that names the folders of libraries, and the version of GNU's C library."""
    sparse = entry.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(_SPARSE) for key in entry.pax_headers)
    if not entry.isreg() or sparse:
        return b"", None
    if entry.size <= _MOST_LIBC and _LIBC.fullmatch(entry.name):
        release = _RELEASE.search(archive.content())
        return b"", (int(release[1]), int(release[2])) if release else None
    return archive.content() if entry.size <= _MOST_LOADER and _LOADER.fullmatch(entry.name) else b"", None


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
        musl=any(_MUSL.fullmatch(name) for each in libraries for name in rootfs.names(each)),
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
        for name in rootfs.names(folder)
        if re.fullmatch(_LIBRARY, name) and rootfs.file(f"{folder}/{name}")
    }
    return tuple(sorted(found)) if sum(map(len, found)) + 3 * len(found) <= _MOST_LIBRARIES else None


def _is_program(rootfs: RootFs, path: str) -> bool:
    found = rootfs.file(path)
    return found is not None and found.program


def _libraries(rootfs: RootFs) -> Iterator[str]:
    """Yield the directories of libraries, and Debian's for one architecture each (`/lib/x86_64-linux-gnu`)."""
    for path in _LIBRARIES:
        yield path
        yield from (f"{path}/{name}" for name in rootfs.names(path) if "-linux-" in name)


def _more_libraries(rootfs: RootFs, base: BaseImage, interpreters: Iterable[str]) -> Iterator[str]:
    """Yield the directories where Python looks for libraries that are not the system's."""
    yield from ("/usr/local/lib", "/usr/local/lib64")
    # Where conda's interpreter and those of others that bring their own libraries look.
    yield from (f"{each.rpartition('/')[0]}/../lib" for each in interpreters)
    for each in ("/etc/ld.so.conf", *(f"/etc/ld.so.conf.d/{name}" for name in rootfs.names("/etc/ld.so.conf.d"))):
        file = rootfs.file(each)
        lines = file.content.decode("latin-1").splitlines() if file else []
        yield from (line.strip() for line in lines if line.startswith("/"))
    yield from (each for each in base.environ.get("LD_LIBRARY_PATH", "").split(":") if each.startswith("/"))


def _glibc(rootfs: RootFs, folder: str) -> tuple[int, int] | None:
    found = rootfs.file(f"{folder}/libc.so.6")
    return found.glibc if found else None


def _interpreters(rootfs: RootFs, path: str) -> dict[str, str]:
    opt = (f"/opt/{name}/bin" for name in sorted(rootfs.names("/opt")))
    first = [each for each in path.split(":") if each.startswith("/")]
    found: dict[str, str] = {}
    for folder in chain(first, ("/usr/local/bin", "/usr/bin"), opt, ("/bin",), sorted(rootfs.folders("bin"))):
        for name in sorted(rootfs.names(folder)):
            version = _PYTHON.fullmatch(name)
            if version and version[1] not in found and (real := _interpreter(rootfs, f"{folder}/{name}")):
                found[version[1]] = real
    return found


def _interpreter(rootfs: RootFs, path: str) -> str | None:
    """Return where an interpreter is that a path leads to, if it is one that environments can be made for."""
    file, real = rootfs.find(path)
    if not isinstance(file, File) or not file.program or not re.fullmatch(_SAFE, real):
        return None
    folder, _, name = real.rpartition("/")
    # Not another implementation, and not the copy of an interpreter in an environment.
    copied, _ = rootfs.find(f"{folder}/../pyvenv.cfg")
    return None if copied or _OTHERS.match(name) else real


def _believed(base: BaseImage) -> BaseFacts:
    version = _FULL.fullmatch(base.environ.get("PYTHON_VERSION", ""))
    if version is None:
        _unusable(base, "it has a layer compressed with zstd, which cannot be read here")
    interpreters = {version[1]: f"/usr/local/bin/python{version[1]}"}
    return BaseFacts(interpreters=interpreters, glibc=None, musl=False, occupied=False)


def _unusable(base: BaseImage, why: str, cause: Exception | None = None) -> NoReturn:
    message = f"The base image {base.reference} cannot be used for {base.platform}: {why}."
    remedy = "Use another base image, or give the version a Dockerfile.template, which an engine builds."
    raise InvalidVersion(message, remedy=remedy) from cause
