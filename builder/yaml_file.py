"""Read a YAML file that somebody else wrote, within bounds, and into text, lists and mappings alone.

`yaml.load` composes recursively in C, so a hundred thousand brackets end the process, and what it constructs is worse:
aliases and merge keys multiply, numbers and dates raise errors of their own. Here the parser's events are counted while
they come, and nothing but text is made of a scalar, so `python: 3.10` stays `3.10`. PyYAML itself writes an alias where
an object is in a document twice, as in the metadata of an MLmodel: aliases are read, and count as if what they
stand for were written out. The source is https://yaml.org/spec/1.1/, as libyaml reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from builder.errors import InvalidSettings, InvalidVersion
from builder.masking import one_line

if TYPE_CHECKING:
    from collections.abc import Collection

    from yaml import Event


Yaml: TypeAlias = "str | list[Yaml] | dict[str, Yaml] | None"

# An MLmodel has its signature in one scalar: about 65 bytes for each column.
MOST_BYTES = 4 << 20
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
    if len(content) > MOST_BYTES:
        _refuse(f"it has more than {MOST_BYTES:,} bytes")
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
