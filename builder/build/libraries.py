"""The shared libraries in wheels: which of them want a library that nobody has.

What a wheel's libraries need is read while its layer is made, and kept beside the layer, so that a known layer tells it
without the wheel. docs/decisions/0043-system-libraries.md says what is refused, and what is a warning.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from builder.build.elf import NAME, parts_of, read_elf
from builder.build.module_imports import Imports, module_of
from builder.build.wheel_files import Place
from builder.reference import Platform

_LIBRARY = re.compile(r"(?P<module>[^.]+)(?:\.(?P<tag>[^.]+))?\.so|[^/]+\.so\.[^/]+|[^/]+\.so")
# Of the C library itself: a Python that runs has them.
_OF_LIBC = re.compile(
    r"lib(?:c|m)\.so\.6|libpthread\.so\.0|lib(?:dl|util)\.so\.[12]|librt\.so\.1|ld(?:64|-[\w.-]+)?\.so\.\d"
)
# Of a graphics card's driver, which the machine's container runtime puts into the container.
_OF_DRIVER = re.compile(r"lib(?:cuda|cudadebugger|nvcuvid|nvoptix|nvidia-[a-z-]+)\.so(?:\.\d+)*")
# e_machine of the ABI by OCI's architectures.
_MACHINES = {"386": 3, "ppc64le": 21, "s390x": 22, "arm": 40, "amd64": 62, "arm64": 183, "riscv64": 243}
# Content of one library that is held in memory; what is larger stands in a file.
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
        soname: its own name; empty where it has none, or that of its file.
        machine: what it runs on, as the ABI numbers machines; 0 where that cannot be read.
        use: `imported` by the model's Python whenever the wheel's packages are; `optional` where whatever imports it
            catches that it fails; `importable` otherwise; `bundled` with others, as auditwheel does; a `library` that
            may be loaded by ctypes; `unread`, a file of which only the name is known, and which is believed to be what
            that says; or `hidden` by another wheel's in the same layer.
        needed: the libraries that it needs, but for those of the C library.
        place: the beginning of the SHA-256 of its path, 16 hexadecimal digits: which wheels' libraries replace others.
    """

    name: _Name
    soname: _Name | Annotated[str, Field(max_length=0)]
    machine: int
    use: Use
    needed: Annotated[tuple[_Name, ...], Field(fail_fast=True)]
    place: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]

    @property
    def size(self) -> int:
        """Characters of a note that it takes at least."""
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
        """Characters of a note that they take at least."""
        return sum(each.size for each in self.libraries)


# What is noted of the wheels in a layer; None where they have more libraries than a note takes.
Note = Annotated[tuple[WheelLibraries, ...], Field(fail_fast=True)] | None
_NOTE: TypeAdapter[Note] = TypeAdapter(Note)


def to_note(wheels: Iterable[WheelLibraries]) -> str:
    """Return the libraries of the wheels in a layer as text."""
    text = _NOTE.dump_json(tuple(wheels)).decode()
    return text if len(text) <= MOST_NOTE else "null"


def from_note(text: str) -> Note:
    """Return what `to_note` wrote.

    Raises:
        ValueError: it did not write this.
    """
    if len(text) > MOST_NOTE:
        message = f"the list of its wheels' libraries has more than {MOST_NOTE:,} characters"
        raise ValueError(message)
    try:
        return _NOTE.validate_json(text)
    except ValidationError as error:
        message = f"the list of its wheels' libraries cannot be read: {error.errors()[0]['msg']}"
        raise ValueError(message) from error


class Collector:
    """Finds the shared libraries among a wheel's files, as they are read.

    Args:
        places: where the wheel's files go.
        python: the model's Python, `3.11`.
        folder: for temporary files.
        room: characters that a note has for them. Where they need more, no more is kept than what shows that.
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
        """What was found, in the order in which it was read."""
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
        """Give what takes a file's content, piece by piece, while it is read; None where it does not matter."""
        match = _LIBRARY.fullmatch(_name(place))
        if match and place.member and NAME.fullmatch(_name(place)):
            if self._room < 0:
                yield None
                return
            large = place.member.size > _IN_MEMORY
            with tempfile.TemporaryFile(dir=self._folder) if large else io.BytesIO() as file:
                yield _Kept(file, place.member.size).add
                self._library(place, file, match["module"] or "", match["tag"] or "abi3")
        elif self._reads_sources and place.wants_bytecode and place.member and place.member.size <= _LARGEST_SOURCE:
            pieces: list[bytes] = []
            yield pieces.append
            self._imports.add(place.record, b"".join(pieces))
        else:
            yield None

    def hide(self, place: Place) -> None:
        """Take a file that is not in the layer, as that of another wheel is in its place."""
        if self._room >= 0 and place.member and _LIBRARY.fullmatch(_name(place)) and NAME.fullmatch(_name(place)):
            self._without_content(place, "hidden")

    def _library(self, place: Place, file: IO[bytes], module: str, tag: str) -> None:
        elf, name = read_elf(file, module), _name(place)
        if elf is None:
            self._without_content(place, "unread")
            return
        own = tag == "abi3" or tag.startswith(f"cpython-{self._python.replace('.', '')}-")
        use: Use = "bundled" if ".libs/" in place.path else "library"
        if elf.importable and own and f"/lib/python{self._python}/site-packages/" in place.path:
            use = "importable"
        needed = tuple(each for each in elf.needed if not _OF_LIBC.fullmatch(each))
        soname = elf.soname if elf.soname != name else ""
        found = Library(name=name, soname=soname, machine=elf.machine, use=use, needed=needed, place=_place(place))
        self._add(found, place)

    def _without_content(self, place: Place, use: Use) -> None:
        found = Library(name=_name(place), soname="", machine=0, use=use, needed=(), place=_place(place))
        self._add(found, place)

    def _add(self, library: Library, place: Place) -> None:
        self._found.append((library, module_of(place.record)))
        self._room -= library.size


class _Kept:
    """Writes what matters of a library into a file, each byte at its place; of other files it writes nothing."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size
        self._position = 0
        self._parts: list[range] = []

    def add(self, content: bytes) -> None:
        """Take the next piece of the library."""
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


def _place(place: Place) -> str:
    return hashlib.sha256(place.path.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """What a wheel's libraries need and nobody has.

    Attributes:
        wheel: its file name.
        missing: the names of the libraries, each with the one that needs it.
        loads: whether the wheel can be used nevertheless, but for a part of it.
    """

    wheel: str
    missing: dict[str, str]
    loads: bool

    @property
    def packages(self) -> list[str]:
        """Debian's packages of the missing libraries, as far as they are known."""
        return sorted({_PACKAGES[name] for name in self.missing if name in _PACKAGES})


def lacking(wheels: Sequence[WheelLibraries], there: Collection[str], platform: Platform) -> list[Lack]:
    """Return the wheels that need a library which neither the base image nor a wheel has.

    A wheel's library is found wherever it is: wheels name folders of others, or load libraries ahead of time. One that
    a later wheel replaces is of no use, and its needs do not matter.

    Args:
        wheels: all of an environment, in the order of their layers.
        there: names of the base image's libraries.
        platform: the image's; libraries for other machines do not matter.
    """
    environment = _Environment(wheels, _MACHINES.get(platform.architecture), there)
    return [lack for wheel in range(len(wheels)) if (lack := environment.lack(wheel))]


class _Environment:
    """The libraries of an environment, numbered, and which of them cannot be loaded."""

    def __init__(self, wheels: Sequence[WheelLibraries], machine: int | None, there: Collection[str]) -> None:
        self._names = [wheel.wheel for wheel in wheels]
        every = [(number, each) for number, wheel in enumerate(wheels) for each in wheel.libraries]
        last = {each.place: number for number, each in every if each.use != "hidden"}
        replaced = [each.use == "hidden" or last[each.place] != number for number, each in every]
        # Which of their libraries they would load is not known any more.
        self._incomplete = {number for (number, _), is_replaced in zip(every, replaced, strict=True) if is_replaced}
        self._all = [
            (number, each)
            for (number, each), is_replaced in zip(every, replaced, strict=True)
            if not is_replaced and (each.machine == machine or each.use == "unread")
        ]
        self._of_wheel: list[list[int]] = [[] for _ in wheels]
        self._providers: dict[str, list[int]] = {}
        for number, (wheel, each) in enumerate(self._all):
            self._of_wheel[wheel].append(number)
            for name in {each.name, each.soname} - {""}:
                self._providers.setdefault(name, []).append(number)
        self._there = there
        self._broken = self._cannot_load()

    def lack(self, wheel: int) -> Lack | None:
        """Return what a wheel's libraries lack; None for nothing."""
        own = self._of_wheel[wheel]
        imported, importable, optional, libraries = (
            {number for number in own if self._all[number][1].use in uses}
            for uses in ({"imported"}, {"imported", "importable"}, {"optional"}, {"library"})
        )
        # What Python imports or, in a wheel without any such, what may be loaded by ctypes.
        loaded = importable or (set() if optional or wheel in self._incomplete else libraries)
        every = loaded | optional
        lost = every & self._broken
        # Of PyQt5's 37 one is empty, and needs nothing. Of libraries for ctypes one may be all that is wanted.
        most = len(lost) * 10 >= len(every) * 9 if importable else len(lost) == len(every)
        fatal = imported & self._broken or (loaded & self._broken if most else set())
        missing = self._missing(wheel, fatal or self._broken.intersection(own))
        return Lack(wheel=self._names[wheel], missing=missing, loads=not fatal) if missing else None

    def _wants(self, number: int) -> list[str]:
        """Return what a library needs of the wheels, or of nobody."""
        return [name for name in self._all[number][1].needed if name not in self._there]

    def _cannot_load(self) -> set[int]:
        """Return the libraries that need, directly or not, what nobody has."""
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
                library = self._all[number][1]
                for name in {library.name, library.soname} - {""}:
                    intact[name] -= 1
                    if not intact[name]:
                        gone.append(name)
        return broken

    def _missing(self, wheel: int, broken: set[int]) -> dict[str, str]:
        """Return what libraries of a wheel lack that cannot be loaded, each with the library that needs it."""
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
