"""A wheel's layer: installed by pip's rules, with bytecode, and streamed.

Memory is bounded by the chunk size, the wheel's list of files, and the process that compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from posixpath import dirname
from typing import IO

from installer.records import Hash, RecordEntry
from installer.utils import Scheme as InstallerScheme
from installer.utils import construct_record_file, fix_shebang

from builder.errors import BuilderError, InvalidSettings, TryAgain
from builder.oci import BytesBlob
from builder.oci.layer import Corrupt, Deflated, Layer, LayerWriter, Plain, zlib_identity
from builder.wheels import bytecode as program
from builder.wheels.shared_libraries import MOST_NOTE, Collector, WheelLibraries, to_note
from builder.wheels.wheel import (
    ENVIRONMENT,
    INTERPRETER,
    Fingerprint,
    InvalidWheel,
    Place,
    Scheme,
    Wheel,
    encoded,
    named,
    opened,
    places,
)
from builder.wheels.zip import DEFLATED, Archive, BadArchive, Member, refuse


def venv_layer(interpreter: str, python: str) -> tuple[Layer, BytesBlob]:
    """Return the layer of an environment without packages, and its content.

    It has those files of `python -m venv --without-pip` that Python reads
    (https://docs.python.org/3/library/site.html: pyvenv.cfg).

    Args:
        interpreter: the base's interpreter, an absolute path.
        python: its version, `3.11`.
    """
    config = f"home = {dirname(interpreter)}\ninclude-system-site-packages = false\nversion = {python}\n".encode()
    writer = LayerWriter(compresses=False)
    chunks = [
        *writer.symlink(f"{ENVIRONMENT}/bin/python", interpreter),
        *writer.symlink(f"{ENVIRONMENT}/bin/python3", "python"),
        *writer.symlink(f"{ENVIRONMENT}/bin/python{python}", "python"),
        *writer.directory(f"{ENVIRONMENT}/lib/python{python}/site-packages"),
        *writer.file(f"{ENVIRONMENT}/pyvenv.cfg", Plain(chunks=[config], size=len(config))),
        *writer.finish(),
    ]
    return writer.layer, BytesBlob(b"".join(chunks))


# Sources that are larger get no bytecode: the largest of real use have 3 MB, and compiling takes 100 times as much.
LARGEST_SOURCE = 8 << 20
# Processor time of one version's wheels. 200 MB of sources, more than most environments have, take 22 s.
_MOST_SECONDS = 600.0
# No environment, so no variable of Python's but the seed, which -I would ignore; no site-packages, no bytecode written.
_FLAGS = ("-S", "-s", "-B", "-Wignore")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
# Keeps a program's folder out of the import path; Python 3.9 and 3.10 need the second one for it.
_SAFE_PATH = "-P"
_LOADED = "import sys; del sys.path[0], sys.argv[0]; exec(compile(open(sys.argv[0]).read(), sys.argv[0], 'exec'))"
_SAFE_PATH_SINCE = (3, 11)
# Tells what an interpreter is, and what its zlib makes of the text on its stdin.
_TELL = """
import sys
del sys.path[0]
import json
from importlib.util import MAGIC_NUMBER, module_from_spec, spec_from_file_location
spec = spec_from_file_location("program", sys.argv[1])
program = module_from_spec(spec)
spec.loader.exec_module(program)
tag, version = sys.implementation.cache_tag, sys.version_info
stream = MAGIC_NUMBER + program.deflated(sys.stdin.buffer.read())
print(json.dumps({"name": sys.implementation.name, "tag": tag, "version": list(version), "stream": stream.hex()}))
"""
_TELL_SECONDS = 60


class Budget:
    """Processor time that all compiling for a version shares.

    Args:
        seconds: the whole of it.
    """

    def __init__(self, seconds: float = _MOST_SECONDS) -> None:
        self.seconds = seconds
        self._spent = 0.0
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        """Seconds that are left; negative where more was spent."""
        with self._lock:
            return self.seconds - self._spent

    def spend(self, seconds: float) -> None:
        """Take some of it."""
        with self._lock:
            self._spent += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """Compiles wheels' Python files for a model's Python, each wheel in a process that is bounded in time and memory.

    A source that does not compile has no bytecode, as with pip. A source that takes too much time or crashes the
    process refuses its wheel: without this, the layer would depend on the machine's speed.

    Attributes:
        identity: a word for all that decides the bytecode: letters, digits, '.', '_' and '-'.
        cache_tag: the tag in a compiled file's name: `cpython-311`.
        command: the interpreter, and the options that come before the program's name.
        seconds: processor time that one source may take, and as much again for each MiB of it; a wheel may take three
            times that, and as much again for each MiB of its sources.
        budget: processor time that all wheels share.
    """

    identity: str
    cache_tag: str
    command: tuple[str, ...] = (sys.executable, *_FLAGS, _SAFE_PATH)
    seconds: int = 10
    budget: Budget = field(default_factory=Budget, compare=False, repr=False)

    @classmethod
    def find(cls, python: str, folder: Path | None = None) -> Compiler | None:
        """Return a compiler for a model's Python: this interpreter, or one that only compiles; None without either.

        Bytecode is the same for all releases of a minor version of Python, so the release does not matter.

        Args:
            python: the model's Python: `3.11`.
            folder: has interpreters that only compile, such as `3.9/bin/python3.9`; None for none.

        Raises:
            InvalidSettings: the interpreter in the folder does not work, or is of another version.
        """
        major, _, minor = python.partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            return None
        if (int(major), int(minor)) == sys.version_info[:2]:
            return cls(identity=_identity(), cache_tag=str(sys.implementation.cache_tag))
        program = folder / python / "bin" / f"python{python}" if folder else None
        return cls._of(program, python) if program and program.exists() else None

    @classmethod
    def _of(cls, interpreter: Path, python: str) -> Compiler:
        argv = [str(interpreter), *_FLAGS, "-c", _TELL, program.__file__]
        try:
            done = subprocess.run(
                argv, input=_text(), capture_output=True, check=True, env=_ENVIRONMENT, timeout=_TELL_SECONDS
            )
            told = json.loads(done.stdout)
            version, stream = told["version"], bytes.fromhex(told["stream"])
            identity = _named(told["name"], version, stream)
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            raise _not_working(interpreter, python) from error
        if not identity.startswith(f"cpython-{python}."):
            raise _not_working(interpreter, python)
        options = (_SAFE_PATH,) if tuple(version[:2]) >= _SAFE_PATH_SINCE else ("-c", _LOADED)
        return cls(identity=identity, cache_tag=told["tag"], command=(str(interpreter), *_FLAGS, *options))

    def compiled_path(self, path: str) -> str:
        """Return the path of a source's bytecode: `a/__pycache__/b.cpython-311.pyc` for `a/b.py`."""
        folder, _, name = path.rpartition("/")
        return f"{folder}/__pycache__/{name.removesuffix('.py')}.{self.cache_tag}.pyc"

    @contextlib.contextmanager
    def compile(self, wheel: str, file: int, sources: Sequence[Place]) -> Iterator[Compilation]:
        """Compile sources in the background for as long as the context lasts.

        Args:
            wheel: its file's name.
            file: descriptor of its file.
            sources: what to compile, in the order that decides the result.
        """
        members = [(source.member, f"/{source.path}") for source in sources if source.member]
        jobs = [(member.offset, member.compressed, member.method, member.size, path) for member, path in members]
        allowed = self.seconds * (3 + sum(member.size for member, _ in members) / (1 << 20))
        left = self.budget.left
        seconds = max(1, math.ceil(min(allowed, left)))
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output:
            given.write(json.dumps(jobs).encode())
            given.seek(0)
            process = subprocess.Popen(
                [*self.command, program.__file__, *map(str, (file, os.getpid(), self.seconds, seconds))],
                stdin=given,
                stdout=output,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                pass_fds=(file,),
                start_new_session=True,
            )
            try:
                yield Compilation(
                    process=process,
                    output=output,
                    wheel=wheel,
                    paths=[path for _, path in members],
                    allowed=allowed if allowed <= left else None,
                    budget=self.budget,
                )
            finally:
                process.kill()
                process.wait()


def _not_working(interpreter: Path, python: str) -> InvalidSettings:
    message = f"WHEEL_COMPILERS has {str(interpreter)!r}, which does not work as an interpreter of {python}."
    return InvalidSettings(message, remedy="Replace or remove it.")


def _identity() -> str:
    """Return the identity of this interpreter."""
    stream = importlib.util.MAGIC_NUMBER + program.deflated(_text())
    return _named(sys.implementation.name, sys.version_info, stream)


def _named(name: str, version: Sequence[int | str], stream: bytes) -> str:
    """Return an interpreter's version, and a digest of its magic number and of its zlib's output for a given text.

    Builds of zlib differ in their output.

    Args:
        name: the implementation's.
        version: as in `sys.version_info`.
        stream: the magic number, then the output.
    """
    major, minor, micro, level, serial = version
    text = f"{major}.{minor}.{micro}" + (f"-{level}{serial}" if level != "final" else "")
    return f"{name}-{text}-{hashlib.sha256(stream).hexdigest()[:12]}"


def _text() -> bytes:
    lines = (hashlib.sha256(b"%d" % number).hexdigest()[: 7 + number % 50] for number in range(2000))
    return " ".join(lines).encode() * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """The bytecode of a wheel's sources. Iterate over it once, in their order; the first is there when all are.

    Attributes:
        process: compiles them.
        output: what it writes.
        wheel: the wheel's file name.
        paths: of the sources, in the image.
        allowed: processor time that the wheel may take; None where the budget has less.
        budget: processor time that all wheels share.
    """

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    wheel: str
    paths: Sequence[str]
    allowed: float | None
    budget: Budget

    def __iter__(self) -> Iterator[Deflated | None]:
        """Wait for the bytecode, and yield it; None for a source that has none.

        Raises:
            InvalidWheel: a source took too much time, or crashed the process.
            TryAgain: the process was ended from outside, or had no room for its output.
        """
        # Not `wait`, which does not say how much time the process took. There is no child where `kill_descendants` was
        # first.
        with contextlib.suppress(ChildProcessError):
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.budget.spend(usage.ru_utime + usage.ru_stime)
        self.output.seek(0)
        for path in self.paths:
            head = self.output.read(program.FRAME.size)
            size, crc, length = program.FRAME.unpack(head) if len(head) == program.FRAME.size else (0, 0, 1)
            stream = self.output.read(length)
            if len(stream) != length:
                raise self._failure(path)
            yield Deflated(chunks=[stream], size=size, crc=crc) if size else None
        if self.budget.left < 0:
            raise self._slow(self.paths[-1])

    def _failure(self, path: str) -> BuilderError:
        """Return what ended the process at a source."""
        status = self.process.returncode
        if status == -signal.SIGXCPU:
            return self._slow(path)
        if status == -signal.SIGPROF:
            return self._invalid(f"Its source {path} takes too much time to compile.")
        remedy = "Give it more memory, or publish without bytecode."
        if status == program.UNAVAILABLE:
            message = f"The bytecode of {self.wheel} cannot be written to the temporary folder."
            remedy = "Free space there, or name a larger one in TMPDIR."
        elif status == -signal.SIGALRM:
            message = f"Compiling {path} of {self.wheel} has not ended after {program.PATIENCE} s."
        elif status in {None, -signal.SIGKILL, -signal.SIGTERM}:
            # SIGKILL is the system's answer to too little memory, and says nothing of the source.
            message = f"Compiling {self.wheel} was ended from outside, perhaps for want of memory."
        else:
            return self._invalid(
                f"Its source {path} ends the compiler (status {status}, with {program.MEMORY >> 20} MiB of memory)."
            )
        return TryAgain(message, remedy=remedy)

    def _slow(self, path: str) -> InvalidWheel:
        why = f"The sources of the version's wheels take more than {self.budget.seconds:.0f} s of processor time"
        if self.allowed is not None and self.budget.left >= 0:
            why = f"Its sources take more than {self.allowed:.0f} s of processor time to compile"
        return self._invalid(f"{why}; the last one was {path}.")

    def _invalid(self, why: str) -> InvalidWheel:
        message = f"The wheel {self.wheel} cannot be compiled: {why}"
        return InvalidWheel(message, remedy="Pin another version of it, or publish without bytecode.")


# Part of the key of every layer. A change of a layer's content, of its bytes or of its note is a new layout.
LAYOUT = 3


def layer_key(wheel_hash: str, *, python: str, bytecode: Compiler | None = None) -> str:
    """Return the name of a wheel's layer, made of all that decides its bytes.

    It is a word of letters, digits, '.', '_' and '-', at most 128 of them, and so a tag.

    Args:
        wheel_hash: SHA-256 of the wheel, 64 hexadecimal digits.
        python: the model's Python: `3.11`.
        bytecode: the compiler of the bytecode in it; None for a layer without.
    """
    return f"{wheel_hash}-l{LAYOUT}-z{zlib_identity()}-{bytecode.identity if bytecode else f'py{python}'}"


_INSTALLER = b"model-image-builder\n"
_PYTHON = b"#!python"
_LONGEST_LINE = 1 << 12


class WheelLayer:
    """The layer of one wheel or several. Iterate over it, once or more, for its bytes; `layer` is known after one pass.

    Args:
        wheels: in their order in the layer; of two files in one place, the first is kept.
        python: the model's Python: `3.11`.
        bytecode: the compiler; None for a layer without bytecode.

    Raises:
        InvalidWheel: a file has no destination, or that of another.
    """

    def __init__(self, *wheels: Wheel, python: str, bytecode: Compiler | None = None) -> None:
        self._contents = [_Content(wheel, python, bytecode) for wheel in wheels]
        self._layer: Layer | None = None

    @property
    def layer(self) -> Layer:
        """Digests and sizes.

        Raises:
            RuntimeError: the bytes have not been read to their end.
        """
        if self._layer is None:
            message = "The layer has not been read to its end."
            raise RuntimeError(message)
        return self._layer

    @property
    def without_bytecode(self) -> tuple[str, ...]:
        """The sources that did not compile, known after one pass."""
        return tuple(path for content in self._contents for path in content.without_bytecode)

    @property
    def libraries(self) -> tuple[WheelLibraries, ...]:
        """Each wheel's shared libraries, known after one pass; where a note cannot hold them, not all of them."""
        return tuple(content.libraries for content in self._contents)

    @property
    def misrecorded(self) -> dict[str, tuple[str, ...]]:
        """The files that differ from their wheel's RECORD, by the wheel's file name; known after one pass.

        pip and uv install such wheels, such as the official ones of torch 1.7 to 1.12, which have a METADATA that was
        changed after it was listed. The wheel's own hash vouches for the files; the layer's RECORD has their hashes.
        """
        return {content.wheel.filename: content.misrecorded for content in self._contents if content.misrecorded}

    def __iter__(self) -> Iterator[bytes]:
        """Yield the layer's bytes in chunks of about 256 KiB.

        The bytes are a layer only when the iteration ends: an upload must not be finished before.

        Raises:
            InvalidWheel: a file differs from its declaration, or ends the compiler.
            TryAgain: the compiler was ended from outside.
        """
        writer, taken, room = LayerWriter(), set[str](), MOST_NOTE
        for content in self._contents:
            yield from content.write(writer, taken, room)
            room -= content.libraries.size
        yield from writer.finish()
        self._layer = replace(writer.layer, note=to_note(self.libraries))


class _Content:
    """The content of one wheel's part of a layer.

    It has the files in the order of their paths, then INSTALLER, the bytecode, and RECORD, which lists them all.

    Args:
        wheel: the wheel.
        python: the model's Python.
        compiler: the compiler; None for a layer without bytecode.
    """

    def __init__(self, wheel: Wheel, python: str, compiler: Compiler | None) -> None:
        self.wheel = wheel
        self.libraries = WheelLibraries(wheel.filename, ())
        self.without_bytecode: tuple[str, ...] = ()
        self.misrecorded: tuple[str, ...] = ()
        self._python = python
        self._compiler = compiler
        self._scheme = Scheme(python, wheel.metadata)
        with named(wheel.filename):
            self._places = places(self._scheme, wheel.members, wheel.metadata)
        self._scripts = {script.name: script for script in wheel.metadata.scripts}
        self._sources: tuple[Place, ...] = ()
        self._compiled: tuple[str, ...] = ()
        if compiler:
            self._sources = tuple(
                place
                for place in self._places
                if place.wants_bytecode and place.member and place.member.size <= LARGEST_SOURCE
            )
            self._compiled = tuple(compiler.compiled_path(source.path) for source in self._sources)

    def write(self, writer: LayerWriter, taken: set[str], room: int) -> Iterator[bytes]:
        """Write the wheel's files into a layer; errors as in `WheelLayer`.

        Args:
            writer: writes the layer.
            taken: the paths in the layer, directories with a slash at their end; the wheel's are added. A file of the
                wheel is left out where a layer above would hide it.
            room: characters that the layer's note has for the wheel's libraries.
        """
        with named(self.wheel.filename), opened(self.wheel.path) as file, contextlib.ExitStack() as stack:
            archive = Archive(file)
            if archive.members != self.wheel.members:
                refuse("it has changed since it was opened")
            compilation = None
            if self._compiler and self._sources:
                # Compiling goes on beside what follows, and is waited for at the end.
                compilation = stack.enter_context(self._compiler.compile(self.wheel.filename, file, self._sources))
            libraries = Collector(self._places, self._python, self.wheel.path.parent, room)
            installation = _Installation(writer, archive, self.wheel, self._scheme, libraries)
            # The wheel's own bytecode of this Python, in whose place ours goes.
            replaced = frozenset(self._compiled)
            for place in self._places:
                if _hidden(place.path, taken):
                    libraries.hide(place)
                    continue  # with pip the last one stays, in an order that nobody promises
                if place.member is None:
                    script = self._scripts[place.path.rpartition("/")[2]]
                    yield from installation.own(place, script.generate(INTERPRETER, "posix")[1])
                elif place.path not in replaced:
                    yield from installation.file(place, place.member)
            info = self.wheel.metadata.dist_info
            described = not _hidden(f"{self._scheme.root}/{info}/RECORD", taken)
            if described:
                yield from installation.own(self._scheme.place("purelib", f"{info}/INSTALLER"), _INSTALLER)
            if compilation:
                yield from self._bytecode(installation, compilation, taken)
            if described:
                yield from installation.finish()
            written = {*(place.path for place in self._places), *self._compiled}
            written = {path for path in written if not _hidden(path, taken)}
            taken.update(written, *map(_above, written))
            self.libraries = WheelLibraries(self.wheel.filename, libraries.libraries)
            self.misrecorded = tuple(installation.misrecorded)

    def _bytecode(self, installation: _Installation, compilation: Compilation, taken: set[str]) -> Iterator[bytes]:
        missing = []
        for source, path, content in zip(self._sources, self._compiled, compilation, strict=True):
            if _hidden(path, taken):
                continue
            if content is None:
                missing.append(f"/{source.path}")
            else:
                yield from installation.bytecode(path, content)
        self.without_bytecode = tuple(missing)


class _Installation:
    """One pass: writes files into a layer, and collects their entries for RECORD."""

    def __init__(
        self, writer: LayerWriter, archive: Archive, wheel: Wheel, scheme: Scheme, libraries: Collector
    ) -> None:
        self.writer = writer
        self._libraries = libraries
        self._archive = archive
        self._metadata = wheel.metadata
        self._scheme = scheme
        self._entries: list[RecordEntry] = []
        self.misrecorded: list[str] = []

    def file(self, place: Place, member: Member) -> Iterator[bytes]:
        """Write one of the wheel's files."""
        fingerprint = Fingerprint(self._metadata.record.get(member.name))
        if place.script and (line := _first_line(self._archive, member)) is not None:
            yield from self._script(place, member, line, fingerprint)
            return
        content = (
            Deflated(chunks=self._archive.raw(member), size=member.size, crc=member.crc)
            if member.method == DEFLATED
            else Plain(chunks=self._archive.content(member), size=member.size)
        )
        try:
            with self._libraries.reading(place) as library:

                def observe(piece: bytes) -> None:
                    fingerprint.update(piece)
                    if library:
                        library(piece)

                yield from self.writer.file(place.path, content, executable=place.executable, observe=observe)
        except Corrupt as error:
            message = f"{member.name!r} cannot be read: {error}"
            raise BadArchive(message) from error
        self._compare(member, fingerprint)
        self._entries.append(RecordEntry(place.record, fingerprint.found(), member.size))

    def own(self, place: Place, content: bytes) -> Iterator[bytes]:
        """Write a small file that is not in the wheel."""
        yield from self.writer.file(place.path, Plain(chunks=[content], size=len(content)), executable=place.executable)
        digest = hashlib.sha256(content).digest()
        self._entries.append(RecordEntry(place.record, Hash("sha256", encoded(digest)), len(content)))

    def bytecode(self, path: str, content: Deflated) -> Iterator[bytes]:
        """Write bytecode; RECORD lists it without a hash, as pip's does."""
        yield from self.writer.file(path, content)
        self._entries.append(RecordEntry(path.removeprefix(f"{self._scheme.root}/"), None, None))

    def finish(self) -> Iterator[bytes]:
        """Write RECORD."""
        place = self._scheme.place("purelib", f"{self._metadata.dist_info}/RECORD")
        entries = [*self._entries, RecordEntry(place.record, None, None)]
        with construct_record_file((InstallerScheme("purelib"), entry) for entry in entries) as stream:
            content = stream.read()
        yield from self.writer.file(place.path, Plain(chunks=[content], size=len(content)))

    def _script(self, place: Place, member: Member, line: bytes, fingerprint: Fingerprint) -> Iterator[bytes]:
        """Write a script, with the environment's interpreter in the place of `#!python`."""
        with fix_shebang(io.BytesIO(line), INTERPRETER) as fixed:
            first = fixed.read()
        written = hashlib.sha256()

        def content() -> Iterator[bytes]:
            yield first
            left = len(line)
            for chunk in self._archive.content(member):
                fingerprint.update(chunk)
                yield chunk[left:]
                left = max(0, left - len(chunk))

        size = len(first) + member.size - len(line)
        yield from self.writer.file(
            place.path, Plain(chunks=content(), size=size), executable=place.executable, observe=written.update
        )
        self._compare(member, fingerprint)
        self._entries.append(RecordEntry(place.record, Hash("sha256", encoded(written.digest())), size))

    def _compare(self, member: Member, fingerprint: Fingerprint) -> None:
        if fingerprint.differs(member.size):
            self.misrecorded.append(member.name)


def _hidden(path: str, taken: set[str]) -> bool:
    """Return whether a path is taken, is a directory there, or lies below a file."""
    return bool(taken) and (
        path in taken or f"{path}/" in taken or any(folder[:-1] in taken for folder in _above(path))
    )


def _above(path: str) -> Iterator[str]:
    """Yield the directories above a path, each with a slash at its end."""
    end = path.find("/")
    while end >= 0:
        yield path[: end + 1]
        end = path.find("/", end + 1)


def _first_line(archive: Archive, member: Member) -> bytes | None:
    """Return a script's first line with its end, if it is `#!python`."""
    head = b""
    for chunk in archive.content(member):
        head += chunk
        if not head.startswith(_PYTHON[: len(head)]):
            return None
        line, end, _ = head.partition(b"\n")
        if end and len(line) >= len(_PYTHON):
            return line + end
        if len(head) > _LONGEST_LINE:
            refuse(f"the first line of {member.name!r} has no end")
    return head if head.startswith(_PYTHON) else None
