"""What a wheel's modules import of one another: always, or only where a failure is caught.

Sources are an author's, and of other releases of Python too: they are read line by line, in linear time, and are not
parsed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

# Comments and strings, of which nothing is left. What has no end ends with the line, or with the file. There are no
# possessive groups: Python 3.11.2, which is Debian's, finds other text by them.
_UNREAD = re.compile(
    rb"#[^\n]*"
    rb'|"""(?:[^"\\]+|\\(?:.|\Z)|"(?!""))*(?:"""|\Z)'
    rb"|'''(?:[^'\\]+|\\(?:.|\Z)|'(?!''))*(?:'''|\Z)"
    rb'|"(?:[^"\\\n]+|\\.)*"?'
    rb"|'(?:[^'\\\n]+|\\.)*'?",
    re.DOTALL,
)
_CONTINUED = re.compile(rb"\\\r?\n")
_IMPORT = re.compile(rb"^([ \t]*+)((?:import|from)\b[^\n;(]*(?:\([^()]*\))?)", re.MULTILINE)
_WORD = re.compile(rb"\w+")
# A line's indent, and its import, or its first word and the rest.
_LINE = re.compile(rb"^([ \t]*+)(?:((?:import|from)\b[^\n;(]*(?:\([^()]*\))?)|(\w+)([^\n]*)|[^\s])", re.MULTILINE)
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
    """What the modules of a wheel import of one another.

    Args:
        files: paths from where Python imports, `pack/__init__.py`; of modules and of extensions.
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
        """Take a module's source."""
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
        """The modules that are imported whenever the wheel's packages are, or its modules outside of packages."""
        todo = [*self._roots]
        found = set[str]()
        for module in todo:
            more = self._always.get(module, set()) - found
            found |= more
            todo += more
        return found

    @property
    def caught(self) -> set[str]:
        """The modules that are imported only where it is caught if that fails."""
        return self._caught - self._elsewhere - set().union(*self._always.values())


def module_of(file: str) -> str:
    """Return the name that a file is imported by: `pack.core` of `pack/core.abi3.so`, `pack` of `pack/__init__.py`."""
    folder, slash, name = file.rpartition("/")
    name = name.partition(".")[0]
    return (folder if name == "__init__" else f"{folder}{slash}{name}").replace("/", ".")


def _is_package(file: str) -> bool:
    return file.rpartition("/")[2].partition(".")[0] == "__init__"


@dataclass(slots=True)
class _Try:
    """A `try` whose end has not come: how far it is indented, whether a handler catches, and what its body imports."""

    indent: int
    part: bytes = b"try"
    catches: bool = False
    raises: bool = False
    catching: bool = False
    statements: list[bytes] = field(default_factory=list)

    def begin(self, part: bytes, rest: bytes) -> None:
        """Take the line at which its next part begins."""
        self.part = part
        self.catching = part == b"except" and bool(_CATCHES.match(rest))
        self.catches |= self.catching


def _statements(source: bytes, extensions: frozenset[bytes]) -> Iterator[tuple[bytes, How]]:
    """Yield the statements that import something, and how: `always` is at the margin.

    Others are left out, unless there is one with the name of an extension: most modules need no look at each line.
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
    """Yield the statements that import something and are not at the margin."""
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
    """Take the innermost `try`, which is at its end; yield what it imports, or leave that to one around it."""
    ended = tries.pop()
    if ended.catches and not ended.raises:
        yield from ((statement, "caught") for statement in ended.statements)
    elif outer := _body(tries):
        outer.statements += ended.statements
    else:
        yield from ((statement, "elsewhere") for statement in ended.statements)


def _body(tries: list[_Try]) -> _Try | None:
    """Return the innermost `try` in whose body a line is; None where it is in none."""
    return next((each for each in reversed(tries) if each.part == b"try"), None)


def _names(statement: bytes, package: str) -> Iterator[str]:
    """Yield what may be a module that a statement imports, and its packages.

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
