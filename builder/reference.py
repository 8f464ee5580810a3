"""Names of images: registry, repository, reference, digest, platform; and patterns of allowed base images.

A pattern is parsed as a reference is: host, path, tag and digest apart, and each part is compared with that of the
parsed reference. A pattern over the text would let `python:*` take `python:443/evil/image`, which is another registry.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import unicodedata
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from ipaddress import IPv6Address
from typing import NoReturn

from builder.errors import BuilderError, InvalidSettings, InvalidVersion

_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_WORD = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
# The platforms that images are made for, with the variants that OCI and containerd define beside the default one. The
# sources are https://github.com/opencontainers/image-spec, "Platform variants", and containerd's platforms package.
_VARIANTS = {
    "386": (),
    "amd64": ("v2", "v3", "v4"),
    "arm": ("v5", "v6", "v7", "v8"),
    "arm64": ("v9",),
    "loong64": (),
    "mips": (),
    "mips64": (),
    "mips64le": (),
    "mipsle": (),
    "ppc64": (),
    "ppc64le": (),
    "riscv64": ("rva20u64", "rva22u64", "rva23u64"),
    "s390x": (),
}
_MOST_PLATFORMS = 32

# A name that is not a valid component by itself becomes `<slug>--x<hash>`; one that already looks like that is hashed
# as well, so that no two names collide.
_HASHED = re.compile(r"--x[0-9a-f]{20}$")
_SLUG_LENGTH = 80
_PLAIN_LENGTH = 128
RESERVED = frozenset({"wheel-layers"})
DOCKER_HUB = "docker.io"
_DOCKER_HUB_NAMES = frozenset({DOCKER_HUB, "registry-1.docker.io", "index.docker.io"})
_PORT = re.compile(r":([0-9]{1,5})$")
_DEFAULT_PORTS = frozenset({80, 443})


@dataclass(frozen=True, slots=True)
class Digest:
    """A content digest, `sha256:` and 64 hexadecimal digits."""

    value: str

    def __post_init__(self) -> None:
        """Refuse a malformed value."""
        if not _DIGEST.fullmatch(self.value):
            message = f"{self.value!r} is not a digest."
            raise InvalidVersion(message, remedy="A digest is 'sha256:' and 64 hexadecimal digits.")

    def __str__(self) -> str:
        """Return `sha256:…`."""
        return self.value

    @property
    def hex(self) -> str:
        """The 64 hexadecimal digits."""
        return self.value.removeprefix("sha256:")

    @classmethod
    def of(cls, content: bytes) -> Digest:
        """Return the digest of `content`."""
        return cls(f"sha256:{hashlib.sha256(content).hexdigest()}")


@dataclass(frozen=True, slots=True, order=True)
class Platform:
    """An operating system, an architecture and perhaps a variant, as in an image index."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Return the platform that `os/architecture[/variant]` names.

        Synonyms become the index's own words (`x86_64` is `amd64`, `aarch64` is `arm64`), and arm's and arm64's
        default variants are those that containerd normalises to: `linux/arm` is `linux/arm/v7`, `linux/arm64/v8` is
        `linux/arm64`.

        The platform need not exist, since image indexes of others may name any. `parse_platforms` checks that.

        Raises:
            InvalidVersion: the text has another form.
        """
        parts = text.strip().lower().split("/")
        if len(parts) not in {2, 3} or not all(_WORD.fullmatch(part) for part in parts):
            message = f"{text[:100]!r} is not a platform."
            raise InvalidVersion(
                message, remedy="A platform is os/architecture or os/architecture/variant: linux/amd64."
            )
        system, architecture, variant = (*parts, "")[:3]
        architecture = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm"}.get(
            architecture, architecture
        )
        if architecture == "arm" and not variant:
            variant = "v7"
        if (architecture, variant) in {("arm64", "v8"), ("amd64", "v1")}:
            variant = ""
        return cls(system, architecture, variant)

    def __str__(self) -> str:
        """Return `os/architecture[/variant]`."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def folder(self) -> str:
        """The name of this platform's layout folder: `linux-arm-v7`."""
        return str(self).replace("/", "-")


def parse_platforms(text: str) -> tuple[Platform, ...]:
    """Return the platforms of a comma-separated list, each once, in the order of the list.

    Raises:
        InvalidVersion: one is not a platform that images can be made for; there is none, or there are more than 32.
    """
    parts = [part for part in text.split(",") if part.strip()]
    if not parts or len(parts) > _MOST_PLATFORMS:
        message = f"{text[:100]!r} names no platform." if not parts else f"The list names {len(parts):,} platforms."
        remedy = f"Name one or more, at most {_MOST_PLATFORMS}, separated by commas: linux/amd64,linux/arm64."
        raise InvalidVersion(message, remedy=remedy)
    platforms = dict.fromkeys(Platform.parse(part) for part in parts)
    for platform in platforms:
        known = _VARIANTS.get(platform.architecture) if platform.os == "linux" else None
        if known is None or platform.variant not in ("", *known):
            message = f"{platform} is not a platform that images can be made for."
            there = ", ".join(
                f"linux/{name} (/{', /'.join(variants)})" if variants else f"linux/{name}"
                for name, variants in _VARIANTS.items()
            )
            raise InvalidVersion(message, remedy=f"Supported are {there}.")
    return tuple(platforms)


def split(host: str) -> tuple[str, str]:
    """Return a host's name and its port ("" where it has none); an IPv6 address loses its brackets."""
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, ""
    return name.strip("[]").lower(), port


def is_loopback(host: str) -> bool:
    """Return whether `host` (perhaps with a port) is this machine by its name alone, without asking a name server."""
    name, _ = split(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def canonical_host(host: str) -> str:
    """Return the one name of a registry host, lower-case: Docker Hub has several."""
    host = host.lower()
    return DOCKER_HUB if host in _DOCKER_HUB_NAMES else host


def _one_host(host: str) -> tuple[str, int]:
    """Return a name and a port to compare hosts by; the port is 0 for a default one."""
    written = _PORT.search(host)
    port = int(written[1]) if written else 0
    name = canonical_host(_PORT.sub("", host))
    with suppress(ValueError):
        name = str(IPv6Address(name.strip("[]")))
    return name, 0 if port in _DEFAULT_PORTS else port


@dataclass(frozen=True, slots=True)
class Repository:
    """A registry host (with its port) and a repository's path in it.

    `parse_prefix` and `Reference.parse` give the host its one name: lower-case, and `docker.io` for Docker Hub.
    """

    host: str
    path: str

    def __str__(self) -> str:
        """Return `host/path`."""
        return f"{self.host}/{self.path}" if self.path else self.host

    @classmethod
    def parse_prefix(cls, text: str) -> Repository:
        """Return what a REGISTRY_URL names: a host and an optional namespace.

        Raises:
            InvalidSettings: there is a scheme, a tag, a credential, or a character that no reference may have.
        """
        remedy = "It is a host and an optional namespace, without a scheme, tag or credential: quay.io/domino."
        host, _, path = text.strip().rstrip("/").partition("/")
        if "://" in text or "@" in text or not _HOST.fullmatch(host):
            # The value may hold a credential, so it is not shown.
            message = "it is not a registry"
            raise InvalidSettings(message, remedy=remedy)
        if path and not all(_COMPONENT.fullmatch(part) for part in path.split("/")):
            message = f"the namespace {path!r} is not lower-case words joined by '.', '_' or '-'."
            raise InvalidSettings(message, remedy=remedy)
        return cls(canonical_host(host), path)

    def holds(self, other: Repository) -> bool:
        """Return whether `other` is this repository or lies below it, however its host and port are written."""
        mine, others = (_one_host(repository.host) for repository in (self, other))
        return mine == others and f"{other.path}/".startswith(f"{self.path}/" if self.path else "")

    def child(self, component: str) -> Repository:
        """Return the repository below this one, named by one path component."""
        return replace(self, path=f"{self.path}/{component}" if self.path else component)

    def tag(self, tag: str) -> Reference:
        """Return the reference of a tag in this repository."""
        return Reference(self, tag=tag)

    def digest(self, digest: Digest) -> Reference:
        """Return the reference of a digest in this repository."""
        return Reference(self, digest=digest)


@dataclass(frozen=True, slots=True)
class Reference:
    """A repository with a tag, a digest, or both; valid once constructed."""

    repository: Repository
    tag: str = ""
    digest: Digest | None = None

    def __post_init__(self) -> None:
        """Refuse a tag that is not one, and a reference without tag and digest."""
        if self.tag and not _TAG.fullmatch(self.tag):
            message = f"{self.tag!r} is not a tag."
            raise InvalidVersion(message, remedy="A tag has at most 128 letters, digits, '_', '.' and '-'.")
        if not self.tag and self.digest is None:
            message = f"{self.repository} has neither a tag nor a digest."
            raise InvalidVersion(message, remedy="Name one: repository:tag or repository@sha256:….")

    def __str__(self) -> str:
        """Return `host/path[:tag][@digest]`."""
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"

    @property
    def target(self) -> str:
        """The name for a manifest request: the digest if there is one, else the tag."""
        return str(self.digest) if self.digest else self.tag

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return the reference that a user or a Dockerfile wrote, with Docker's defaults filled in.

        `python:3.11-slim` is `docker.io/library/python:3.11-slim`; without tag and digest the tag is `latest`.

        Raises:
            InvalidVersion: the text is not a reference.
        """
        remedy = "A reference is [host[:port]/]repository[:tag][@sha256:…]."
        name, at, digest = text.strip().partition("@")
        head, slash, tail = name.rpartition("/")
        tail, colon, tag = tail.partition(":")
        name = f"{head}{slash}{tail}"
        host, slash, path = name.partition("/")
        if not slash or not is_host(host):
            host, path = DOCKER_HUB, name
        host = canonical_host(host)
        path = full_path(host, path)
        well_formed = _HOST.fullmatch(host) and all(_COMPONENT.fullmatch(part) for part in path.split("/"))
        if not well_formed or (colon and not tag) or (at and not digest):
            message = f"{text[:300]!r} is not an image reference."
            raise InvalidVersion(message, remedy=remedy)
        if not tag and not digest:
            tag = "latest"
        return cls(Repository(host, path), tag=tag, digest=Digest(digest) if digest else None)


def is_host(component: str) -> bool:
    """Return whether the first of several components of an image's name is a host, by Docker's rule."""
    return "." in component or ":" in component or component.lower() == "localhost"


def full_path(host: str, path: str) -> str:
    """Return a repository's whole path: Docker Hub's own images are below `library/`, which users omit."""
    return f"library/{path}" if host == DOCKER_HUB and "/" not in path else path


def ascii_of(text: str) -> str:
    """Return what is left of a text in ASCII: letters without their accents, and nothing of other scripts."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def repository_component(model_name: str, reserved: Collection[str] = ()) -> str:
    """Return the repository component for a registered model's name.

    A name that is a valid component stays as it is. Any other becomes a readable slug and a hash of the name, so that
    the mapping is deterministic and two different names never share a repository (80 bits of SHA-256).

    Args:
        model_name: any string that MLflow takes for a registered model.
        reserved: components that no model may have, beside `RESERVED`.
    """
    plain = (
        len(model_name) <= _PLAIN_LENGTH
        and _COMPONENT.fullmatch(model_name)
        and not _HASHED.search(model_name)
        and model_name not in RESERVED
        and model_name not in reserved
    )
    if plain:
        return model_name
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_of(model_name).lower())[:_SLUG_LENGTH].strip("-") or "model"
    digest = hashlib.sha256(model_name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug}--x{digest[:20]}"


_HOST_PATTERN = re.compile(r"(?P<name>(?:\*\.)?[a-z0-9][a-z0-9.-]*|\[[0-9a-f:]+\])(?::(?P<port>\*|[0-9]{1,5}))?")
_COMPONENT_PATTERN = re.compile(r"(?!\.+$)[a-z0-9._*?\[\]!-]+")
_TAG_PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]+")
_ANY = "*"
_BELOW = frozenset({_ANY, "**"})


@dataclass(frozen=True, slots=True)
class BasePattern:
    """One pattern, valid once constructed.

    In a component of the path and in the tag, `*`, `?` and `[…]` are those of fnmatch; none of them matches a slash.

    Attributes:
        host: name and perhaps port, as `canonical_host` writes it; a leading `*.` matches every host below a domain,
            and `*` any port; empty for any host and any path.
        path: the path's components; if the last one is `*`, it matches everything below the others, at any depth.
        tag: empty if the pattern has none.
        digest: `*`, or the whole digest; empty if the pattern has none.
    """

    host: str
    path: tuple[str, ...]
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> BasePattern:
        """Return the pattern `[host[:port]/]path[:tag][@digest]`; Docker Hub's short names are filled in.

        Raises:
            InvalidSettings: it is not a pattern; the message says why.
        """
        name, at, digest = text.strip().partition("@")
        head, slash, tail = name.rpartition("/")
        tail, colon, tag = tail.partition(":")
        name = f"{head}{slash}{tail}"
        if (at and not digest) or (colon and not tag) or (tag and not _TAG_PATTERN.fullmatch(tag)):
            _refuse(text, "the text after ':' is not a tag, or the text after '@' is not a digest")
        digest = _digest(text, digest)
        if name in _BELOW:
            return cls("", (_ANY,), tag, digest)
        host, slash, path = name.partition("/")
        if slash and "*" in host and not is_host(host):
            _refuse(text, f"{host!r} may be a host or a name at Docker Hub: write the host before it")
        if not slash or not is_host(host):
            host, path = DOCKER_HUB, name
        host = canonical_host(host)
        components = path.split("/")
        if path not in _BELOW:
            components = full_path(host, path).split("/")
        if not _HOST_PATTERN.fullmatch(host):
            _refuse(text, f"{host!r} is not a registry's host")
        if not all(_COMPONENT_PATTERN.fullmatch(component) for component in components):
            _refuse(text, f"{path!r} is not a repository's path")
        if "**" in components[:-1]:
            _refuse(text, "'**' matches everything below, so it has to be the last part of a path")
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
        """Return whether the pattern matches an image."""
        return self._matches_repository(reference) and self._matches_image(reference)

    def _matches_repository(self, reference: Reference) -> bool:
        if not self.host:
            return True
        mine, other = (
            _HOST_PATTERN.fullmatch(self.host),
            _HOST_PATTERN.fullmatch(canonical_host(reference.repository.host)),
        )
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

    def _matches_image(self, reference: Reference) -> bool:
        digest = str(reference.digest or "")
        if self.digest:
            # The digest decides which image is pulled; a tag beside it is only a remark, but may be required.
            same = bool(digest) and self.digest in {_ANY, digest}
            return same and (not self.tag or fnmatchcase(reference.tag, self.tag))
        if not self.tag or self.tag == _ANY:
            return True
        # With a digest, the tag does not say which image is pulled: it may be any of the repository.
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
