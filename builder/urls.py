"""URLs that every program parses alike: one canonical form; ambiguous ones are refused."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from builder.errors import InvalidSettings

_SHOWN = 200
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*")
# A drive's letter, or a network share: paths of Windows.
_OF_WINDOWS = re.compile(r"(?:file:/*)?(?:[A-Za-z]:[\\/]|\\\\)", re.IGNORECASE)
# Characters that some client does not read as part of a path.
_AMBIGUOUS = frozenset("%?#;\\")
_HTTP = frozenset({"http", "https", "mlflow-artifacts"})


class NotAnArtifactUri(InvalidSettings):
    """The text is not the address of an artifact folder, or can be read in two ways."""


@dataclass(frozen=True, slots=True)
class ArtifactUri:
    """The address of an artifact folder.

    Attributes:
        scheme: in lower case; `file` for a folder on a machine, however it was written.
        authority: the host, bucket or account, as it was written, but in lower case for a web server; empty if there
            is none.
        parts: the components of the path, none of them empty, `.` or `..`.
    """

    scheme: str
    authority: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ArtifactUri:
        """Return the address that `text` names: a URI, or a path on this machine.

        Raises:
            NotAnArtifactUri: it can be read in two ways, or not at all.
        """
        if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text):
            raise _refused(text, "it has a control character")
        if text != text.strip() or not text:
            raise _refused(text, "it is empty, or begins or ends with a blank")
        scheme, colon, _ = text.partition(":")
        if of_windows(text) or not (colon and _SCHEME.fullmatch(scheme)):
            return cls._local(text, unquote(text, errors="surrogateescape"))
        try:
            split = urlsplit(text)
        except ValueError as error:
            raise _refused(text, str(error)) from error
        if split.scheme == "file":
            if split.netloc not in {"", "localhost"} or "?" in text or "#" in text:
                raise _refused(text, "a file: URI has no host, query or fragment")
            return cls._local(text, unquote(split.path, errors="surrogateescape"))
        # In the authority as well: a client may end it elsewhere.
        if _AMBIGUOUS & set(text):
            raise _refused(text, "it has one of % ? # ; \\")
        authority = split.netloc.lower() if split.scheme in _HTTP else split.netloc
        return cls(split.scheme, authority, _parts(text, split.path))

    @classmethod
    def _local(cls, text: str, path: str) -> ArtifactUri:
        """Return the address of a folder on this machine; `path` has no percent-encodings any more."""
        if of_windows(text) or "\\" in path or "\0" in path:
            raise _refused(text, "it is a path of another kind of machine")
        if not path.startswith("/"):
            # MLflow's own defaults are relative, such as ./mlruns.
            path = f"{Path.cwd()}/{path.removeprefix('./')}"
        return cls("file", "", _parts(text, path))

    def __str__(self) -> str:
        """Return the URI, from its parts alone."""
        path = "/".join(self.parts)
        if self.scheme == "file":
            return Path(f"/{path}").as_uri()
        return f"{self.scheme}://{self.authority}/{path}" if self.authority else f"{self.scheme}:/{path}"

    @property
    def path(self) -> str:
        """The path with its leading slash."""
        return f"/{'/'.join(self.parts)}"

    def below(self, root: ArtifactUri) -> tuple[str, ...] | None:
        """Return the components that lead from `root` to here, none for `root` itself; None if this is elsewhere."""
        depth = len(root.parts)
        there = (self.scheme, self.authority, self.parts[:depth])
        return self.parts[depth:] if there == (root.scheme, root.authority, root.parts) else None


def parse_roots(text: str) -> tuple[ArtifactUri, ...]:
    """Return the artifact folders in a list with commas.

    Raises:
        NotAnArtifactUri: one of them is not an address, or has neither a host nor a path.
    """
    roots = tuple(ArtifactUri.parse(part.strip()) for part in text.split(",") if part.strip())
    for root in roots:
        if not root.authority and not root.parts:
            raise _refused(str(root), "it has neither a host nor a path")
    return roots


def of_windows(text: str) -> bool:
    """Return whether an artifact folder's address is a path of Windows."""
    return bool(_OF_WINDOWS.match(text))


def _parts(text: str, path: str) -> tuple[str, ...]:
    inner = path.strip("/") if path.startswith("/") and not path.startswith("//") else path.rstrip("/")
    parts = tuple(inner.split("/")) if inner else ()
    if any(part in {"", ".", ".."} for part in parts):
        raise _refused(text, "its path has a component that is empty, '.' or '..'")
    return parts


def _refused(text: str, why: str) -> NotAnArtifactUri:
    message = f"{text[:_SHOWN]!r} is not the address of an artifact folder: {why}."
    return NotAnArtifactUri(message, remedy="Write it plainly, such as s3://bucket/folder or /srv/artifacts.")


LONGEST = 2048
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MOST_PORT = 65_535
# Characters that a path or a query may have unescaped. Quotes, blanks, backslashes, `$`, `#`, `;`, `|` and brackets are
# not among them: they have a meaning of their own in requirements files, shells or TOML files.
_PLAIN = r"[A-Za-z0-9._~+,=:@!*()-]"
_ADDRESS = re.compile(
    rf"(?P<scheme>[A-Za-z]{{1,5}})://(?P<host>[A-Za-z0-9._-]{{1,255}}|\[[0-9A-Fa-f:.]{{2,45}}\])(?::(?P<port>[0-9]{{1,5}}))?"
    rf"(?P<path>(?:/(?:{_PLAIN}|%[0-9A-Fa-f]{{2}})*)*)(?:\?(?P<query>(?:{_PLAIN}|[/?&]|%[0-9A-Fa-f]{{2}})*))?"
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
# Encoded characters that every program reads alike: those that the name of a wheel or a folder may contain. A slash is
# another, unless it delimits a dot segment; an encoded dot, backslash or percent sign has no use but to deceive.
_ENCODED = frozenset(range(0x20, 0x7F)) - {ord(character) for character in " .%\\\"'$#?;<>`{|}^[]"}
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
# The characters of an address in an index's answer, without those that some parser drops or replaces.
_LINK = re.compile(r"[!-~]+")
_TWO_READINGS = re.compile(r"[\\\"<>^`{|}]")
_HIDDEN_DOTS = re.compile(r"(?:^|[/\\])(?:\.|%2e){1,2}(?:[/\\]|$)|%5c", re.IGNORECASE)


class Ambiguous(ValueError):
    """An address is malformed, or programs read it in different ways; the text says how."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A scheme, a host and a port: what a credential belongs to.

    Attributes:
        scheme: `http` or `https`.
        host: lower-case; an IPv6 address without brackets.
        port: a number, even if it is the scheme's default.
    """

    scheme: str
    host: str
    port: int


def canonical(text: str, *, query: bool = False) -> str:
    """Return an http(s) address in its canonical form, without a credential or a fragment.

    Args:
        text: the address, as it was written; a fragment is cut off.
        query: whether it may have a query.

    Raises:
        Ambiguous: it is not such an address, or programs read it in different ways.
    """
    address, _, _ = text.partition("#")
    if len(address) > LONGEST:
        message = f"the address is longer than {LONGEST:,} characters"
        raise Ambiguous(message)
    if "@" in address.partition("://")[2].partition("/")[0].partition("?")[0]:
        message = "its address contains a credential, which everybody can read here; move it to pip.conf or netrc"
        raise Ambiguous(message)
    parts = _ADDRESS.fullmatch(address)
    if not parts or parts["scheme"].lower() not in _DEFAULT_PORTS:
        message = (
            "it is not an https address of letters, digits and -._~+,=:@!*()/%, without blanks, quotes, backslashes "
            "and variables"
        )
        raise Ambiguous(message)
    if parts["query"] is not None and not query:
        message = "the address of an index has no '?'"
        raise Ambiguous(message)
    scheme, host = parts["scheme"].lower(), _host(parts["host"])
    path = _ESCAPE.sub(_escape, parts["path"])
    _check_segments(path)
    netloc = host + _port(scheme, parts["port"])
    suffix = "" if parts["query"] is None else "?" + _ESCAPE.sub(_escape, parts["query"])
    return f"{scheme}://{netloc}{path}{suffix}"


def origin_of(url: str) -> Origin | None:
    """Return the origin of an address; None if it has none, or programs disagree on it."""
    try:
        parts = urlsplit(url)
        host, port = _host(parts.netloc.rpartition("@")[2].removesuffix(f":{parts.port}")), parts.port
    except ValueError:
        return None
    default = _DEFAULT_PORTS.get(parts.scheme)
    return Origin(parts.scheme, host.strip("[]"), port or default) if default else None


def is_within(url: str, prefix: str) -> bool:
    """Return whether a canonical address is `prefix` or below it.

    Args:
        url: as `canonical` returns it.
        prefix: an address; one that is not canonical has nothing below it.
    """
    try:
        base = canonical(prefix).rstrip("/")
    except Ambiguous:
        return False
    plain = url.partition("?")[0].rstrip("/")
    return plain == base or plain.startswith(f"{base}/")


def linked(base: str, link: str) -> str | None:
    """Return the address that a page or a redirect leads to, without its fragment; None if it must not be followed.

    Links are the index's, and signed ones contain many characters; so this refuses only what changes the origin or the
    path in one reading and not in another: control characters, backslashes, encoded dots, credentials, odd hosts.

    Args:
        base: the address of what holds the link.
        link: the link, relative or whole.
    """
    if not _LINK.fullmatch(link) or _TWO_READINGS.search(link):
        return None
    try:
        parts = urlsplit(urljoin(base, link))
    except ValueError:
        return None
    url = parts._replace(fragment="").geturl()
    origin = origin_of(url)
    if origin is None or "@" in parts.netloc or _HIDDEN_DOTS.search(parts.path):
        return None
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == _DEFAULT_PORTS[origin.scheme] else f":{origin.port}"
    return parts._replace(scheme=origin.scheme, netloc=f"{host}{port}", fragment="").geturl()


def _host(text: str) -> str:
    """Return a host in its canonical form; numbers that some programs read as an IPv4 address are refused."""
    host = text.lower()
    try:
        if host.startswith("["):
            if "." in host:
                raise Ambiguous  # two ways to write one address
            return f"[{ipaddress.IPv6Address(host.removeprefix('[').removesuffix(']'))}]"
        labels = host.split(".")
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
            return str(ipaddress.IPv4Address(host))
    except ValueError as error:
        message = f"the host {host[:60]!r} is neither a name nor a plain IP address"
        raise Ambiguous(message) from error
    if not all(_LABEL.fullmatch(label) for label in labels):
        message = f"the host {host[:60]!r} is not a name of letters, digits, '-' and '.'"
        raise Ambiguous(message)
    return host


def _port(scheme: str, text: str | None) -> str:
    if text is None:
        return ""
    if text.startswith("0") or int(text) > _MOST_PORT:
        message = f"{text} is not a port"
        raise Ambiguous(message)
    return "" if int(text) == _DEFAULT_PORTS[scheme] else f":{text}"


def _escape(match: re.Match[str]) -> str:
    """Return an encoded character with upper-case digits."""
    if int(match[1], 16) not in _ENCODED:
        message = f"programs read %{match[1]} in an address in different ways"
        raise Ambiguous(message)
    return f"%{match[1].upper()}"


def _check_segments(path: str) -> None:
    for segment in _segments(path):
        if segment in {".", ".."}:
            message = "the address leaves its folder with '.' or '..'"
            raise Ambiguous(message)


def _segments(path: str) -> Iterator[str]:
    for part in path.split("/"):
        yield from part.split("%2F")
