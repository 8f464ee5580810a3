"""Lines of a requirements file, in pip's grammar: what they ask for, and what of it cannot be had here.

https://pip.pypa.io/en/stable/reference/requirements-file-format/ has the grammar. Every pattern is linear.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from builder.build.requirement import LONGEST, WHEELS_ONLY, Required, Unusable, parse_requirement
from builder.errors import one_line

# The most characters of a line with all its continuations: a thousand hashes fit.
LONGEST_LINE = 100_000
_MOST_OPTIONS = 1000
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_OPTIONS = re.compile(r"(?:^|\s)(?=--?[A-Za-z])")
_VARIABLE = re.compile(r"\$\{[A-Z0-9_]+\}")
_TEXT = re.compile(r"[\t -~]*")
_WORD = re.compile(r"""(?:[^\s'"\\]|'[^'\\]*'|"[^"\\]*")+""")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_SHORT = {"-r": "--requirement", "-c": "--constraint", "-e": "--editable", "-i": "--index-url", "-f": "--find-links"}
_PYPI = re.compile(r"https://(?:pypi\.python\.org|pypi\.org)(?::443)?/simple/?", re.IGNORECASE)
# What other ways of installing may choose, and what changes nothing where there are wheels alone.
_IGNORED = frozenset({"--prefer-binary", "--only-binary", "--no-cache-dir", "--upgrade", "-U"})


@dataclass(frozen=True, slots=True)
class Line:
    """One line: a requirement or an option.

    Attributes:
        number: where it begins in its file, from 1.
        option: an option's long name; empty for a requirement.
        value: the option's value; empty for none.
        required: the requirement; None for an option.
    """

    number: int
    option: str = ""
    value: str = ""
    required: Required | None = None


def is_pypi(address: str) -> bool:
    """Return whether an address is PyPI's, by its name or by the one that it had until 2018."""
    return _PYPI.fullmatch(address) is not None


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield a requirements file's lines with their numbers: continuations joined, comments and empty ones left out."""
    begun: int = 0
    pieces: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if not pieces and (not line or line.startswith("#")):
            continue
        comment = bool(_COMMENT.match(line))
        begun = begun or number
        if line.endswith("\\") and not comment:
            pieces.append(line[:-1])
            continue
        joined = "".join(pieces)
        whole = _COMMENT.sub("", f"{joined} {line}" if comment and joined else f"{joined}{line}").strip()
        if whole:
            yield begun, whole
        begun, pieces = 0, []


def parse_line(number: int, text: str) -> Iterator[Line]:
    """Yield what one line holds: a requirement, or one or more options.

    Args:
        number: the line's number.
        text: a line as `logical_lines` gives it.

    Raises:
        Unusable: it is malformed or too long, or asks for what cannot be had.
    """
    if len(text) > LONGEST_LINE:
        message = f"it is longer than {LONGEST_LINE:,} characters"
        raise Unusable(message)
    if not _TEXT.fullmatch(text):
        message = "it is no requirement: it has characters other than printable ASCII"
        raise Unusable(message)
    if variable := _VARIABLE.search(text):
        message = f"{variable[0]} would be read from the publisher's environment; write the value"
        raise Unusable(message)
    head, options = _split(text)
    if not head:
        yield from _options(number, options)
        return
    hashes: list[str] = []
    for name, value in options:
        if name != "--hash":
            message = f"{one_line(name[:LONGEST], 60)} is for building from source; {WHEELS_ONLY}"
            raise Unusable(message)
        if not (match := _HASH.fullmatch(value)):
            message = "--hash is not sha256:… with 64 hexadecimal digits, the one kind that is checked"
            raise Unusable(message)
        hashes.append(match[1].lower())
    yield Line(number, required=parse_requirement(head, tuple(sorted(set(hashes)))))


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the requirement at the beginning of a line, and the options behind it."""
    begin = _OPTIONS.search(text)
    head, tail = (text[: begin.start()], text[begin.start() :]) if begin else (text, "")
    if _WORD.sub("", tail).strip():
        message = "its quotes do not close, or it has a backslash"
        raise Unusable(message)
    words = deque(re.sub("['\"]", "", word) for word in _WORD.findall(tail))
    options: list[tuple[str, str]] = []
    while words:
        word = words.popleft()
        if len(options) == _MOST_OPTIONS:
            message = f"it has more than {_MOST_OPTIONS:,} options"
            raise Unusable(message)
        if not word.startswith("-"):
            message = f"{one_line(word[:LONGEST], 60)!r} stands behind an option that takes no such value"
            raise Unusable(message)
        short = word[:2]
        if not word.startswith("--") and short in _SHORT:
            word = f"{_SHORT[short]}={word[2:].removeprefix('=')}" if word[2:] else _SHORT[short]
        name, equals, value = word.partition("=")
        if not equals and words and not words[0].startswith("-"):
            value = words.popleft()
        options.append((name, value))
    return head.strip(), options


def _options(number: int, options: list[tuple[str, str]]) -> Iterator[Line]:
    for name, value in options:
        if name in _IGNORED:
            continue
        if name == "--editable":
            message = f"an editable requirement is source; {WHEELS_ONLY}"
            raise Unusable(message)
        if name == "--trusted-host":
            message = "which hosts are trusted without a certificate is not the model's to say; see PIP_TRUSTED_HOST"
            raise Unusable(message)
        if name == "--no-binary":
            message = f"--no-binary asks for source; {WHEELS_ONLY}"
            raise Unusable(message)
        if name == "--find-links" and is_pypi(value):
            yield Line(number, "--extra-index-url", value)
            continue
        if name == "--find-links":
            message = "no folder or page is searched for wheels; name each by its path, as in ./wheels/name.whl"
            raise Unusable(message)
        if name in {"--pre", "--require-hashes"} and not value:
            yield Line(number, name)
        elif name in {"--index-url", "--extra-index-url", "--requirement", "--constraint"} and value:
            yield Line(number, name, value)
        else:
            message = f"the option {one_line(name[:LONGEST], 60)!r} is not understood, or lacks its value"
            raise Unusable(message)
