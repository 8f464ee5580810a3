"""Files in a folder that a hostile process may have written, and may still write; rules for their paths; and YAML.

Nothing here follows a link, opens anything but a file or a folder, or waits for one: a path is opened component by
component, relative to the one before it, and what was opened is what is checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from builder.errors import InvalidSettings, InvalidVersion
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Collection

    from yaml import Event


CHUNK = 1 << 20
# A folder on the way is only passed through; where the system has no O_PATH it has to be readable.
_PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: a FIFO that takes the file's place between the look and the opening would be waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Unsafe(Exception):
    """A path is missing, is a link, or is neither file nor folder where it should be; the message names it."""


def _open(here: int, parts: Sequence[str]) -> int:
    """Open a file or a folder below another folder, and return its descriptor.

    Args:
        here: descriptor of the other folder; it is closed.
        parts: the folders below it, and last the file; each a plain name. None for the folder itself.

    Raises:
        Unsafe: a part is not a plain name, a link, or of the wrong kind.
        OSError: a part is missing, or cannot be opened.
    """
    try:
        *folders, name = [_plain(part) for part in parts] or ["."]
        for folder in folders:
            try:
                child = os.open(folder, _PASSAGE | os.O_NOFOLLOW, dir_fd=here)
            except NotADirectoryError as error:
                message = f"{folder} cannot be opened as a folder: {error.strerror}"
                raise Unsafe(message) from error
            os.close(here)
            here = child
        # A device may do something when it is opened, so it is looked at first.
        _check_kind(os.stat(name, dir_fd=here, follow_symlinks=False), name)
        file = os.open(name, _FILE, dir_fd=here)
    finally:
        os.close(here)
    try:
        _check_kind(os.fstat(file), name)
    except Unsafe:
        os.close(file)
        raise
    return file


def _plain(part: str) -> str:
    if not part or part in {".", ".."} or "/" in part or "\0" in part:
        message = f"{part!r} is not a file's name"
        raise Unsafe(message)
    return part


def _check_kind(status: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(status.st_mode):
        message = f"{name} is not a regular file but a link"
        raise Unsafe(message)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        message = f"{name} is not a regular file"
        raise Unsafe(message)


# ---- a version's artifacts


@contextmanager
def open_beneath(root: str | os.PathLike[str], relative: str) -> Iterator[int | None]:
    """Open the file or folder `root / relative`, and yield its descriptor, or None where there is nothing.

    Args:
        root: a folder; links on the way to it are followed.
        relative: a path with forward slashes and no `..`; `.` for the folder itself.

    Raises:
        InvalidVersion: there is a link on the way, or something that cannot be opened.
    """
    descriptor = None
    here = os.open(root, _PASSAGE)
    try:
        descriptor = _open(here, [] if relative == "." else relative.split("/"))
    except FileNotFoundError:
        pass
    except (OSError, Unsafe) as error:
        why = error.strerror if isinstance(error, OSError) else error
        message = f"{relative!r} of the version's artifacts cannot be read: {why}."
        raise InvalidVersion(message, remedy="It must be a file in a folder; links are not followed.") from error
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def read_beneath(root: Path, relative: str, limit: int) -> bytes | None:
    """Return the content of the file `root / relative`, or None where there is none.

    Args:
        root: a folder.
        relative: a path with forward slashes and no `..`.
        limit: the most bytes to read.

    Raises:
        InvalidVersion: there is a link on the way, something else than a file, or a file that is larger.
    """
    with open_beneath(root, relative) as descriptor:
        if descriptor is None:
            return None
        _check_regular(descriptor, relative)
        content = bytearray()
        while len(content) <= limit and (chunk := os.read(descriptor, limit + 1 - len(content))):
            content += chunk
        if len(content) > limit:
            message = f"{relative!r} of the version's artifacts is larger than {limit:,} bytes."
            raise InvalidVersion(message, remedy="Log a smaller one.")
        return bytes(content)


def exists_beneath(root: Path, relative: str) -> bool:
    """Return whether `root / relative` is a file or a folder, and no link on the way to it."""
    try:
        with open_beneath(root, relative) as descriptor:
            return descriptor is not None
    except InvalidVersion:
        return False


def digest_beneath(root: Path, relative: str) -> tuple[str, int] | None:
    """Return the SHA-256 (64 hexadecimal digits) and the bytes of the file `root / relative`, or None for none.

    Raises:
        InvalidVersion: there is a link on the way, or something else than a file.
    """
    with open_beneath(root, relative) as descriptor:
        if descriptor is None:
            return None
        _check_regular(descriptor, relative)
        with open(descriptor, "rb", buffering=0, closefd=False) as content:  # a descriptor
            return hashlib.file_digest(content, "sha256").hexdigest(), os.fstat(descriptor).st_size


def _check_regular(descriptor: int, relative: str) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        message = f"{relative!r} of the version's artifacts is not a file."
        raise InvalidVersion(message, remedy="Log a file under this name.")


# ---- image layouts, and files of a context


@contextmanager
def opened(folder: Path, *parts: str) -> Iterator[tuple[int, int]]:
    """Open a regular file below a folder, and yield its descriptor and its size in bytes.

    Args:
        folder: the last component may not be a link; those before it are the caller's, and trusted.
        parts: the folders below it, and last the file; each a plain name.

    Raises:
        Unsafe: a part is missing, a link, or of the wrong kind.
    """
    where = Path(folder.name, *parts)
    try:
        file = _open(os.open(folder, _PASSAGE | os.O_NOFOLLOW), parts)
    except OSError as error:
        message = f"{where} cannot be opened as a file: {error.strerror}"
        raise Unsafe(message) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            message = f"{where} is not a regular file"
            raise Unsafe(message)
        yield file, status.st_size
    finally:
        os.close(file)


def chunks(file: int, limit: int) -> Iterator[bytes]:
    """Yield a file's bytes from its beginning, at most `limit` of them and one more where it holds more."""
    offset = 0
    while offset <= limit and (chunk := os.pread(file, min(CHUNK, limit + 1 - offset), offset)):
        offset += len(chunk)
        yield chunk


def is_hollow(file: int, size: int) -> bool:
    """Return whether a file of `size` bytes has more holes than bytes that somebody wrote: lseek(2), SEEK_DATA.

    Where a file system does not tell, a file has none.
    """
    written, at = 0, 0
    while 2 * written < size:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
            at = os.lseek(file, start, os.SEEK_HOLE)
        except OSError:  # ENXIO: nothing but holes from here on
            return True
        written += at - start
    return False


def read(folder: Path, *parts: str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes below a folder.

    Raises:
        Unsafe: as `opened`, or the file is larger.
    """
    with opened(folder, *parts) as (file, _):
        content = b"".join(chunks(file, limit))
    if len(content) > limit:
        message = f"{Path(folder.name, *parts)} is larger than {limit} bytes"
        raise Unsafe(message)
    return content


# ---- rules for paths

# A relative path that means the same in a Dockerfile, a shell and a requirements file, and needs no quoting there.
SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.@+-]*)*")
MOST_FOLDERS_DEEP = 64
# Linux's own limits, in bytes.
_LONGEST_PATH = 3000
_LONGEST_COMPONENT = 255
# Control characters, surrogates that no file name can hold, and Unicode's line and paragraph separators.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_SHOWN = 200


def checked_path(path: str) -> str:
    """Return an artifact's path in Unicode's normal form C, if a file may have it in the context.

    Args:
        path: the path as an artifact store gave it.

    Raises:
        InvalidVersion: the path is absolute, has an empty, `.` or `..` component, a backslash, a control character or
            a line break, or is longer than a file system takes.
    """
    problem = path_problem(path)
    if problem:
        message = f"The artifact {path[:_SHOWN]!r} cannot be taken into the context: {problem}."
        raise InvalidVersion(message, remedy="Log the file under another name and register the model again.")
    return unicodedata.normalize("NFC", path)


def path_problem(path: str) -> str:
    """Return what is wrong with an artifact's path; the empty string for nothing."""
    parts = path.split("/")
    problems = {
        "its path has a control character or a line break": any(
            unicodedata.category(character) in _REFUSED_CATEGORIES for character in path
        ),
        "its path has a backslash": "\\" in path,
        "its path is absolute": path.startswith("/"),
        "its path has a '..' and may leave the context": ".." in parts,
        "its path has a component that is empty or '.'": "." in parts or "" in parts,
        f"its path is more than {MOST_FOLDERS_DEEP} folders deep": len(parts) > MOST_FOLDERS_DEEP,
        "its path is longer than a file system takes": _too_long(path),
    }
    return next((problem for problem, there in problems.items() if there), "")


def _too_long(path: str) -> bool:
    encoded = unicodedata.normalize("NFC", path).encode("utf-8", "surrogatepass")
    return len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_COMPONENT for part in encoded.split(b"/"))


# ---- YAML, read within bounds into text, lists and mappings alone
#
# `yaml.load` composes recursively in C, so a hundred thousand brackets end the process, and what it constructs is
# worse: aliases and merge keys multiply, numbers and dates raise errors of their own. Here the parser's events are
# counted while they come, and nothing but text is made of a scalar, so `python: 3.10` stays `3.10`. PyYAML itself
# writes an alias where an object is in a document twice, as in the metadata of an MLmodel: aliases are read, and count
# as if what they stand for were written out. The source is https://yaml.org/spec/1.1/, as libyaml reads it.

Yaml: TypeAlias = "str | list[Yaml] | dict[str, Yaml] | None"

# An MLmodel has its signature in one scalar: about 65 bytes for each column.
MOST_YAML_BYTES = 4 << 20
MOST_NODES = 50_000
MOST_DEPTH = 50
# Of text, aliases written out.
_MOST_CHARACTERS = 16 << 20
# libyaml compares each %TAG with all before it; these end its lines.
_MOST_DIRECTIVES = 10
_DIRECTIVE = re.compile(r"(?:^|[\n\r\x85\u2028\u2029])%")
# libyaml takes quadratic time for a tag, 7 s for 100 kB. Each run of a tag's characters is looked at once, from its
# beginning to the first '!' and what follows.
_LONGEST_TAG = 4096
_TAG_CHARACTERS = r"0-9A-Za-z_<;/?:@&=+$,.~*'()\[\]%-"
_LONG_TAG = re.compile(rf"(?<![!{_TAG_CHARACTERS}])[{_TAG_CHARACTERS}]*![!{_TAG_CHARACTERS}]{{{_LONGEST_TAG}}}")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_MERGE = "<<"
# Safe loaders know these; what they would make of the text does not matter here.
_TAG = re.compile(r"tag:yaml\.org,2002:(map|omap|pairs|seq|set|str|binary|bool|float|int|null|timestamp)")


def read_yaml(content: bytes, name: str) -> Yaml:
    """Return what a YAML file holds: text, None, lists, and mappings whose keys are text.

    Of a key that is in a mapping twice the last one counts, as with PyYAML and so with MLflow.

    Args:
        content: the file's bytes: UTF-8, with or without a byte order mark.
        name: the file's, for messages.

    Raises:
        InvalidVersion: it is not YAML, not UTF-8, or several documents; it is larger than 4 MiB, has more than 50,000
            nodes or a nesting above 50, aliases written out; it has a merge key, a tag that a safe loader does not
            know, or a key that is not text.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", None)
    if loader is None:
        message = "PyYAML is installed without libyaml, and its parser in Python takes minutes for a hostile file."
        raise InvalidSettings(message, remedy="Install PyYAML from its wheel, or build it with libyaml.")
    try:
        text = _decoded(content)
        document = _Document()
        for event in yaml.parse(text, Loader=loader):
            document.take(event)
    except _Refused as error:
        why = str(error)
    except yaml.YAMLError as error:
        why = one_line(str(error), 200)
    else:
        return document.value
    message = f"{name} is not YAML that can be read: {why}"
    raise InvalidVersion(message, remedy="Log the model again.")


def scalar_places(
    content: bytes, name: str, wanted: Collection[tuple[str, ...]]
) -> dict[tuple[str, ...], tuple[int, int]]:
    """Return the places of values of mappings within mappings: first character and end in the text, by their keys.

    Args:
        content: the file's bytes, which `read_yaml` has read.
        name: the file's, for messages.
        wanted: the keys that lead to each value; a value that is an alias, or in a list, is not found.

    Raises:
        InvalidVersion: as `read_yaml`.
    """
    import yaml

    read_yaml(content, name)
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    # For each open node: None for a list, else the key that waits for its value, empty while none does.
    open_nodes: list[list[str] | None] = []
    for event in yaml.parse(content.decode("utf-8-sig"), Loader=yaml.CSafeLoader):
        top = open_nodes[-1] if open_nodes else None
        if isinstance(event, yaml.ScalarEvent) and top is not None and not top:
            top.append(event.value)
            continue
        if isinstance(event, yaml.ScalarEvent) and top and None not in open_nodes:
            keys = tuple(key for node in open_nodes for key in node or ())
            if keys in wanted and event.start_mark and event.end_mark:
                found[keys] = event.start_mark.index, event.end_mark.index
        if isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            open_nodes.append([] if isinstance(event, yaml.MappingStartEvent) else None)
            continue
        if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            open_nodes.pop()
            top = open_nodes[-1] if open_nodes else None
        if top:
            top.clear()
    return found


def read_mapping(content: bytes, name: str) -> dict[str, Yaml]:
    """Return the mapping that a YAML file holds, empty where it holds something else; errors as in `read_yaml`."""
    document = read_yaml(content, name)
    return document if isinstance(document, dict) else {}


class _Refused(Exception):
    """The file is not read further; the message says why."""


@dataclass(slots=True)
class _Cost:
    """What a node takes, its aliases written out: nodes, characters of text, and levels below it."""

    nodes: int = 1
    characters: int = 0
    levels: int = 0


@dataclass(slots=True)
class _Open:
    """A list or a mapping that has not ended; `key` is the one that waits for its value."""

    value: list[Yaml] | dict[str, Yaml]
    anchor: str | None
    key: str | None = None
    cost: _Cost = field(default_factory=_Cost)


class _Document:
    """Takes the events of a document, and builds what it holds."""

    def __init__(self) -> None:
        self.value: Yaml = None
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Yaml, _Cost, bool]] = {}
        self._documents = 0
        self._total = _Cost(nodes=0)

    def take(self, event: Event) -> None:
        """Take the next event; raises `_Refused` as soon as the document cannot be one that is read."""
        import yaml

        line = event.start_mark.line + 1 if event.start_mark else 0
        match event:
            case yaml.ScalarEvent():
                self._check_tag(event.tag, line)
                plain = bool(event.implicit[0])
                text = None if plain and event.value in _NULL else event.value
                self._add(text, _Cost(characters=len(event.value)), event.anchor, line, plain=plain)
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._check_tag(event.tag, line)
                empty: list[Yaml] | dict[str, Yaml] = [] if isinstance(event, yaml.SequenceStartEvent) else {}
                self._open.append(_Open(empty, event.anchor))
                self._count(_Cost(), line)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                done = self._open.pop()
                self._add(done.value, done.cost, done.anchor, line, counted=True)
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    _refuse(f"line {line} refers to {event.anchor!r:.40}, which is not complete there")
                value, cost, plain = self._anchors[event.anchor]
                self._add(value, cost, None, line, plain=plain)
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    _refuse(f"line {line} begins a second document")

    def _add(
        self, value: Yaml, cost: _Cost, anchor: str | None, line: int, *, plain: bool = False, counted: bool = False
    ) -> None:
        """Put a complete node where it belongs."""
        if not counted:
            self._count(cost, line)
        if anchor:
            self._anchors[anchor] = value, cost, plain
        if not self._open:
            self.value = value
            return
        parent = self._open[-1]
        parent.cost.nodes += cost.nodes
        parent.cost.characters += cost.characters
        parent.cost.levels = max(parent.cost.levels, cost.levels + 1)
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is None:
            parent.key = _key(value, line, plain=plain)
        else:
            parent.value[parent.key] = value
            parent.key = None

    def _count(self, cost: _Cost, line: int) -> None:
        self._total.nodes += cost.nodes
        self._total.characters += cost.characters
        if len(self._open) + cost.levels > MOST_DEPTH:
            _refuse(f"line {line} is nested deeper than {MOST_DEPTH} levels")
        if self._total.nodes > MOST_NODES or self._total.characters > _MOST_CHARACTERS:
            _refuse(f"up to line {line} it has more than {MOST_NODES:,} entries, or too much text, aliases written out")

    @staticmethod
    def _check_tag(tag: str | None, line: int) -> None:
        if tag is not None and not _TAG.fullmatch(tag):
            _refuse(f"line {line} has the tag {one_line(tag, 60)!r}, which is not one of plain data")


def _decoded(content: bytes) -> str:
    if len(content) > MOST_YAML_BYTES:
        _refuse(f"it has more than {MOST_YAML_BYTES:,} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8 (byte {error.start:,})"
        raise _Refused(message) from error
    if sum(1 for _ in _DIRECTIVE.finditer(text)) > _MOST_DIRECTIVES:
        _refuse(f"more than {_MOST_DIRECTIVES} of its lines begin with '%'")
    if _LONG_TAG.search(text):
        _refuse(f"a tag in it is longer than {_LONGEST_TAG:,} characters")
    return text


def _key(value: Yaml, line: int, *, plain: bool) -> str:
    if plain and value == _MERGE:
        _refuse(f"line {line} has a merge key ('<<'); write out what it stands for")
    if isinstance(value, list | dict):
        _refuse(f"line {line} has a key that is not text")
    return value or ""


def _refuse(why: str) -> NoReturn:
    raise _Refused(why)
