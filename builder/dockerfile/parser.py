"""A Dockerfile read without running it: its instructions, the names it declares, the images it needs.

The grammar is BuildKit's (https://docs.docker.com/reference/dockerfile/), as far as these questions need it: comments,
the escape directive, line continuations, here-documents, words with quotes. The engine decides whether a Dockerfile is
valid.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Self

from builder.errors import InvalidVersion

_DIRECTIVE = re.compile(r"#[ \t]*([a-zA-Z]+)[ \t]*=[ \t]*(\S+)[ \t]*")
_KEYWORD = re.compile(r"[ \t]*([A-Za-z]+)(?:[ \t]+|$)")
_FLAG = re.compile(r"--([a-z]+)(?:=(\S*))?(?:[ \t]+|$)")
_HEREDOC = re.compile(r"(?:^|[ \t])[0-9]*<<-?([\"']?)([A-Za-z_][A-Za-z0-9_]*)\1(?=[ \t;|&>)]|$)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPANSION = re.compile(r"\\\$|\$(?:\{([A-Za-z_][A-Za-z0-9_]*)(?:(:?[-+])([^{}]*))?\}|([A-Za-z_][A-Za-z0-9_]*))")
_NUMBER = re.compile(r"[0-9]{1,9}")
_WITH_HEREDOC = frozenset({"RUN", "COPY", "ADD"})
_NO_IMAGE = frozenset({"scratch"})
# No reference is longer, and values that name each other twice double with each line.
_LONGEST_VALUE = 4096
# The variables that BuildKit and Buildah allow in a FROM without an ARG.
_PREDECLARED = frozenset(
    f"{side}{what}" for side in ("TARGET", "BUILD") for what in ("PLATFORM", "OS", "ARCH", "VARIANT")
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        keyword: in capitals; for ONBUILD, that of the instruction after it.
        rest: what follows the keyword, continuation lines joined, comments between them left out.
        first: number of its first line, from 1.
        last: number of its last line, here-documents included.
        heredoc: whether it has here-documents.
    """

    keyword: str
    rest: str
    first: int
    last: int
    heredoc: bool = False

    def flags(self) -> tuple[dict[str, str], str]:
        """Return the leading `--name=value` flags, and what follows them."""
        flags, at = {}, 0
        while match := _FLAG.match(self.rest, at):
            flags[match[1]] = match[2] or ""
            at = match.end()
        return flags, self.rest[at:]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A Dockerfile's instructions, in order."""

    instructions: tuple[Instruction, ...]
    escape: str = "\\"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the instructions of a Dockerfile; other lines are left out.

        Args:
            text: the Dockerfile; lines end with a line feed, with or without a carriage return before it.
        """
        lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
        escape = _escape(lines)
        return cls(tuple(_instructions(lines, escape)), escape)

    def declared(self) -> frozenset[str]:
        """Return the names that ARG and ENV declare, in any stage, before or after their use."""
        names: set[str] = set()
        for instruction in self.instructions:
            if instruction.keyword in {"ARG", "ENV"}:
                names.update(key for key, _ in self._pairs(instruction))
        return frozenset(names)

    def final_base(self, args: Mapping[str, str] | None = None) -> str | None:
        """Return the reference that the last stage is based on, stage names followed.

        It is None for `scratch`, or if a variable of the reference has no value.

        Args:
            args: values of build arguments, which win over the defaults of ARG instructions before the first FROM.

        Raises:
            InvalidVersion: there is no FROM.
        """
        stages = self._stages(args or {})
        named = _Names(stages)
        base: str | None = stages[-1].base
        at = len(stages) - 1
        while base is not None and (earlier := named.before(at, base)) is not None:
            at, base = earlier, stages[earlier].base
        return None if base in _NO_IMAGE else base

    def images(self, args: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Return every image that FROM, COPY --from and RUN --mount=from= name, each once, in order.

        Stages and `scratch` are not images, and a reference with a variable that has no value is left out.

        Args:
            args: as for `final_base`.

        Raises:
            InvalidVersion: there is no FROM.
        """
        stages = self._stages(args or {})
        named = _Names(stages)
        found: list[str] = []
        for number, stage in enumerate(stages):
            if stage.base is not None and named.before(number, stage.base) is None:
                found.append(stage.base)
            for source in stage.sources:
                is_number = _NUMBER.fullmatch(source) and int(source) < number
                if not is_number and named.before(number, source) is None:
                    found.append(source)
        return tuple(dict.fromkeys(image for image in found if image not in _NO_IMAGE))

    def mounts(self) -> Iterator[tuple[Instruction, str]]:
        """Yield each RUN instruction with a `--mount` flag, and the flag's value, quotes and escapes taken away."""
        for instruction in self.instructions:
            if instruction.keyword == "RUN":
                flags = takewhile(lambda word: word.startswith("--"), _words(instruction.rest, self.escape))
                for flag in flags:
                    if flag.startswith("--mount"):
                        yield instruction, flag.removeprefix("--mount").removeprefix("=")

    def _stages(self, args: Mapping[str, str]) -> list[_Stage]:
        stages: list[_Stage] = []
        values = {key: value for key, value in args.items() if key in _PREDECLARED}
        for instruction in self.instructions:
            flags, rest = instruction.flags()
            if instruction.keyword == "FROM":
                words = rest.split()
                name = words[2].lower() if len(words) == 3 and words[1].lower() == "as" else ""  # noqa: PLR2004
                base = expand(words[0].strip("\"'"), values) if words else None
                stages.append(_Stage(name, base or None, []))
            elif instruction.keyword == "ARG" and not stages:
                for key, default in self._pairs(instruction):
                    value = args.get(key, default)
                    if value is None:
                        continue
                    expanded = expand(value, values)
                    values.pop(key, None)
                    if expanded is not None:
                        values[key] = expanded
            elif stages:
                stages[-1].sources.extend(_sources(instruction.keyword, flags, instruction.rest))
        if not stages:
            message = "The Dockerfile has no FROM."
            raise InvalidVersion(message, remedy="Begin it with FROM and a base image.")
        return stages

    def _pairs(self, instruction: Instruction) -> Iterator[tuple[str, str | None]]:
        """Yield name and value of each declaration of an ARG or ENV; the value is None if it has none."""
        words = _words(instruction.rest, self.escape)
        if instruction.keyword == "ENV" and words and "=" not in words[0]:
            # The old form: one name, and all that follows is its value.
            name, _, value = instruction.rest.strip().partition(" ")
            words = [f"{name}={value.strip()}"]
        for word in words:
            key, equals, value = word.partition("=")
            if _NAME.fullmatch(key):
                yield key, value if equals else None


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    base: str | None
    sources: list[str]


class _Names:
    """The names of stages, in any case."""

    def __init__(self, stages: list[_Stage]) -> None:
        self._places: dict[str, list[int]] = defaultdict(list)
        for number, stage in enumerate(stages):
            if stage.name:
                self._places[stage.name].append(number)

    def before(self, number: int, name: str) -> int | None:
        """Return the index of the last stage of a name that comes before the stage of an index; None if absent."""
        places = self._places.get(name.lower(), [])
        at = bisect_left(places, number)
        return places[at - 1] if at else None


def expand(text: str, values: Mapping[str, str]) -> str | None:
    """Return `text` with its variables replaced, or None if one has no value and no default, or it gets too long."""
    missing = False
    left = _LONGEST_VALUE

    def bounded(match: re.Match[str]) -> str:
        nonlocal missing, left
        found = value(match)
        left -= len(found)
        missing = missing or left < 0
        return found if left >= 0 else ""

    def value(match: re.Match[str]) -> str:
        nonlocal missing
        if match[0] == "\\$":
            return "$"
        name, operator, word = match[1] or match[4], match[2] or "", match[3] or ""
        given = values.get(name)
        is_set = bool(given) if ":" in operator else given is not None
        if operator.endswith("+"):
            return word if is_set else ""
        if operator.endswith("-") and not is_set:
            return word
        missing = missing or given is None
        return given or ""

    if len(text) > _LONGEST_VALUE:
        return None
    expanded = _EXPANSION.sub(bounded, text)
    return None if missing else expanded


def _escape(lines: list[str]) -> str:
    """Return the escape character: a backslash, or what a directive at the very top names."""
    for line in lines:
        match = _DIRECTIVE.fullmatch(line)
        if match is None:
            break
        if match[1].lower() == "escape" and match[2] in {"\\", "`"}:
            return match[2]
    return "\\"


def _instructions(lines: list[str], escape: str) -> Iterator[Instruction]:
    places: dict[str, list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        places[line.lstrip("\t")].append(number)
    at = 0
    while at < len(lines):
        first, more = at, True
        parts: list[str] = []
        while more and at < len(lines):
            line = lines[at].rstrip(" \t")
            at += 1
            if line.lstrip(" \t").startswith("#") or (parts and not line):
                # A comment or an empty line between continuation lines is as if it were not there.
                more = bool(parts)
                continue
            more = line.endswith(escape)
            parts.append(line.removesuffix(escape) if more else line)
        text = "".join(parts)
        match = _KEYWORD.match(text)
        if match is None:
            continue
        keyword, rest = match[1].upper(), text[match.end() :]
        if keyword == "ONBUILD" and (behind := _KEYWORD.match(rest)):
            keyword, rest = behind[1].upper(), rest[behind.end() :]
        end = _after_heredocs(rest, places, at) if keyword in _WITH_HEREDOC else at
        heredoc, at = end > at, end
        yield Instruction(keyword, rest, first + 1, at, heredoc)


def opens_heredoc(line: str) -> bool:
    """Return whether a here-document begins on an instruction's line, if one of its lines ends it."""
    return bool(_HEREDOC.search(line))


def _after_heredocs(rest: str, places: Mapping[str, list[int]], at: int) -> int:
    """Return the index of the line after the here-documents that an instruction opens, if they have an end.

    Args:
        rest: the instruction's text.
        places: the indexes of the lines with the same text, leading tabs aside, in order.
        at: index of the line after the instruction.
    """
    for match in _HEREDOC.finditer(rest):
        ends = places.get(match[2], [])
        found = bisect_left(ends, at)
        if found == len(ends):
            return at
        at = ends[found] + 1
    return at


def _words(text: str, escape: str) -> list[str]:
    """Return the words of an ARG or ENV: split at blanks outside quotes, quotes and escapes taken away."""
    words: list[str] = []
    word: list[str] = []
    quote, inside, at = "", False, 0
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'" and at + 1 < len(text):
            following = text[at + 1]
            # An escaped dollar stays one until variables are replaced.
            word.append(f"\\{following}" if following == "$" else following)
            inside, at = True, at + 1
        elif quote:
            quote, keep = ("", "") if char == quote else (quote, char)
            word.append(keep)
        elif char in "\"'":
            quote, inside = char, True
        elif char in " \t":
            if inside:
                words.append("".join(word))
            word, inside = [], False
        else:
            word.append(char)
            inside = True
        at += 1
    return [*words, "".join(word)] if inside else words


def _sources(keyword: str, flags: Mapping[str, str], rest: str) -> Iterator[str]:
    """Yield the images or stages that an instruction takes files from."""
    if keyword in {"COPY", "ADD"} and flags.get("from"):
        yield flags["from"]
    if keyword == "RUN":
        yield from re.findall(r"(?:^|[ \t])--mount=(?:\S*,)?from=([^,\s]+)", rest)
