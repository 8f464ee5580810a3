"""The address of an artifact folder, read once, so that what is compared is what is asked.

MLflow, its plug-ins and the clients beneath them each read an address in their own way: one takes a backslash for a
slash, another undoes percent-encodings, a third drops what follows a `;`. So an address that can be read in two ways is
not one, and what is handed on is written anew from the parts.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from builder.errors import InvalidSettings

_SHOWN = 200
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*")
# A drive's letter, or a network share: paths of Windows.
_OF_WINDOWS = re.compile(r"(?:file:/*)?(?:[A-Za-z]:[\\/]|\\\\)", re.IGNORECASE)
# What some client reads as more than a character of a path.
_AMBIGUOUS = frozenset("%?#;\\")
_HTTP = frozenset({"http", "https", "mlflow-artifacts"})


class NotAnArtifactUri(InvalidSettings):
    """The text is not the address of an artifact folder, or can be read in two ways."""


@dataclass(frozen=True, slots=True)
class ArtifactUri:
    """The address of an artifact folder.

    Attributes:
        scheme: in lower case; `file` for a folder on a machine, however it was written.
        authority: the host, bucket or account, as it was written, in lower case where it is a web server's; empty for
            none.
        parts: the components of the path, none of them empty, `.` or `..`.
    """

    scheme: str
    authority: str
    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ArtifactUri:
        """Return the address that `text` is: a URI, or a path on this machine.

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
        # Also of the authority: a client may end it elsewhere.
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
        NotAnArtifactUri: one of them is not an address, or says nothing of where it is.
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
