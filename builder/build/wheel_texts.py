"""The text files of a wheel's .dist-info, each read within bounds: headers, entry points, RECORD.

Whoever makes a wheel writes them, and the library's parsers have no bounds: `email` takes 50 times a text's size,
`configparser` quadratic time for blanks and exponential for `%(x)s`. The bounds are several times what the largest
wheels have (METADATA 140 kB and 120 requirements, RECORD 2.6 MB, entry points 1.5 kB, of 200 wheels looked at).
"""

from __future__ import annotations

import csv
import re
from email.message import Message
from email.parser import HeaderParser

from installer.records import InvalidRecordEntry, RecordEntry, parse_record_file
from installer.scripts import Script

from builder.build.wheel_directory import MOST_MEMBERS, BadArchive, check_path, refuse

MOST_WHEEL, MOST_METADATA, MOST_ENTRY_POINTS, MOST_RECORD = 64 << 10, 8 << 20, 1 << 20, 16 << 20
# Old METADATA has its description among the headers.
_MOST_HEADERS, _MOST_HEADER_LINES = 2 << 20, 20_000
_MOST_REQUIRED = 5_000
# Shorter than the longest number that Python reads.
LONGEST_VALUE = 4_096
_DEEPEST_MARKER = 40
_MOST_SCRIPTS = 10_000
_BLANK_LINE = re.compile(r"(?:\r\n|\r(?!\n)|\n)(?=[\r\n])")
# Some RECORDs list the bytecode, too, that an installer will make.
_MOST_ROWS = 2 * MOST_MEMBERS
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SECTIONS = {"console_scripts": "console", "gui_scripts": "gui"}


def headers(text: str, what: str) -> Message:
    """Return the headers of METADATA or WHEEL; what follows the first blank line is not looked at.

    Raises:
        BadArchive: there are too many of them, or they are too long.
    """
    end = _BLANK_LINE.search(text)
    head = text[: end.end()] if end else text
    if len(head) > _MOST_HEADERS or head.count("\n") + head.count("\r") > _MOST_HEADER_LINES:
        refuse(f"the headers of {what} have more than {_MOST_HEADER_LINES:,} lines or {_MOST_HEADERS >> 20} MiB")
    return HeaderParser().parsestr(head)


def value(message: Message, name: str) -> str:
    """Return a header's value, `None` as text where there is none.

    Raises:
        BadArchive: it is too long.
    """
    found = str(message[name])
    if len(found) > LONGEST_VALUE:
        refuse(f"its {name} has {len(found):,} characters")
    return found


def required(message: Message) -> tuple[str, ...]:
    """Return the values of METADATA's Requires-Dist.

    Raises:
        BadArchive: there are too many, or one is too long or too deep.
    """
    lines = tuple(str(line) for line in message.get_all("Requires-Dist", []))
    if len(lines) > _MOST_REQUIRED:
        refuse(f"its METADATA has {len(lines):,} requirements; {_MOST_REQUIRED:,} are the most")
    for line in lines:
        if len(line) > LONGEST_VALUE or _depth(line) > _DEEPEST_MARKER:
            refuse(f"a requirement in its METADATA is too long, or too deep: {line[:60]!r}…")
    return lines


def _depth(text: str) -> int:
    """Return how deep parentheses are nested."""
    depth = deepest = 0
    for bracket in re.findall(r"[()]", text):
        depth += 1 if bracket == "(" else -1
        deepest = max(deepest, depth)
    return deepest


def scripts(text: str) -> tuple[Script, ...]:
    """Return the scripts that entry_points.txt names, read as pip reads them, by `importlib.metadata`.

    Raises:
        BadArchive: one is not `name = module:attribute`, or is there twice, or there are too many.
    """
    found: dict[str, Script] = {}
    section = ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            section = line[1:-1].strip()
            continue
        if not section:
            refuse(f"its entry points cannot be read: {line[:60]!r} stands in no section")
        if section not in _SECTIONS:
            continue
        script = _script(line, _SECTIONS[section])
        check_path(script.name)
        if "/" in script.name or script.name in found:
            refuse(f"its entry point {script.name!r} is there twice, or is a path")
        found[script.name] = script
        if len(found) > _MOST_SCRIPTS:
            refuse(f"it has more than {_MOST_SCRIPTS:,} entry points")
    return tuple(found.values())


def _script(line: str, section: str) -> Script:
    name, _, target = (part.strip() for part in line.partition("="))
    called = target.partition("[")[0] if target.endswith("]") else target
    module, _, attribute = (part.strip() for part in called.partition(":"))
    if len(line) > LONGEST_VALUE or not all(part.isidentifier() for part in f"{module}.{attribute}".split(".")):
        refuse(f"its entry points cannot be read: {line[:60]!r} is not name = module:function")
    return Script(name, module, attribute, "gui" if section == "gui" else "console")


def record(text: str) -> dict[str, RecordEntry]:
    """Return RECORD's entries by path.

    Raises:
        BadArchive: a row is malformed or there twice, or there are too many.
    """
    # A line may end in two of them.
    if sum(text.count(end) for end in _LINE_ENDS) > 2 * _MOST_ROWS:
        refuse(f"its RECORD has more than {_MOST_ROWS:,} rows")
    found: dict[str, RecordEntry] = {}
    try:
        for row in parse_record_file(text.splitlines()):
            entry = RecordEntry.from_elements(*row)
            if entry.path in found:
                refuse(f"RECORD lists {entry.path!r} twice")
            found[entry.path] = entry
            if len(found) > _MOST_ROWS:
                refuse(f"its RECORD has more than {_MOST_ROWS:,} rows")
    except (InvalidRecordEntry, csv.Error, ValueError) as error:
        message = f"its RECORD cannot be read ({str(error)[:200]})"
        raise BadArchive(message) from error
    return found
