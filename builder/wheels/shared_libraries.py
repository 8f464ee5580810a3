"""The shared libraries in wheels, and the libraries that they lack in an environment."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from builder.reference import Platform
from builder.wheels.wheel import Place

_MAGIC = b"\x7fELF"
# A name that the loader searches in its folders; one with a slash is a path.
NAME = re.compile(r"[A-Za-z0-9._+-]{1,255}")
_SHARED = 3
_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS, _STRINGS_SIZE, _SONAME = 1, 5, 10, 14
# The largest that were seen: 12 program headers, 50 entries, 36 libraries needed, 60 MB of names.
_MOST_HEADERS, _MOST_ENTRIES, _MOST_NEEDED, _MOST_STRINGS = 256, 4096, 256, 128 << 20
_CHUNK = 1 << 20
# Names stand near the beginning or, where auditwheel has changed them, at the end. Of the libraries seen, which have up
# to 860 MB, those of tensorflow reach furthest from there: to 93 MB.
_HEAD, _TAIL = 96 << 20, 16 << 20
# The header, a program header and an entry of the dynamic section, in files of 32 and of 64 bits.
_HEADER = {1: "16xHHIIIIIHHH", 2: "16xHHIQQQIHHH"}
_SEGMENT = {1: "IIIIIIII", 2: "IIQQQQQQ"}
_ENTRY = {1: "iI", 2: "qQ"}
_ORDER = {1: "<", 2: ">"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """A shared library.

    Attributes:
        machine: the ABI's number of its machine: 62 for amd64.
        soname: its own name; empty for none.
        needed: the names of the libraries that the loader needs for it, in order.
        importable: whether it defines the function that Python calls to import it.
    """

    machine: int
    soname: str
    needed: tuple[str, ...]
    importable: bool


def read_elf(file: IO[bytes], module: str) -> Elf | None:
    """Return a shared library's header data; None for another file, and for a library that no loader could use.

    Names that are not plain file names are left out.

    Args:
        file: the library; is read in any order.
        module: the name of the Python module that it would be.
    """
    try:
        return _read(file, module)
    except (struct.error, LookupError, ValueError):
        return None


def parts_of(head: bytes, size: int) -> list[range]:
    """Return the parts of a library that `read_elf` reads, wherever a linker put its names; none for another file.

    They may overlap.

    Args:
        head: the file's beginning, with its program headers.
        size: of the file, bytes.
    """
    try:
        layout = _layout(io.BytesIO(head))
    except (struct.error, LookupError):
        return []
    if layout is None:
        return []
    dynamic = range(layout.dynamic[0], layout.dynamic[0] + layout.dynamic[1])
    return [range(_HEAD), dynamic, range(size - _TAIL, size)]


class _Layout(NamedTuple):
    """A library's headers: the format of an entry, the loaded segments, and the extent of the dynamic section."""

    machine: int
    entry: struct.Struct
    loaded: list[tuple[int, int, int]]
    dynamic: tuple[int, int]


def _layout(file: IO[bytes]) -> _Layout | None:
    start = _at(file, 0, 64)
    if not start.startswith(_MAGIC):
        return None
    order, bits = _ORDER[start[5]], start[4]
    header, segment, entry = (struct.Struct(order + form[bits]) for form in (_HEADER, _SEGMENT, _ENTRY))
    kind, machine, _, _, where, _, _, _, size, count = header.unpack_from(start)
    if kind != _SHARED or size != segment.size or count > _MOST_HEADERS:
        return None
    loaded, dynamic = [], (0, 0)
    for fields in segment.iter_unpack(_at(file, where, size * count)):
        offset, address, length = (fields[1], fields[2], fields[4]) if bits == 1 else (fields[2], fields[3], fields[5])
        if fields[0] == _LOAD:
            loaded.append((address, length, offset))
        elif fields[0] == _DYNAMIC:
            length = min(length, _MOST_ENTRIES * entry.size)
            dynamic = offset, length - length % entry.size
    return _Layout(machine, entry, loaded, dynamic)


def _read(file: IO[bytes], module: str) -> Elf | None:
    layout = _layout(file)
    if layout is None:
        return None
    values: dict[int, list[int]] = {}
    for tag, value in layout.entry.iter_unpack(_at(file, *layout.dynamic)):
        if tag == 0:
            break
        values.setdefault(tag, []).append(value)
    (begin,), (length,) = values[_STRINGS], values[_STRINGS_SIZE]
    (table, *_) = [
        start + begin - address for address, size, start in layout.loaded if address <= begin < address + size
    ]

    def name(place: int) -> str:
        text = _at(file, table + place, min(256, length - place)) if place < length else b""
        found = text.partition(b"\0")[0].decode("latin-1")
        return found if NAME.fullmatch(found) else ""

    needed = (name(place) for place in values.get(_NEEDED, [])[:_MOST_NEEDED])
    return Elf(
        machine=layout.machine,
        soname=name(values[_SONAME][0]) if _SONAME in values else "",
        needed=tuple(dict.fromkeys(filter(None, needed))),
        importable=bool(module) and _holds(file, table, min(length, _MOST_STRINGS), f"PyInit_{module}\0".encode()),
    )


def _holds(file: IO[bytes], start: int, length: int, word: bytes) -> bool:
    """Return whether a part of a file holds a word."""
    overlap = len(word) - 1
    return any(
        word in _at(file, start + place, min(_CHUNK + overlap, length - place)) for place in range(0, length, _CHUNK)
    )


def _at(file: IO[bytes], place: int, size: int) -> bytes:
    """Return the bytes at a place, fewer at the end of the file and none behind it."""
    file.seek(min(place, file.seek(0, io.SEEK_END)))
    return file.read(size)


# Comments and strings, which are removed. One without an end ends with the line, or with the file. Without possessive
# groups, in which Python 3.11.2, Debian's, has a defect.
_UNREAD = re.compile(
    rb"#[^\n]*"
    rb'|"""(?:[^"\\]+|\\(?:.|\Z)|"(?!""))*(?:"""|\Z)'
    rb"|'''(?:[^'\\]+|\\(?:.|\Z)|'(?!''))*(?:'''|\Z)"
    rb'|"(?:[^"\\\n]+|\\.)*"?'
    rb"|'(?:[^'\\\n]+|\\.)*'?",
    re.DOTALL,
)
_CONTINUED = re.compile(rb"\\\r?\n")
_STATEMENT = rb"(?:import|from)\b[^\n;(]*(?:\([^()]*\))?"
_IMPORT = re.compile(rb"^([ \t]*+)(" + _STATEMENT + rb")", re.MULTILINE)
_WORD = re.compile(rb"\w+")
# A line's indent, and its import, or its first word and the rest.
_LINE = re.compile(rb"^([ \t]*+)(?:(" + _STATEMENT + rb")|(\w+)([^\n]*)|[^\s])", re.MULTILINE)
# Of a statement with single spaces.
_FROM = re.compile(rb"from ?(\.*+) ?((?:(?!import\b)[\w.]++)?) ?import\b(.*)")
_NAME = re.compile(rb"[^\W\d]\w*")
_DOTTED = re.compile(rb"[^\W\d][\w.]*")
_RAISES = re.compile(rb"\braise\b")
_CATCHES = re.compile(rb"\s*:|.*\b(?:ImportError|ModuleNotFoundError|Exception|BaseException)\b")
_LONGEST_NAME = 256
# Of all modules of a wheel, each with what it imports; scipy's take 3,000.
_MOST_IMPORTS = 1 << 17

How = Literal["always", "caught", "elsewhere"]


class Imports:
    """The imports between the modules of a wheel.

    Args:
        files: paths of modules and extensions below a directory that Python imports from: `pack/__init__.py`.
    """

    def __init__(self, files: Collection[str]) -> None:
        self._modules = {module_of(file) for file in files}
        packages = {module_of(file) for file in files if _is_package(file)}
        self._roots = [
            module
            for module in self._modules
            if "." not in module or (module in packages and packages.isdisjoint(_above(module)))
        ]
        extensions = (module_of(file).rpartition(".")[2] for file in files if not file.endswith(".py"))
        self._extensions = frozenset(name.encode() for name in extensions)
        self._always: dict[str, set[str]] = {}
        self._caught: set[str] = set()
        self._elsewhere: set[str] = set()
        self._room = _MOST_IMPORTS

    def add(self, file: str, source: bytes) -> None:
        """Read a module's source."""
        module = module_of(file)
        package = module if _is_package(file) else module.rpartition(".")[0]
        kept = {"always": self._always.setdefault(module, set()), "caught": self._caught, "elsewhere": self._elsewhere}
        for statement, how in _statements(source, self._extensions):
            for name in _names(b" ".join(statement.split()), package):
                if self._room and name in self._modules and name not in kept[how]:
                    kept[how].add(name)
                    self._room -= 1

    @property
    def imported(self) -> set[str]:
        """The modules that an import of all the wheel's top-level packages and modules imports."""
        todo = [*self._roots]
        found = set[str]()
        for module in todo:
            more = self._always.get(module, set()) - found
            found |= more
            todo += more
        return found

    @property
    def caught(self) -> set[str]:
        """The modules that are imported only where a failure is caught."""
        return self._caught - self._elsewhere - set().union(*self._always.values())


def module_of(file: str) -> str:
    """Return the name of a file's module: `pack.core` of `pack/core.abi3.so`, `pack` of `pack/__init__.py`."""
    folder, slash, name = file.rpartition("/")
    name = name.partition(".")[0]
    return (folder if name == "__init__" else f"{folder}{slash}{name}").replace("/", ".")


def _is_package(file: str) -> bool:
    return file.rpartition("/")[2].partition(".")[0] == "__init__"


@dataclass(slots=True)
class _Try:
    """A `try` before its end: its indent, whether a handler catches, and the imports in its body."""

    indent: int
    part: bytes = b"try"
    catches: bool = False
    raises: bool = False
    catching: bool = False
    statements: list[bytes] = field(default_factory=list)

    def begin(self, part: bytes, rest: bytes) -> None:
        """Enter its next part."""
        self.part = part
        self.catching = part == b"except" and bool(_CATCHES.match(rest))
        self.catches |= self.catching


def _statements(source: bytes, extensions: frozenset[bytes]) -> Iterator[tuple[bytes, How]]:
    """Yield the import statements, and how each is reached: `always` is at the margin.

    Indented ones are left out unless one of them names an extension: most modules need no look at each line.
    """
    code = _CONTINUED.sub(b" ", _UNREAD.sub(b"", source))
    looked_at = False
    for match in _IMPORT.finditer(code):
        if not match[1]:
            yield match[2], "always"
        elif not looked_at:
            looked_at = not extensions.isdisjoint(_WORD.findall(match[2]))
    if looked_at:
        yield from _inside(code)


def _inside(code: bytes) -> Iterator[tuple[bytes, How]]:
    """Yield the import statements that are not at the margin."""
    tries: list[_Try] = []
    for line in _LINE.finditer(code):
        indent, statement, word = len(line[1]), line[2], line[3]
        part = word if word in {b"except", b"else", b"finally"} else b""
        while tries and (indent < tries[-1].indent or (indent == tries[-1].indent and not part)):
            yield from _ended(tries)
        if statement:
            if inside := _body(tries):
                inside.statements.append(statement)
            elif indent:
                yield statement, "elsewhere"
        elif word == b"try":
            tries.append(_Try(indent))
        elif tries and indent == tries[-1].indent:
            tries[-1].begin(part, line[4])
        raises = bool(tries and _RAISES.search(line[0]))
        for each in tries:
            each.raises |= raises and each.catching
    while tries:
        yield from _ended(tries)


def _ended(tries: list[_Try]) -> Iterator[tuple[bytes, How]]:
    """End the innermost `try`: yield its import statements, or hand them to one around it."""
    ended = tries.pop()
    if ended.catches and not ended.raises:
        yield from ((statement, "caught") for statement in ended.statements)
    elif outer := _body(tries):
        outer.statements += ended.statements
    else:
        yield from ((statement, "elsewhere") for statement in ended.statements)


def _body(tries: list[_Try]) -> _Try | None:
    """Return the innermost `try` with the current line in its body; None for a line outside."""
    return next((each for each in reversed(tries) if each.part == b"try"), None)


def _names(statement: bytes, package: str) -> Iterator[str]:
    """Yield the names of modules that a statement may import, and of their packages.

    Of `from .core import x` in `pack` these are `pack.core`, `pack`, and `pack.core.x`.
    """
    if not (match := _FROM.match(statement)):
        for part in statement.removeprefix(b"import").split(b","):
            if found := _DOTTED.search(part):
                yield from _with_packages(found[0].decode("latin-1"))
        return
    dots, name = len(match[1]), match[2].decode("latin-1")
    if dots > package.count(".") + bool(package):
        return
    if dots:
        name = ".".join(filter(None, [package.rsplit(".", dots - 1)[0], name]))
    if len(name) > _LONGEST_NAME:
        return
    yield from _with_packages(name)
    for part in match[3].split(b","):
        if found := _NAME.search(part):
            yield f"{name}.{found[0].decode('latin-1')}"


def _with_packages(name: str) -> Iterator[str]:
    if len(name) <= _LONGEST_NAME:
        yield name
        yield from _above(name)


def _above(name: str) -> Iterator[str]:
    """Yield the packages that a module is in."""
    while name := name.rpartition(".")[0]:
        yield name


_LIBRARY = re.compile(r"(?P<module>[^.]+)(?:\.(?P<tag>[^.]+))?\.so|[^/]+\.so\.[^/]+|[^/]+\.so")
# Libraries of the C library itself: every Python has them.
_OF_LIBC = re.compile(
    r"lib(?:c|m)\.so\.6|libpthread\.so\.0|lib(?:dl|util)\.so\.[12]|librt\.so\.1|ld(?:64|-[\w.-]+)?\.so\.\d"
)
# Libraries of a graphics card's driver, which the container runtime of a machine provides.
_OF_DRIVER = re.compile(r"lib(?:cuda|cudadebugger|nvcuvid|nvoptix|nvidia-[a-z-]+)\.so(?:\.\d+)*")
# e_machine of the ABI by OCI's architectures.
_MACHINES = {"386": 3, "ppc64le": 21, "s390x": 22, "arm": 40, "amd64": 62, "arm64": 183, "riscv64": 243}
# Libraries of this size are read in memory, larger ones in a temporary file.
_IN_MEMORY = 8 << 20
_LARGEST_SOURCE = 1 << 20
# Of a note, which is part of a manifest; the 351 libraries of VTK take 163 kB.
MOST_NOTE = 1 << 20
_PACKAGES = {
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libGLU.so.1": "libglu1-mesa",
    "libICE.so.6": "libice6",
    "libOpenGL.so.0": "libopengl0",
    "libSM.so.6": "libsm6",
    "libX11.so.6": "libx11-6",
    "libXcursor.so.1": "libxcursor1",
    "libXext.so.6": "libxext6",
    "libXfixes.so.3": "libxfixes3",
    "libXft.so.2": "libxft2",
    "libXi.so.6": "libxi6",
    "libXinerama.so.1": "libxinerama1",
    "libXrandr.so.2": "libxrandr2",
    "libXrender.so.1": "libxrender1",
    "libasound.so.2": "libasound2",
    "libatomic.so.1": "libatomic1",
    "libdbus-1.so.3": "libdbus-1-3",
    "libexpat.so.1": "libexpat1",
    "libfontconfig.so.1": "libfontconfig1",
    "libfreetype.so.6": "libfreetype6",
    "libgcc_s.so.1": "libgcc-s1",
    "libgdk_pixbuf-2.0.so.0": "libgdk-pixbuf-2.0-0",
    "libgfortran.so.5": "libgfortran5",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgobject-2.0.so.0": "libglib2.0-0",
    "libgomp.so.1": "libgomp1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libodbc.so.2": "libodbc2",
    "libopenblas.so.0": "libopenblas0",
    "libpq.so.5": "libpq5",
    "libsndfile.so.1": "libsndfile1",
    "libstdc++.so.6": "libstdc++6",
    "libusb-1.0.so.0": "libusb-1.0-0",
    "libxcb.so.1": "libxcb1",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libxml2.so.2": "libxml2",
    "libz.so.1": "zlib1g",
}

Use = Literal["imported", "importable", "optional", "library", "bundled", "unread", "hidden"]
_Name = Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]


class Library(NamedTuple):
    """A shared library in a wheel.

    Attributes:
        name: of its file.
        soname: its own name; empty for none, or that of its file.
        machine: the ABI's number of its machine; 0 where it cannot be read.
        use: `imported` by the model's Python whenever the wheel's packages are; `optional` where every import of it
            catches a failure; `importable` otherwise; `bundled` with others, as by auditwheel; a `library` that ctypes
            may load; `unread` for a file with the name of a library and other content; or `hidden` by another wheel's
            in the same layer.
        needed: the libraries that it needs, without those of the C library.
        place: the beginning of the SHA-256 of its path, 16 hexadecimal digits: it shows which libraries replace others.
    """

    name: _Name
    soname: _Name | Annotated[str, Field(max_length=0)]
    machine: int
    use: Use
    needed: Annotated[tuple[_Name, ...], Field(fail_fast=True)]
    place: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]

    @property
    def names(self) -> set[str]:
        """The names that others need it by."""
        return {self.name, self.soname} - {""}

    @property
    def size(self) -> int:
        """Its least number of characters in a note."""
        return 48 + len(self.name) + len(self.soname) + sum(len(name) + 2 for name in self.needed)


class WheelLibraries(NamedTuple):
    """The shared libraries of one wheel.

    Attributes:
        wheel: its file name.
        libraries: in the order of their paths.
    """

    wheel: str
    libraries: Annotated[tuple[Library, ...], Field(fail_fast=True)]

    @property
    def size(self) -> int:
        """Their least number of characters in a note."""
        return sum(each.size for each in self.libraries)


# The libraries of the wheels in a layer; None where they do not fit into a note.
Note = Annotated[tuple[WheelLibraries, ...], Field(fail_fast=True)] | None
_NOTE: TypeAdapter[Note] = TypeAdapter(Note)


def to_note(wheels: Iterable[WheelLibraries]) -> str:
    """Return the libraries of the wheels in a layer as text."""
    text = _NOTE.dump_json(tuple(wheels)).decode()
    return text if len(text) <= MOST_NOTE else "null"


def from_note(text: str) -> Note:
    """Return the libraries in a note.

    Raises:
        ValueError: it is not a note of `to_note`.
    """
    if len(text) > MOST_NOTE:
        message = f"the list of its wheels' libraries has more than {MOST_NOTE:,} characters"
        raise ValueError(message)
    try:
        return _NOTE.validate_json(text)
    except ValidationError as error:
        message = f"the list of its wheels' libraries is invalid: {error.errors()[0]['msg']}"
        raise ValueError(message) from error


class Collector:
    """Finds the shared libraries among a wheel's files, as they are read.

    Args:
        places: the destinations of the wheel's files.
        python: the model's Python, `3.11`.
        folder: for temporary files.
        room: characters that a note has for the libraries. Beyond that the collector stops.
    """

    def __init__(self, places: Iterable[Place], python: str, folder: Path, room: int = MOST_NOTE) -> None:
        self._room = room
        self._python = python
        self._folder = str(folder)
        importable = [place for place in places if place.importable]
        extensions = [
            place.record for place in importable if (match := _LIBRARY.fullmatch(_name(place))) and match["module"]
        ]
        modules = [place.record for place in importable if place.wants_bytecode] if extensions else []
        self._imports = Imports([*extensions, *modules])
        self._reads_sources = bool(extensions)
        # Each with the name that Python would import it by.
        self._found: list[tuple[Library, str]] = []

    @property
    def libraries(self) -> tuple[Library, ...]:
        """The libraries, in the order of the files."""
        imported, optional = self._imports.imported, self._imports.caught
        uses: list[tuple[Use, set[str]]] = [("imported", imported), ("optional", optional)]
        return tuple(
            library._replace(use=next((use for use, modules in uses if module in modules), library.use))
            if library.use == "importable"
            else library
            for library, module in self._found
        )

    @contextmanager
    def reading(self, place: Place) -> Iterator[Callable[[bytes], object] | None]:
        """Give a function that takes a file's content, piece by piece; None for a file without interest."""
        size = place.member.size if place.member else 0
        if match := self._library(place):
            with tempfile.TemporaryFile(dir=self._folder) if size > _IN_MEMORY else io.BytesIO() as file:
                yield _Kept(file, size).add
                self._read(place, file, match["module"] or "", match["tag"] or "abi3")
        elif self._reads_sources and place.wants_bytecode and place.member and size <= _LARGEST_SOURCE:
            pieces: list[bytes] = []
            yield pieces.append
            self._imports.add(place.record, b"".join(pieces))
        else:
            yield None

    def hide(self, place: Place) -> None:
        """Take a file that is left out, since another wheel's has its place."""
        if self._library(place):
            self._add(place, "hidden")

    def _library(self, place: Place) -> re.Match[str] | None:
        """Return the parts of a library's name; None for another file, and where there is no room for more."""
        name = _name(place)
        return _LIBRARY.fullmatch(name) if self._room >= 0 and place.member and NAME.fullmatch(name) else None

    def _read(self, place: Place, file: IO[bytes], module: str, tag: str) -> None:
        elf = read_elf(file, module)
        if elf is None:
            self._add(place, "unread")
            return
        own = tag == "abi3" or tag.startswith(f"cpython-{self._python.replace('.', '')}-")
        use: Use = "bundled" if ".libs/" in place.path else "library"
        if elf.importable and own and f"/lib/python{self._python}/site-packages/" in place.path:
            use = "importable"
        self._add(place, use, elf)

    def _add(self, place: Place, use: Use, elf: Elf | None = None) -> None:
        name = _name(place)
        library = Library(
            name=name,
            soname=elf.soname if elf and elf.soname != name else "",
            machine=elf.machine if elf else 0,
            use=use,
            needed=tuple(each for each in elf.needed if not _OF_LIBC.fullmatch(each)) if elf else (),
            place=hashlib.sha256(place.path.encode()).hexdigest()[:16],
        )
        self._found.append((library, module_of(place.record)))
        self._room -= library.size


class _Kept:
    """Writes the parts of a library that are read into a sparse file, each byte at its offset."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self._position = 0
        self._parts: list[range] = []

    def add(self, content: bytes) -> None:
        """Write the next piece of the library."""
        if not self._position:
            self._parts = parts_of(content, self._size)
        start, self._position = self._position, self._position + len(content)
        for part in self._parts:
            begin, end = max(part.start, start), min(part.stop, self._position)
            if begin < end:
                self._file.seek(begin)
                self._file.write(content[begin - start : end - start])


def _name(place: Place) -> str:
    return place.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """The libraries that a wheel lacks.

    Attributes:
        wheel: its file name.
        missing: their names, each with the library that needs it.
        loads: whether the wheel can be used without a part of it.
    """

    wheel: str
    missing: dict[str, str]
    loads: bool

    @property
    def packages(self) -> list[str]:
        """Debian's packages of the missing libraries, as far as they are in our list."""
        return sorted({_PACKAGES[name] for name in self.missing if name in _PACKAGES})


def lacking(wheels: Sequence[WheelLibraries], there: Collection[str], platform: Platform) -> list[Lack]:
    """Return the wheels that need a library which neither the base image nor a wheel has.

    A wheel's library counts wherever it is: wheels name folders of others, or load libraries ahead of time. One that a
    later wheel replaces does not count, nor do its needs.

    Args:
        wheels: all of an environment, in the order of their layers.
        there: names of the base image's libraries.
        platform: the image's; libraries for other machines do not matter.
    """
    environment = _Environment(wheels, _MACHINES.get(platform.architecture), there)
    return [lack for wheel in range(len(wheels)) if (lack := environment.lack(wheel))]


class _Environment:
    """The numbered libraries of an environment, and those that cannot be loaded."""

    def __init__(self, wheels: Sequence[WheelLibraries], machine: int | None, there: Collection[str]) -> None:
        self._names = [wheel.wheel for wheel in wheels]
        every = [(number, each) for number, wheel in enumerate(wheels) for each in wheel.libraries]
        last = {each.place: number for number, each in every if each.use != "hidden"}
        self._all: list[tuple[int, Library]] = []
        # Wheels without some of their libraries: which of the others they load is unknown.
        self._incomplete: set[int] = set()
        for number, each in every:
            if each.use == "hidden" or last[each.place] != number:
                self._incomplete.add(number)
            elif each.machine == machine or each.use == "unread":
                self._all.append((number, each))
        self._of_wheel: list[list[int]] = [[] for _ in wheels]
        self._providers: dict[str, list[int]] = {}
        for number, (wheel, each) in enumerate(self._all):
            self._of_wheel[wheel].append(number)
            for name in each.names:
                self._providers.setdefault(name, []).append(number)
        self._there = there
        self._broken = self._cannot_load()

    def lack(self, wheel: int) -> Lack | None:
        """Return the libraries that a wheel lacks; None for none."""
        own = self._of_wheel[wheel]
        imported, importable, optional, libraries = (
            {number for number in own if self._all[number][1].use in uses}
            for uses in ({"imported"}, {"imported", "importable"}, {"optional"}, {"library"})
        )
        # The libraries that Python imports or, in a wheel without any, those that ctypes may load.
        loaded = importable or (set() if optional or wheel in self._incomplete else libraries)
        every = loaded | optional
        lost = every & self._broken
        # Of PyQt5's 37 one is empty, and needs nothing. Of libraries for ctypes one may be enough.
        most = len(lost) * 10 >= len(every) * 9 if importable else len(lost) == len(every)
        fatal = imported & self._broken or (loaded & self._broken if most else set())
        missing = self._missing(wheel, fatal or self._broken.intersection(own))
        return Lack(wheel=self._names[wheel], missing=missing, loads=not fatal) if missing else None

    def _wants(self, number: int) -> list[str]:
        """Return the libraries that a library needs and the base image does not have."""
        return [name for name in self._all[number][1].needed if name not in self._there]

    def _cannot_load(self) -> set[int]:
        """Return the libraries that need a missing one, directly or not."""
        intact = {name: len(numbers) for name, numbers in self._providers.items()}
        wanted: dict[str, list[int]] = {}
        for number in range(len(self._all)):
            for name in self._wants(number):
                wanted.setdefault(name, []).append(number)
        gone = [name for name in wanted if name not in intact and not _OF_DRIVER.fullmatch(name)]
        broken: set[int] = set()
        while gone:
            for number in wanted.get(gone.pop(), []):
                if number in broken:
                    continue
                broken.add(number)
                for name in self._all[number][1].names:
                    intact[name] -= 1
                    if not intact[name]:
                        gone.append(name)
        return broken

    def _missing(self, wheel: int, broken: set[int]) -> dict[str, str]:
        """Return the names that a wheel's broken libraries lack, each with the library that needs it."""
        todo, found = sorted(broken), dict[str, str]()
        seen, names = set(todo), set[str]()
        for number in todo:
            for name in self._wants(number):
                if name in names:
                    continue
                names.add(name)
                providers = self._providers.get(name, [])
                if providers:
                    if self._broken.issuperset(providers):
                        todo += [each for each in providers if each not in seen]
                        seen.update(providers)
                elif not _OF_DRIVER.fullmatch(name):
                    owner, library = self._all[number]
                    found[name] = library.name + (f" of {self._names[owner]}" if owner != wheel else "")
        return found
