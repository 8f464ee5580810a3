"""Patterns of ALLOWED_BASE_IMAGES: which base images a version may ask for.

A pattern is read as a reference is, host, path, tag and digest apart, and each part is compared with that of the
parsed reference. A pattern over the text would let `python:*` take `python:443/evil/image`, which is another registry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

from builder.errors import BuilderError, InvalidSettings
from builder.reference import DOCKER_HUB, Digest, Reference, canonical_host, full_path, is_host

_HOST = re.compile(r"(?P<name>(?:\*\.)?[a-z0-9][a-z0-9.-]*|\[[0-9a-f:]+\])(?::(?P<port>\*|[0-9]{1,5}))?")
_COMPONENT = re.compile(r"(?!\.+$)[a-z0-9._*?\[\]!-]+")
_TAG = re.compile(r"[A-Za-z0-9._*?\[\]!-]+")
_ANY = "*"
_BELOW = frozenset({_ANY, "**"})


@dataclass(frozen=True, slots=True)
class BasePattern:
    """One pattern, valid once constructed.

    In a component of the path and in the tag, `*`, `?` and `[…]` are those of fnmatch; none of them takes a slash.

    Attributes:
        host: name and perhaps port, as `canonical_host` writes it; `*.` in front takes every host below a domain, and
            `*` any port; empty for any host and any path.
        path: the path's components; a last one that is `*` takes everything below the others, at any depth.
        tag: empty where the pattern has none.
        digest: `*`, or the whole digest; empty where the pattern has none.
    """

    host: str
    path: tuple[str, ...]
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> BasePattern:
        """Return the pattern `[host[:port]/]path[:tag][@digest]`; Docker Hub's short names are filled in.

        Raises:
            InvalidSettings: it is none; the message says why.
        """
        name, at, digest = text.strip().partition("@")
        head, slash, tail = name.rpartition("/")
        tail, colon, tag = tail.partition(":")
        name = f"{head}{slash}{tail}"
        if (at and not digest) or (colon and not tag) or (tag and not _TAG.fullmatch(tag)):
            _refuse(text, "what stands behind ':' is no tag, or what stands behind '@' no digest")
        digest = _digest(text, digest)
        if name in _BELOW:
            return cls("", (_ANY,), tag, digest)
        host, slash, path = name.partition("/")
        if slash and "*" in host and not is_host(host):
            _refuse(text, f"{host!r} may be a host or a name at Docker Hub: write the host in front of it")
        if not slash or not is_host(host):
            host, path = DOCKER_HUB, name
        host = canonical_host(host)
        components = path.split("/")
        if path not in _BELOW:
            components = full_path(host, path).split("/")
        if not _HOST.fullmatch(host):
            _refuse(text, f"{host!r} is no registry's host")
        if not all(_COMPONENT.fullmatch(component) for component in components):
            _refuse(text, f"{path!r} is no repository's path")
        if "**" in components[:-1]:
            _refuse(text, "'**' stands for what is below, so it is the last part of a path")
        if components[-1] in _BELOW:
            components[-1] = _ANY
        return cls(host, tuple(components), tag, digest)

    def __str__(self) -> str:
        """Return the whole pattern."""
        name = "/".join((self.host, *self.path)) if self.host else _ANY
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{name}{tag}{digest}"

    def matches(self, reference: Reference) -> bool:
        """Return whether the pattern takes an image."""
        return self._takes_repository(reference) and self._takes_image(reference)

    def _takes_repository(self, reference: Reference) -> bool:
        if not self.host:
            return True
        mine, other = _HOST.fullmatch(self.host), _HOST.fullmatch(canonical_host(reference.repository.host))
        if mine is None or other is None:
            return False
        below = mine["name"].removeprefix(_ANY)
        if other["name"] != below and not (below != mine["name"] and other["name"].endswith(below)):
            return False
        if mine["port"] != other["port"] and not (mine["port"] == _ANY and other["port"]):
            return False
        path = tuple(reference.repository.path.split("/"))
        if self.path[-1] == _ANY and len(path) > len(self.path):
            path = path[: len(self.path)]
        return len(path) == len(self.path) and all(map(fnmatchcase, path, self.path))

    def _takes_image(self, reference: Reference) -> bool:
        digest = str(reference.digest or "")
        if self.digest:
            # The digest decides what is pulled; a tag beside it is a remark, which may still have to be there.
            right = bool(digest) and self.digest in {_ANY, digest}
            return right and (not self.tag or fnmatchcase(reference.tag, self.tag))
        if not self.tag or self.tag == _ANY:
            return True
        # With a digest the tag says nothing of what is pulled: it may be any image of the repository.
        return not digest and fnmatchcase(reference.tag, self.tag)


def _digest(text: str, digest: str) -> str:
    if digest in {"", _ANY}:
        return digest
    if digest == "sha256:*":
        return _ANY
    try:
        return str(Digest(digest))
    except BuilderError:
        _refuse(text, "a digest is 'sha256:' and 64 hexadecimal digits, or '*' for any")


def _refuse(text: str, why: str) -> NoReturn:
    message = f"{text[:300]!r} is not a pattern of images: {why}"
    remedy = "A pattern is [host[:port]/]path[:tag][@digest], such as quay.io/team/* or docker.io/library/python:3.*."
    raise InvalidSettings(message, remedy=remedy)
