"""What must be known of the files in a base image before packages can be laid out for it.

Layers are read as they stream by; names are kept in memory, and no file is written or followed.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import NoReturn

from builder.errors import InvalidVersion
from builder.oci.base_image import BaseImage
from builder.oci.descriptor import (
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
from builder.oci.layer import BLOCK
from builder.oci.registry import Registry

REGULAR, HARD_LINK, SYMBOLIC_LINK, DIRECTORY = b"0", b"1", b"2", b"5"
# What is inflated at a time; the rest is copied where a gzip member ends, so it is kept small.
_INPUT, _OUTPUT = 1 << 14, 1 << 20
_GZIP = 31
# Go's limit for one extended header that precedes an entry; here for all of them together.
_MOST_EXTRA = 1 << 20
# Gzip members, headers and pax records in an image: what costs time and need not hold a byte. The largest images have
# about a million entries, each with a pax header of a few records.
_MOST_READS = 8_000_000
_NO_CONTENT = frozenset({HARD_LINK, SYMBOLIC_LINK, b"3", b"4", DIRECTORY, b"6"})
_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"x", b"g", b"L", b"K", b"S"
_EXTRA = frozenset({_PAX, _GLOBAL, _LONG_NAME, _LONG_LINK})
_SPARSE_NAME = "GNU.sparse.name"
_MOST_SIZE = 1 << 50
_LONGEST_LENGTH = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a tar archive.

    Attributes:
        path: as it stands there.
        kind: its type flag; `REGULAR` for each way to say it.
        target: of a link, as it stands there.
        mode: its permissions.
        size: of its content in the archive, bytes.
        sparse: whether that content is not the file's.
    """

    path: str
    kind: bytes
    target: str
    mode: int
    size: int
    sparse: bool


class Budget:
    """What reading all layers of an image may cost."""

    def __init__(self, steps: int = _MOST_READS) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Count steps; raises `Malformed` where there were too many."""
        self._left -= steps
        if self._left < 0:
            refuse("it has too many headers and records")


def inflated(chunks: Iterable[bytes], most: int, budget: Budget) -> Generator[bytes, None, None]:
    """Yield what gzip members hold, at most 1 MiB at a time.

    Args:
        chunks: the members, one after the other, in pieces of any size.
        most: bytes that they may hold together.
        budget: each member is a step.

    Raises:
        Malformed: they are no gzip members, end too early, or hold more.
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
        refuse("it ends in the midst of its compressed content")


class Archive:
    """A tar archive that is read once; contents are passed over where nobody asks for them.

    Args:
        pieces: the archive, in pieces of any size but none that is empty.
        budget: each header and each pax record is a step; None for one of this archive's own.
    """

    def __init__(self, pieces: Iterator[bytes], budget: Budget | None = None) -> None:
        self._pieces = pieces
        self._budget = budget or Budget()
        self._piece = next(pieces, b"")
        self._at = 0
        self._left = 0

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries, up to the end of the archive.

        Raises:
            Malformed: it is no tar archive, or ends too early.
        """
        extra: dict[str, str] = {}
        left = _MOST_EXTRA
        while header := self._header():
            kind, size = header[156:157], _number(header[124:136])
            if kind in _EXTRA:
                left -= size
                if left < 0:
                    refuse("an extended header is too large, or there are too many before one entry")
                content = self._read(size)
                self._pass(-size % BLOCK)
                extra.update(_records(content, self._budget) if kind == _PAX else _named(kind, content))
                continue
            entry = _entry(header, extra, size)
            extra, left = {}, _MOST_EXTRA
            if header[156:157] == _SPARSE:
                more = header[482]
                while more:
                    self._budget.spend()
                    more = self._read(BLOCK)[504]
            self._left = entry.size
            yield entry
            self._pass(self._left + -entry.size % BLOCK)

    def content(self) -> bytes:
        """Return the content of the entry that was yielded last; asked for once at most."""
        size, self._left = self._left, 0
        return self._read(size)

    def _header(self) -> bytes:
        """Return the next header; empty at the end of the archive: two blocks of zeros, or simply nothing more."""
        self._budget.spend()
        header = self._some(BLOCK)
        if header and not any(header):
            header = self._some(BLOCK)
            if any(header):
                refuse("it is no tar archive, or is damaged")
            return b""
        if not header:
            return b""
        if len(header) < BLOCK:
            refuse("it ends in the midst of a header")
        # The field itself counts as blanks; some have summed signed bytes.
        told = _number(header[148:156])
        summed = sum(header) - sum(header[148:156]) + 8 * 32
        if told != summed and told != summed - 256 * sum(byte >> 7 for byte in header[:148] + header[156:]):
            refuse("it is no tar archive, or is damaged")
        return header

    def _read(self, size: int) -> bytes:
        content = self._some(size)
        if len(content) < size:
            refuse("it ends in the midst of a file")
        return content

    def _some(self, size: int) -> bytes:
        """Return the next bytes, fewer only where there are no more."""
        parts = []
        while size and self._piece:
            part = self._piece[self._at : self._at + size]
            self._at += len(part)
            size -= len(part)
            parts.append(part)
            if size:
                self._piece, self._at = next(self._pieces, b""), 0
        return b"".join(parts)

    def _pass(self, size: int) -> None:
        self._at += size
        while self._at > len(self._piece):
            self._at -= len(self._piece)
            self._piece = next(self._pieces, b"")
            if not self._piece:
                refuse("it ends in the midst of a file")


def _entry(header: bytes, extra: dict[str, str], size: int) -> Entry:
    path, kind = _text(header[:100]), header[156:157]
    if header[257:263] == b"ustar\0" and header[345]:
        path = f"{_text(header[345:500])}/{path}"
    path = extra.get(_SPARSE_NAME) or extra.get("path") or path
    if "size" in extra:
        size = _decimal(extra["size"])
    if kind == b"\0":
        kind = DIRECTORY if path.endswith("/") else REGULAR
    sparse = kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in extra)
    return Entry(
        path=path,
        kind=REGULAR if kind in {b"7", _SPARSE} else kind,
        target=extra.get("linkpath") or _text(header[157:257]),
        mode=_number(header[100:108]) & 0o7777,
        size=0 if kind in _NO_CONTENT else size,
        sparse=sparse,
    )


def _named(kind: bytes, content: bytes) -> dict[str, str]:
    """Return what GNU's header for a long name says; a global one is of no use here, as in Go."""
    if kind == _GLOBAL:
        return {}
    return {"path" if kind == _LONG_NAME else "linkpath": _text(content)}


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
            refuse("it has a pax header that is none")
        if key in {b"path", b"linkpath", b"size"} or key.startswith(b"GNU.sparse."):
            if b"\0" in value:
                refuse("it has a name with a NUL in it")
            found[_text(key)] = _text(value)
        at = end
    return found


def _number(field: bytes) -> int:
    """Return a header's number: octal, or GNU's binary form."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        # 0xff is of a negative number, which makes it too large here.
        if value > _MOST_SIZE:
            refuse("it has a header with an impossible number")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if digits.strip(b"01234567"):
        refuse("it has a header with a number that is none")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(_MOST_SIZE)):
        refuse("it has a pax header with an impossible size")
    return int(text)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
# What Linux allows: bytes of a path and of a name, and links on the way to a file.
_LONGEST_PATH, _LONGEST_NAME, _MOST_LINKS = 4096, 255, 40
# About what an entry takes in memory beside its names, and what an image may take.
_ENTRY_BYTES, _MOST_BYTES = 300, 256 << 20
# Steps from name to name in all paths together.
_MOST_STEPS = 50_000_000
_PROGRAM = 0o111

Release = tuple[int, int]


@dataclass(slots=True)
class File:
    """A file that is no directory and no symbolic link.

    Attributes:
        layer: the number of the layer that put it there.
        program: whether it is a regular file that somebody may execute.
        release: version of the C library that its content names; None where that was not looked for or found.
        text: its content, of the few files whose content matters.
    """

    layer: int
    program: bool = False
    release: Release | None = None
    text: bytes = b""


@dataclass(slots=True)
class Link:
    """A symbolic link and where it leads to."""

    layer: int
    target: str


@dataclass(slots=True)
class Folder:
    """A directory.

    Attributes:
        layer: the number of the last layer that put it, or something in it, there.
        opaque: the number of the last layer that hides what those below put in it; -1 for none.
        children: what is in it.
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

    def add(self, entry: Entry, release: Release | None = None, text: bytes = b"") -> None:
        """Add an entry of the layer.

        Args:
            entry: as it stands in the layer's archive.
            release: of the C library in a regular file.
            text: of a regular file, as far as it matters.

        Raises:
            Malformed: nobody could unpack it, or the image has too many names for the memory.
        """
        *parents, name = _parts(entry.path) or [""]
        if not name:
            return
        if name.startswith(_WHITEOUT):
            folder, _ = self._at(parents)
            if isinstance(folder, Folder):
                self._whiteout(folder, name)
            return
        folder, _ = self._at(parents, make=True)
        if not isinstance(folder, Folder):
            refuse("it has a path that leads in a circle")
        there = folder.children.get(name)
        if entry.kind != DIRECTORY:
            self._put(folder, name, self._leaf(entry, release, text))
        elif isinstance(there, Folder):
            there.layer = self._layer
        else:
            self._put(folder, name, Folder(self._layer, opaque=self._layer))

    def find(self, path: str, *, last: bool = True) -> tuple[Node | None, str]:
        """Return what a path leads to, or None, and where that is without any link.

        Args:
            path: from the root.
            last: whether to follow a link at the path's end.
        """
        node, names = self._at(path.split("/"), last=last)
        return node, "/" + "/".join(names)

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

    def _leaf(self, entry: Entry, release: Release | None, text: bytes) -> File | Link:
        if entry.kind == SYMBOLIC_LINK:
            if len(entry.target) > _LONGEST_PATH:
                refuse("it has a link that is too long")
            self._bytes += len(entry.target)
            return Link(self._layer, entry.target)
        if entry.kind == HARD_LINK:
            other, _ = self._at(_parts(entry.target), last=False)
            return (
                File(self._layer) if other is None or isinstance(other, Folder) else replace(other, layer=self._layer)
            )
        self._bytes += len(text)
        return File(self._layer, entry.kind == REGULAR and bool(entry.mode & _PROGRAM), release, text)

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
        """Take away what the layers below put into a directory; what this layer put there stays."""
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
            make: whether the whole path is of directories, which are made where there are none, for this layer.
            last: whether to follow a link at its end.
        """
        names: list[str] = []
        folders = [self._root]
        todo, links = parts[::-1], 0
        while todo:
            name = todo.pop()
            self._spend(1)
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

    def _spend(self, steps: int) -> None:
        self._steps += steps
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


_VERSION = 3
_ZSTD, _PLAIN = f"{OCI_LAYER}+zstd", OCI_LAYER
# What a base's layers may hold, not compressed: all together, and each beside a hundred times what it is compressed.
_MOST_FACTS_BYTES, _MOST_EACH, _MOST_RATIO = 32 << 30, 256 << 20, 100

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
    if sum(layer.size for layer in base.layers) > _MOST_FACTS_BYTES:
        _unusable(base, f"its layers are larger than {_MOST_FACTS_BYTES} bytes")
    rootfs, budget, left = RootFs(), Budget(), _MOST_FACTS_BYTES
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
            rootfs.add(entry, release, b"" if release else _text_of(entry, archive))
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
            refuse(f"the image has more than {_MOST_FACTS_BYTES} bytes")
        if chunk:
            yield chunk


def _release(entry: Entry, archive: Archive) -> tuple[int, int] | None:
    """Return the version of the C library in a file, if it is one of GNU's."""
    if entry.kind != REGULAR or entry.sparse or entry.size > _MOST_LIBC or not _LIBC.fullmatch(entry.path):
        return None
    found = _RELEASE.search(archive.content())
    return (int(found[1]), int(found[2])) if found else None


def _text_of(entry: Entry, archive: Archive) -> bytes:
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
