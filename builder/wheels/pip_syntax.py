"""Requirements as an author writes them: PEP 508, a wheel's URL or path, and the lines of a requirements file."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from packaging.markers import InvalidMarker, Marker, UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name
from packaging.version import InvalidVersion as NotAVersion
from packaging.version import Version

from builder.masking import one_line
from builder.package_index.wheel_file import parse_wheel_name
from builder.safe_open import SAFE_PATH
from builder.urls import Ambiguous, canonical

WHEELS_ONLY = "only wheels are installed here; build a wheel of it and log that with the model"
# A normal name (PEP 503): of a package, or of an extra.
NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
# The most characters of a requirement, without its hashes.
LONGEST = 4000
# A machine's word holds numbers of so many digits; uv reads no larger ones, and Python reads at most 4,300 digits.
_MOST_DIGITS = 18
_MOST_EXTRAS, _MOST_SPECIFIERS, _MOST_NESTING = 100, 50, 20
_VCS = re.compile(r"(?:git|hg|svn|bzr)(?:\+|://|@)", re.IGNORECASE)
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_EXTRAS = re.compile(r"[A-Za-z0-9._,\s-]*")
_NUMBER = re.compile(rf"[0-9]{{{_MOST_DIGITS + 1}}}")
_ARCHIVES = (".whl", ".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.lz")
# A marker is names, operators and quoted values. A value that holds a quote, a backslash, a `#` or a word with a dash
# in front could become something else where a line is read once more.
_MARKER = re.compile(r"""(?:[A-Za-z0-9_.()<>=!~\s]|'[A-Za-z0-9_.+!*,<>=~ -]*'|"[A-Za-z0-9_.+!*,<>=~ -]*")+""")
_NO_MARKER = (InvalidMarker, UndefinedComparison, UndefinedEnvironmentName, ValueError, KeyError, RecursionError)


class Unusable(ValueError):
    """A line that cannot be used; the text says why, and what to write instead."""


def refuse_line(why: str) -> NoReturn:
    """Raise Unusable."""
    raise Unusable(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """One requirement.

    Attributes:
        name: the package, in its normal form (PEP 503).
        specifier: versions, normalised; empty for any.
        extras: normalised, in order.
        marker: normalised; empty for none.
        hashes: SHA-256 that its file may have, 64 hexadecimal digits each; empty for any.
        url: address of its wheel; empty where an index has it.
        path: its wheel in the model folder; empty where there is none.
    """

    name: str
    specifier: str = ""
    extras: tuple[str, ...] = ()
    marker: str = ""
    hashes: tuple[str, ...] = ()
    url: str = ""
    path: str = ""

    @property
    def pinned(self) -> str:
        """The only version that fulfils it (`==`, without `*`); empty where others may."""
        match = re.fullmatch(r"={2,3}([^*,]+)", self.specifier)
        return match[1] if match else ""

    def text(self, location: str = "") -> str:
        """Return it in PEP 508's form, without hashes.

        Args:
            location: the address that stands for its wheel, where it names one.
        """
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        location = location or self.url
        what = f" @ {location}" if location else self.specifier
        marker = f"{' ' if location else ''}; {self.marker}" if self.marker else ""
        return f"{self.name}{extras}{what}{marker}"


def parse_requirement(text: str, hashes: tuple[str, ...] = ()) -> Required:
    """Return the requirement that `text` writes: PEP 508's form, a wheel's address, or a wheel's path.

    Raises:
        Unusable: it is none of these, is too long, or names something that is not a wheel.
    """
    if len(text) > LONGEST:
        refuse_line(f"it is longer than {LONGEST:,} characters")
    # No address that is taken has a semicolon in it, so that the first one begins the marker.
    body, semicolon, behind = (part.strip() for part in text.partition(";"))
    marker = _marker(behind) if semicolon else ""
    _, at, address = (part.strip() for part in body.partition(" @ "))
    if _VCS.match(body) or (at and _VCS.match(address)):
        refuse_line(f"a repository is source; {WHEELS_ONLY}")
    if _HTTP.match(body):
        url, hashes = _address(body, hashes)
        return Required(name=_wheel_name(unquote(urlsplit(url).path)), marker=marker, hashes=hashes, url=url)
    path, bracket, extras = body.partition("[")
    if path.endswith(".whl") and not at and not re.search(r"[\s:]", path):
        inside, closed, rest = extras.partition("]")
        if bracket and (not closed or rest or not _EXTRAS.fullmatch(inside)):
            refuse_line("its extras are not names in brackets")
        path = path.removeprefix("./")
        return Required(
            name=_wheel_name(path),
            extras=_extras(word for word in re.split(r"[\s,]+", inside) if word),
            marker=marker,
            hashes=hashes,
            path=_local(path),
        )
    if not at and _is_path(path):
        refuse_line(f"it names a file or folder that is not a wheel; {WHEELS_ONLY}")
    return _named(body, marker, hashes)


def _named(text: str, marker: str, hashes: tuple[str, ...]) -> Required:
    try:
        parsed = Requirement(text)
    except (InvalidRequirement, ValueError, RecursionError) as error:
        said, _, _ = str(error).partition("\n")
        refuse_line(f"it is not a valid requirement: {one_line(said[:400], 200)}")
    name, url = _name(parsed.name, "name"), ""
    if parsed.url:
        if parsed.url.lower().startswith("file:") and not parsed.url.endswith(".whl"):
            refuse_line(f"its address is on the machine where conda or a build ran; write {name}==<version> instead")
        if not _HTTP.match(parsed.url):
            refuse_line(f"its address is not https; {WHEELS_ONLY}, named by its path, as in ./wheels/name.whl")
        url, hashes = _address(parsed.url, hashes)
        if _wheel_name(unquote(urlsplit(url).path)) != name:
            refuse_line("its address is that of a wheel of another package")
    return Required(
        name=name,
        specifier=_specifier(parsed.specifier),
        extras=_extras(parsed.extras),
        marker=marker,
        hashes=hashes,
        url=url,
    )


def _name(text: str, what: str) -> str:
    """Return a normal name; packaging takes some that end with a dash or an underscore, which nothing can be called."""
    name = canonicalize_name(text)
    if not NAME.fullmatch(name):
        refuse_line(f"it is not a valid requirement: its {what} does not begin and end with a letter or a digit")
    return name


def _extras(words: Iterable[str]) -> tuple[str, ...]:
    extras = tuple(sorted({_name(word, "extra") for word in words}))
    if len(extras) > _MOST_EXTRAS:
        refuse_line(f"it has more than {_MOST_EXTRAS} extras")
    return extras


def _specifier(specifiers: SpecifierSet) -> str:
    """Return the specifiers, normalised: versions of PEP 440, with numbers that all programs can read."""
    if len(specifiers) > _MOST_SPECIFIERS:
        refuse_line(f"it has more than {_MOST_SPECIFIERS} conditions on its version")
    text = str(specifiers)
    if _NUMBER.search(text):
        refuse_line(f"its version has a number of more than {_MOST_DIGITS} digits")
    for one in specifiers:
        try:
            # `===` takes any text at all, which no index has a wheel of.
            Version(one.version.removesuffix(".*"))
        except NotAVersion:
            refuse_line(f"{one_line(one.version[:400], 60)!r} is not a version")
    return text


def checked_url(url: str, *, query: bool = False) -> str:
    """Return an address as every program reads it, without its fragment.

    Args:
        url: the address, as an author wrote it.
        query: whether it may have a query.

    Raises:
        Unusable: it is not over HTTPS, holds a credential, or something that programs read in different ways.
    """
    if not url.lower().startswith("https:"):
        refuse_line("its address is not https")
    try:
        return canonical(url, query=query)
    except Ambiguous as error:
        raise Unusable(str(error)) from error


def _address(url: str, hashes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a wheel's address without its fragment, and the hashes with the one that the fragment names."""
    address, fragment = checked_url(url, query=True), url.partition("#")[2]
    named = re.search(r"(?:^|&)sha256=([0-9a-fA-F]{64})(?:&|$)", fragment)
    return address, tuple(sorted({*hashes, named[1].lower()})) if named else hashes


def _wheel_name(path: str) -> str:
    name = PurePosixPath(path).name
    if not name.endswith(".whl"):
        refuse_line(f"it is not a wheel; {WHEELS_ONLY}")
    try:
        return parse_wheel_name(name)[0]
    except InvalidWheelFilename:
        refuse_line("its file name is not that of a wheel, name-version-python-abi-platform.whl")


def _local(path: str) -> str:
    if not SAFE_PATH.fullmatch(path):
        refuse_line("its path leaves the model folder, or has characters other than letters, digits and _.@+-")
    return path


def _marker(text: str) -> str:
    """Return an environment marker, normalised; it can be evaluated in every environment."""
    message = "it is not a valid requirement: the text after ';' is not an environment marker"
    if not _MARKER.fullmatch(text) or _NUMBER.search(text) or re.search(r"\s-", text):
        raise Unusable(message)
    if text.count("(") > _MOST_NESTING:
        refuse_line(f"its environment marker has more than {_MOST_NESTING} brackets")
    try:
        marker = Marker(text)
        # What cannot be compared shows when it is evaluated, wherever that is.
        marker.evaluate({"extra": ""})
        return str(marker)
    except _NO_MARKER as error:
        raise Unusable(message) from error


def _is_path(text: str) -> bool:
    """Return whether a text without its extras is a path, or an archive's name."""
    begin, slash, _ = text.partition("/")
    folder = bool(slash) and re.fullmatch(r"[A-Za-z0-9_.-]+", begin) is not None
    return folder or text.startswith((".", "/", "~", "file:")) or text.endswith(_ARCHIVES)


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
# Options that change nothing where only wheels are installed.
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
        refuse_line(f"it is longer than {LONGEST_LINE:,} characters")
    if not _TEXT.fullmatch(text):
        refuse_line("it is not a valid requirement: it has characters other than printable ASCII")
    if variable := _VARIABLE.search(text):
        refuse_line(f"{variable[0]} is a variable of the publisher's environment; write the value")
    head, options = _split(text)
    if not head:
        yield from _options(number, options)
        return
    hashes: list[str] = []
    for name, value in options:
        if name != "--hash":
            refuse_line(f"{one_line(name[:LONGEST], 60)} is for building from source; {WHEELS_ONLY}")
        if not (match := _HASH.fullmatch(value)):
            refuse_line("--hash is not sha256:… with 64 hexadecimal digits, the only supported kind")
        hashes.append(match[1].lower())
    yield Line(number, required=parse_requirement(head, tuple(sorted(set(hashes)))))


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the requirement at the beginning of a line, and the options behind it."""
    begin = _OPTIONS.search(text)
    head, tail = (text[: begin.start()], text[begin.start() :]) if begin else (text, "")
    if _WORD.sub("", tail).strip():
        refuse_line("it has an unclosed quote or a backslash")
    words = deque(re.sub("['\"]", "", word) for word in _WORD.findall(tail))
    options: list[tuple[str, str]] = []
    while words:
        word = words.popleft()
        if len(options) == _MOST_OPTIONS:
            refuse_line(f"it has more than {_MOST_OPTIONS:,} options")
        if not word.startswith("-"):
            refuse_line(f"{one_line(word[:LONGEST], 60)!r} follows an option that does not take it")
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
            refuse_line(f"an editable requirement is source; {WHEELS_ONLY}")
        if name == "--trusted-host":
            refuse_line("a model cannot trust a host without a certificate; see PIP_TRUSTED_HOST")
        if name == "--no-binary":
            refuse_line(f"--no-binary asks for source; {WHEELS_ONLY}")
        if name == "--find-links" and is_pypi(value):
            yield Line(number, "--extra-index-url", value)
            continue
        if name == "--find-links":
            refuse_line("--find-links is not supported; name each wheel by its path, as in ./wheels/name.whl")
        if name in {"--pre", "--require-hashes"} and not value:
            yield Line(number, name)
        elif name in {"--index-url", "--extra-index-url", "--requirement", "--constraint"} and value:
            yield Line(number, name, value)
        else:
            refuse_line(f"the option {one_line(name[:LONGEST], 60)!r} is not supported, or lacks its value")
