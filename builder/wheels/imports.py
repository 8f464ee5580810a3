"""Modules that a model's files import, and whether its environment has them."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import pickletools
import re
import stat
import struct
import sys
import tempfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from packaging.utils import canonicalize_name

from builder.errors import BuilderError, InvalidVersion
from builder.log import get_logger
from builder.masking import one_line
from builder.model_folder import BROUGHT, IMPLIED, MLMODEL, code_of, loaded_files, loader_of, read_description
from builder.package_index.client import IndexClient
from builder.package_index.wheel_file import LockedWheel
from builder.process import side_by_side
from builder.safe_open import open_beneath
from builder.wheels.lock import Lock
from builder.wheels.zip import STORED, BadArchive, read_at, read_directory, refuse

# Of all pickles of a version together: a million takes two seconds.
_MOST_OPCODES = 2_000_000
# A longer argument is data, and is skipped.
_MOST_ARGUMENT = 4 << 20
# Of one Python file, and of all.
_MOST_SOURCE, _MOST_SOURCES = 4 << 20, 32 << 20
# What is unpacked of compressed files, and searched where opcodes cannot be read; of all files together.
_MOST_UNPACKED, _MOST_SEARCHED = 32 << 20, 32 << 20
_MOST_MEMORY = 128 << 20
_LEAST = 1 << 14
_LONGEST_NAME, _SHOWN = 200, 80
_MOST_NAMES = 10_000

_STRINGS = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_GLOBALS = frozenset({"GLOBAL", "INST", "STACK_GLOBAL"})
_TRANSPARENT = frozenset({"PROTO", "FRAME", "STOP"})
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")
_SUBIMPORT = frozenset({("cloudpickle.cloudpickle", "subimport"), ("cloudpickle", "subimport")})
# An import with the rest of its line or the brackets after it; a name in quotes; a method.
_SOURCE = re.compile(
    r"\b(?:import|from)[ \t]+(?P<line>[^\n#;(]{1,2000}(?:\([^)]{0,2000}\))?)"
    r"|[\"'](?P<text>[A-Za-z_][\w.]{0,200})[\"']"
    r"|\.(?P<method>[a-z_]{3,40})\b"
)
_WORD = re.compile(r"[A-Za-z_][\w.]*")
# A name where a string or a GLOBAL holds it: behind an opcode and a length, or behind `c`. Shorter ones would be found
# in any large file.
_SHORTEST_IN_BYTES, _LONGEST_IN_BYTES = 5, 64
_IN_BYTES = re.compile(
    rb"(?s)(?:\x8c.|X.{4}|\x8d.{8}|U.|T.{4}|[cVi\"'])("
    + b"|".join(name.encode() for name in (*BROUGHT, *IMPLIED) if len(name) >= _SHORTEST_IN_BYTES)
    + rb")(?![A-Za-z0-9_])"
)
_HEADER = struct.Struct("<26xHH")


def _inflated(data: bytes, most: int) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, most)


def _deflated(data: bytes, most: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)


def _stored(data: bytes, _most: int) -> bytes:
    return data


# What MLflow and joblib compress with, by the first bytes; each is given the most that it may return.
_COMPRESSED: Mapping[bytes, Callable[[bytes, int], bytes]] = {
    b"\x1f\x8b": _inflated,
    **dict.fromkeys((b"x\x01", b"x\x5e", b"x\x9c", b"x\xda"), _inflated),
    b"BZh": lambda data, most: bz2.BZ2Decompressor().decompress(data, most),
    b"\xfd7zXZ": lambda data, most: lzma.LZMADecompressor(memlimit=_MOST_MEMORY).decompress(data, most),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModules:
    """The modules that a model's files name.

    Attributes:
        loaded: modules that are imported when MLflow loads the model, each with the file that names it.
        uses: distributions that `mlflow` requires and `mlflow-skinny` does not, of which a file names a module; each
            with the file and the name, for people.
        code: the folder that MLflow's loader is imported from; empty for none, None where it is not known.
    """

    loaded: dict[str, str] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)
    code: str | None = ""


def read_named_modules(context: Path, folder: str, files: Collection[str]) -> NamedModules:
    """Return the modules that files of a version name; empty and missing files name none.

    Args:
        context: folder of the version's artifacts.
        folder: the model's folder in it.
        files: paths of what is read: Python files, and what may be a pickle.

    Raises:
        InvalidVersion: MLmodel cannot be read.
    """
    model = read_description(context, folder, MLMODEL)
    reader = _Reader(loaded_files(model, folder), code_of(model, folder))
    if loader := loader_of(model):
        reader.loads(loader, f"{folder}/{MLMODEL}")
    for path in sorted(files):
        try:
            with open_beneath(context, path) as descriptor:
                if descriptor is not None and stat.S_ISREG(os.fstat(descriptor).st_mode):
                    reader.read(path, descriptor)
        except InvalidVersion:
            continue
    return reader.found


class _Reader:
    """Reads files of one version.

    Args:
        loaded: paths of the pickles that MLflow loads.
        code: as `NamedModules` has it.
    """

    def __init__(self, loaded: Collection[str], code: str | None) -> None:
        self.found = NamedModules(code=code)
        self._loaded = loaded
        self._opcodes, self._unpacked = _MOST_OPCODES, _MOST_UNPACKED
        self._sources = self._searched = 0

    def loads(self, module: str, path: str) -> None:
        """Record a module that is imported when the model is loaded."""
        self._mention(module, path)
        if len(self.found.loaded) < _MOST_NAMES and len(module) <= _LONGEST_NAME and _MODULE.fullmatch(module):
            self.found.loaded.setdefault(module, path)

    def read(self, path: str, file: int) -> None:
        """Read a file."""
        size = os.fstat(file).st_size
        if path.endswith(".py"):
            self._sources += size
            if size <= _MOST_SOURCE and self._sources <= _MOST_SOURCES:
                self._source(path, os.pread(file, _MOST_SOURCE, 0).decode("utf-8", "replace"))
            return
        head = os.pread(file, 8, 0)
        if head.startswith(b"PK\x03\x04"):
            self._archive(path, file)
            return
        for magic, unpacked in _COMPRESSED.items():
            if head.startswith(magic):
                with suppress(zlib.error, lzma.LZMAError, OSError, EOFError):
                    self._packed(path, os.pread(file, self._unpacked, 0), unpacked)
                return
        with open(file, "rb", closefd=False) as content:  # a descriptor
            self._pickles(path, _Content(content))

    def _source(self, path: str, text: str) -> None:
        for match in _SOURCE.finditer(re.sub(r"\\\r?\n", " ", text)):
            words = _WORD.findall(match["line"]) if match["line"] else [match["text"] or match["method"]]
            for word in words:
                self._mention(word, path)

    def _mention(self, name: str, path: str) -> None:
        """Record a name that may be a module's: one too many costs bytes, one too few breaks the model."""
        if len(name) > _LONGEST_NAME:
            return
        top, _, rest = name.partition(".")
        # `mlflow.sklearn` imports what it is called after.
        module = rest.partition(".")[0] if top == "mlflow" else top
        distribution = BROUGHT.get(module) or IMPLIED.get(module)
        if distribution:
            self.found.uses.setdefault(distribution, f"{path} names {one_line(name, _SHOWN)}")

    def _archive(self, path: str, file: int) -> None:
        """Read what PyTorch writes, a zip archive with a pickle in it, and skops, one with a schema."""
        try:
            entries, _ = read_directory(file)
            for entry in entries:
                if entry.orig_filename.rpartition("/")[2] in {"data.pkl", "schema.json"}:
                    name, extra = _HEADER.unpack(read_at(file, entry.header_offset, _HEADER.size))
                    begin = entry.header_offset + _HEADER.size + name + extra
                    content = read_at(file, begin, min(entry.compress_size, self._unpacked))
                    self._packed(path, content, _stored if entry.compress_type == STORED else _deflated)
        except (BadArchive, zlib.error, OSError):
            return

    def _packed(self, path: str, content: bytes, unpacked: Callable[[bytes, int], bytes]) -> None:
        if self._unpacked > 0:
            plain = unpacked(content, self._unpacked)
            # A beginning costs something, too, however little comes of it.
            self._unpacked -= max(len(plain), len(content), _LEAST)
            self._pickles(path, _Content(io.BytesIO(plain)))

    def _pickles(self, path: str, content: _Content) -> None:
        """Read pickles that stand one after the other; what is behind a part that cannot be read is searched."""
        # A text is taken for a pickle of the first two protocols too easily; the first pickle alone is loaded.
        certain = path in self._loaded and content.read(1) == b"\x80"
        begin = 0
        content.seek(begin)
        while self._pickle(path, content, certain=certain) and content.tell() > begin:
            begin, certain = content.tell(), False
        content.seek(begin)
        self._search(path, content)

    def _pickle(self, path: str, content: _Content, *, certain: bool) -> bool:
        """Read one pickle; return whether it was read to its end."""
        opcodes = _Opcodes()
        try:
            for opcode, argument, _ in pickletools.genops(cast("IO[bytes]", content)):
                self._opcodes -= 1
                # joblib writes an array's bytes between the opcodes, behind the BUILD of an object of its own.
                if self._opcodes < 0 or (opcode.name == "BUILD" and opcodes.arrays):
                    return False
                module = opcodes.take(opcode.name, argument)
                if isinstance(module, str):
                    self._mention(module, path)
                    if certain:
                        self.loads(module, path)
                elif opcode.name in _STRINGS:
                    self._mention(str(argument), path)
        except (ValueError, TypeError, AttributeError, OverflowError):
            # What `pickletools` raises; AttributeError where a skipped argument is a string's.
            return False
        return True

    def _search(self, path: str, content: _Content) -> None:
        tail = b""
        while self._searched < _MOST_SEARCHED and (chunk := content.read(_MOST_ARGUMENT)):
            self._searched += len(chunk)
            for match in _IN_BYTES.finditer(tail + chunk):
                self._mention(match[1].decode(), path)
            tail = chunk[-_LONGEST_IN_BYTES:]


class _Opcodes:
    """As much of a pickle's stack and memo as it takes to know which modules are imported.

    A module is named by GLOBAL and INST, by two strings directly before STACK_GLOBAL, and by a string that is
    given to cloudpickle's `subimport`.

    Attributes:
        arrays: whether joblib's stand-in for an array was named.
    """

    def __init__(self) -> None:
        self.arrays = False
        self._memo: dict[object, object] = {}
        # The two values on top: a text, or a pair of texts for what GLOBAL names; None for one that is not known.
        self._below: object = None
        self._top: object = None

    def take(self, name: str, argument: Any) -> object:  # of an opcode, anything
        """Follow an opcode; return the module that it imports, None for none."""
        module: object = None
        if name in _STRINGS:
            self._push(argument)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top
        elif name in _PUTS:
            self._memo[argument] = self._top
        elif name in _GETS:
            self._push(self._memo.get(argument))
        elif name in _GLOBALS:
            named = (self._below, self._top) if name == "STACK_GLOBAL" else tuple(argument.split(" ", 1))
            # Of texts alone: a pair of pairs could be nested as deep as the pickle is long.
            pair = named if all(isinstance(each, str) for each in named) else None
            if pair:
                self.arrays = self.arrays or pair[-1] == "NumpyArrayWrapper"
                module = pair[0]
            self._push(pair)
        elif name not in _TRANSPARENT:
            if name == "TUPLE1" and self._below in _SUBIMPORT:
                module = self._top
            self._push(None)
        return module

    def _push(self, value: object) -> None:
        self._below, self._top = self._top, value


class _Content:
    """A pickle's bytes for `pickletools`: an argument that is too long to be a name is skipped.

    Args:
        content: a file, or bytes.
    """

    def __init__(self, content: BinaryIO) -> None:
        self._content = content
        self._size = content.seek(0, os.SEEK_END)
        content.seek(0)
        self.tell, self.seek = content.tell, content.seek

    def read(self, size: int) -> Any:  # bytes, or _Skipped
        """Return so many bytes, fewer at the end."""
        if size <= _MOST_ARGUMENT:
            return self._content.read(size)
        left = self._size - self._content.tell()
        self._content.seek(min(size, left), os.SEEK_CUR)
        return _Skipped(min(size, left))

    def readline(self) -> bytes:
        """Return a line, or its beginning."""
        return self._content.readline(_MOST_ARGUMENT)


class _Skipped:
    """Bytes that were skipped: their length without their content."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        """Return nothing: `bytearray` asks."""
        return iter(())


_log = get_logger("wheels")
_LOOKING = 16
_SECONDS = 60.0
# The directory of most wheels, and of the largest.
_TAILS = (64 << 10, 4 << 20)
_LARGEST = 16 << 30
# Modules of this Python and of others from 3.6 on, and those of Python 2 that pickle replaces.
_STDLIB = {name.partition(".")[0] for name in (*IMPORT_MAPPING, *(name for name, _ in NAME_MAPPING))} | {
    *sys.stdlib_module_names,
    *("aifc", "annotationlib", "asynchat", "asyncore", "audioop", "binhex", "cgi", "cgitb"),
    *("chunk", "compression", "crypt", "distutils", "dummy_threading", "formatter", "imghdr", "imp"),
    *("lib2to3", "macpath", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "parser", "pipes", "smtpd"),
    *("sndhdr", "spwd", "sunau", "symbol", "telnetlib", "uu", "xdrlib"),
}
# Distributions whose name is not their module's; others are looked up in the wheels.
_CALLED = {**BROUGHT, "mlflow": "mlflow-skinny", "yaml": "pyyaml", "imblearn": "imbalanced-learn"}
# A .pth file can make anything importable, but for those that setuptools writes.
_HARMLESS = ("-nspkg.pth", "distutils-precedence.pth")
_ANYTHING = "*"
_ARCHIVES = (".zip", ".egg", ".whl")


def check_provided(
    loaded: Mapping[str, str], own: Collection[str], lock: Lock, client: IndexClient, *, code: str | None = None
) -> None:
    """Refuse a model for whose loading a module is missing.

    Args:
        loaded: the modules that are imported, each with the file that names it.
        own: paths of the version's own files.
        lock: the wheels of its environment.
        client: has the wheels.
        code: the folder of them that MLmodel's loader is imported from; empty for none, None where it is not known.

    Raises:
        InvalidVersion: a module is neither the version's own, nor Python's, nor in a wheel.
    """
    ours = _parts(own)
    found_by_mlflow = ours
    if code is not None:
        # The working directory is the parent of the model's folder.
        found_by_mlflow = _parts(path.partition("/")[0] for path in own)
        found_by_mlflow |= _parts(path.removeprefix(f"{code}/") for path in own if code and path.startswith(f"{code}/"))
    packages = lock.versions.keys()
    # What begins with an underscore is an extension's or a program's own, and in no folder of that name.
    missing = {
        top: module
        for module in loaded
        if not (top := module.partition(".")[0]).startswith("_")
        and top not in _STDLIB
        and top not in (found_by_mlflow if _is_loader(loaded[module]) else ours)
        and canonicalize_name(top) not in packages
        and _CALLED.get(top) not in packages
    }
    # Code that brings an archive can put it on its path.
    if not missing or any(path.endswith(_ARCHIVES) and "code" in path.split("/")[:-1] for path in own):
        return
    found = _together(lock, client)
    there = {top for _, tops in found for top in tops}
    missing = {top: module for top, module in missing.items() if top not in there}
    if not missing:
        return
    if unknown := [wheel.filename for wheel, tops in found if _ANYTHING in tops]:
        _log.info(
            "a module may be missing: the content of a wheel is not known", modules=sorted(missing), wheel=unknown[0]
        )
        return
    module = min(missing.values())
    place = "the folder that its `code` names" if _is_loader(loaded[module]) else "the model's files"
    message = f"{loaded[module]} names the module {module!r}, which is neither in {place} nor in a package of its "
    message += f"environment for {lock.platform}."
    remedy = "Log the module with the model (code_paths), or name its package in the requirements, and register again."
    raise InvalidVersion(message, remedy=remedy)


def _parts(paths: Iterable[str]) -> set[str]:
    return {part.partition(".")[0] for path in paths for part in path.split("/")}


def _is_loader(file: str) -> bool:
    """Return whether a module that a file names is the one that MLflow itself imports."""
    return file.rpartition("/")[2] == MLMODEL


def _together(lock: Lock, client: IndexClient) -> list[tuple[LockedWheel, set[str]]]:
    """Return the first names in each wheel. To the end: a thread that still reads would outlive its client."""

    def one(wheel: LockedWheel) -> tuple[LockedWheel, set[str]]:
        return wheel, _modules(wheel, client)

    results = side_by_side(one, lock.wheels, threads=_LOOKING, every=_SECONDS)
    return [result for result in results if result is not None]


def _modules(wheel: LockedWheel, client: IndexClient) -> set[str]:
    """Return the first names of what can be imported from a wheel; `*` is among them where it is not known."""
    for size in _TAILS:
        try:
            tail, whole = client.tail(wheel, size)
            return {top for name in _names(tail, whole) if (top := _top(name))}
        except (BadArchive, OSError) as error:
            _log.debug("a wheel's list of files cannot be read", wheel=wheel.filename, why=str(error))
        except BuilderError as error:
            _log.debug("a wheel's list of files cannot be fetched", wheel=wheel.filename, why=error.what)
            break
    return {_ANYTHING}


def _names(tail: bytes, whole: int) -> list[str]:
    """Return the names in an archive of which the end is known: all before it is a hole."""
    if not len(tail) <= whole <= _LARGEST:
        refuse("its size is invalid")
    with tempfile.TemporaryFile() as file:
        file.truncate(whole)
        os.pwrite(file.fileno(), tail, whole - len(tail))
        return [entry.orig_filename for entry in read_directory(file.fileno())[0]]


def _top(name: str) -> str:
    """Return the first name that a file of a wheel can be imported by; empty for none."""
    top, _, rest = name.partition("/")
    if top.endswith(".data"):
        kind, _, name = rest.partition("/")
        if kind not in {"purelib", "platlib"}:
            return _ANYTHING if "site-packages" in rest else ""
        top, _, rest = name.partition("/")
    if rest:
        return "" if top.endswith(".dist-info") else top
    if top.endswith(".pth"):
        return "" if top.endswith(_HARMLESS) else _ANYTHING
    return top.partition(".")[0]
