"""Lines of a requirements file, in pip's grammar: what they ask for, and what of it cannot be had here.

https://pip.pypa.io/en/stable/reference/requirements-file-format/ has the grammar, PEP 508 that of a requirement.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from packaging.markers import InvalidMarker, Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from builder.build.beneath import SAFE_PATH
from builder.errors import one_line

WHEELS_ONLY = "only wheels are installed here; build a wheel of it and log that with the model"
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_OPTIONS = re.compile(r"(?:^|\s)(?=--?[A-Za-z])")
_VARIABLE = re.compile(r"\$\{[A-Z0-9_]+\}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_VCS = re.compile(r"(?:git|hg|svn|bzr)(?:\+|://|@)", re.IGNORECASE)
_LOCAL_WHEEL = re.compile(r"(?:\./)*(?P<path>[^\s\[\]:]+\.whl)(?:\[(?P<extras>[A-Za-z0-9._,\s-]*)\])?")
_LONGEST = 4000
_SHORT = {"-r": "--requirement", "-c": "--constraint", "-e": "--editable", "-i": "--index-url", "-f": "--find-links"}
# What other ways of installing may choose, and what changes nothing where there are wheels alone.
_IGNORED = frozenset({"--prefer-binary", "--only-binary", "--no-cache-dir", "--upgrade", "-U"})


class Unusable(ValueError):
    """A line cannot be used; the text says why, and what would be."""


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
        """The one version that is asked for (`==`, without `*`); empty where there may be others."""
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


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield a requirements file's lines with their numbers: continuations joined, comments and empty ones left out."""
    begun, joined = 0, ""
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        comment = bool(_COMMENT.match(line))
        begun = begun or number
        if line.endswith("\\") and not comment:
            joined += line[:-1]
            continue
        whole = _COMMENT.sub("", f"{joined} {line}" if comment and joined else f"{joined}{line}").strip()
        if whole:
            yield begun, whole
        begun, joined = 0, ""


def parse_line(number: int, text: str) -> Iterator[Line]:
    """Yield what one line holds: a requirement, or one or more options.

    Args:
        number: the line's number.
        text: a line as `logical_lines` gives it.

    Raises:
        Unusable: it is malformed, or asks for what cannot be had.
    """
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
            message = f"{name} is for building from source; {WHEELS_ONLY}"
            raise Unusable(message)
        if not (match := _HASH.fullmatch(value)):
            message = "--hash is not sha256:… with 64 hexadecimal digits, the one kind that is checked"
            raise Unusable(message)
        hashes.append(match[1].lower())
    yield Line(number, required=parse_requirement(head, tuple(sorted(set(hashes)))))


def parse_requirement(text: str, hashes: tuple[str, ...] = ()) -> Required:
    """Return the requirement that `text` writes: PEP 508's form, a wheel's address, or a wheel's path.

    Raises:
        Unusable: it is none of these, or names something that is no wheel.
    """
    if len(text) > _LONGEST:
        message = f"it is longer than {_LONGEST} characters"
        raise Unusable(message)
    body, _, marker = (part.strip() for part in text.partition(";"))
    if _VCS.match(body) or (" @ " in body and _VCS.match(body.partition(" @ ")[2].strip())):
        message = f"a repository is source; {WHEELS_ONLY}"
        raise Unusable(message)
    if local := _LOCAL_WHEEL.fullmatch(body):
        extras = tuple(sorted({canonicalize_name(word) for word in re.split(r"[\s,]+", local["extras"] or "") if word}))
        return Required(
            name=_wheel_name(local["path"]),
            extras=extras,
            marker=_marker(marker),
            hashes=hashes,
            path=_local(local["path"]),
        )
    if re.match(r"https?://", body, re.IGNORECASE):
        address, hashes = _address(body, hashes)
        name = _wheel_name(unquote(urlsplit(address).path))
        return Required(name=name, marker=_marker(marker), hashes=hashes, url=address)
    if _is_path(body):
        message = f"it names a file or folder that is no wheel; {WHEELS_ONLY}"
        raise Unusable(message)
    return _named(text, hashes)


def _named(text: str, hashes: tuple[str, ...]) -> Required:
    try:
        parsed = Requirement(text)
    except (InvalidRequirement, RecursionError) as error:
        said, _, _ = str(error).partition("\n")
        message = f"it is no requirement: {one_line(said, 200)}"
        raise Unusable(message) from error
    name, url = canonicalize_name(parsed.name), ""
    if parsed.url:
        if not re.match(r"https?://", parsed.url, re.IGNORECASE):
            message = f"its address is not https; {WHEELS_ONLY}, and name it by its path, as in ./wheels/name.whl"
            raise Unusable(message)
        url, hashes = _address(parsed.url, hashes)
        if _wheel_name(unquote(urlsplit(url).path)) != name:
            message = "its address is that of another package's wheel"
            raise Unusable(message)
    return Required(
        name=name,
        specifier=str(parsed.specifier),
        extras=tuple(sorted({canonicalize_name(extra) for extra in parsed.extras})),
        marker=str(parsed.marker or ""),
        hashes=hashes,
        url=url,
    )


def checked_url(url: str) -> str:
    """Return an address without what is no part of it.

    Raises:
        Unusable: it is not over HTTPS, or holds a credential.
    """
    try:
        parts = urlsplit(url)
        plain = parts.scheme.lower() != "https" or not parts.hostname or parts.port == 0
    except ValueError:
        parts, plain = urlsplit(""), True
    if plain:
        message = "an address that a model names is over https"
        raise Unusable(message)
    if "@" in parts.netloc:
        message = "its address holds a credential, which everybody can read here; keep it in pip.conf or netrc"
        raise Unusable(message)
    return parts._replace(scheme="https", netloc=parts.netloc.lower(), fragment="").geturl()


def _address(url: str, hashes: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return a wheel's address without its fragment, and the hashes with the one that the fragment names."""
    address, fragment = checked_url(url), url.partition("#")[2]
    named = re.search(r"(?:^|&)sha256=([0-9a-fA-F]{64})(?:&|$)", fragment)
    return address, tuple(sorted({*hashes, named[1].lower()})) if named else hashes


def _wheel_name(path: str) -> str:
    name = PurePosixPath(path).name
    if not name.endswith(".whl"):
        message = f"it is no wheel; {WHEELS_ONLY}"
        raise Unusable(message)
    try:
        return parse_wheel_filename(name)[0]
    except InvalidWheelFilename as error:
        message = "it has no wheel's name, which is name-version-python-abi-platform.whl"
        raise Unusable(message) from error


def _local(path: str) -> str:
    if not SAFE_PATH.fullmatch(path):
        message = "its path does not stay in the model folder, or has characters other than letters, digits and _.@+-"
        raise Unusable(message)
    return path


def _marker(text: str) -> str:
    if not text:
        return ""
    try:
        return str(Marker(text))
    except (InvalidMarker, RecursionError) as error:
        message = "what stands behind ';' is no environment marker"
        raise Unusable(message) from error


def _is_path(text: str) -> bool:
    archive = re.search(r"\.(?:whl|zip|tar|tar\.[a-z0-9]+|tgz|tbz2?|txz)(?:\[.*\])?$", text)
    named = " @ " in text
    return not named and bool(
        text.startswith((".", "/", "~", "file:")) or archive or re.match(r"[A-Za-z0-9_.-]+/", text)
    )


def _split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the requirement at the beginning of a line, and the options behind it."""
    begin = _OPTIONS.search(text)
    head, tail = (text[: begin.start()], text[begin.start() :]) if begin else (text, "")
    try:
        words = shlex.split(tail)
    except ValueError as error:
        message = "its quotes do not close"
        raise Unusable(message) from error
    options: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            message = f"{word!r} stands behind an option that takes no such value"
            raise Unusable(message)
        short = word[:2]
        if not word.startswith("--") and short in _SHORT:
            word = f"{_SHORT[short]}={word[2:].removeprefix('=')}" if word[2:] else _SHORT[short]
        name, equals, value = word.partition("=")
        if not equals and words and not words[0].startswith("-"):
            value = words.pop(0)
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
        if name == "--find-links":
            message = "no folder or page is searched for wheels; name each by its path, as in ./wheels/name.whl"
            raise Unusable(message)
        if name in {"--pre", "--require-hashes"} and not value:
            yield Line(number, name)
        elif name in {"--index-url", "--extra-index-url", "--requirement", "--constraint"} and value:
            yield Line(number, name, value)
        else:
            message = f"the option {one_line(name, 60)!r} is not understood, or lacks its value"
            raise Unusable(message)
