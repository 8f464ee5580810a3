"""Package indexes in pip's and uv's own settings: which, with which credential, and what RUN steps see of them."""

from __future__ import annotations

import configparser
import hashlib
import io
import json
import netrc
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from builder.errors import InvalidSettings
from builder.http import is_named
from builder.reference import is_loopback
from builder.urls import Origin, is_within, linked, origin_of

if TYPE_CHECKING:
    from builder.settings import Network


def uv_config(network: Network) -> str:
    """Return the text of a uv.toml that names the indexes of the environment; empty where none is set.

    uv reads `/etc/uv/uv.toml` (https://docs.astral.sh/uv/concepts/configuration-files/). It has no setting for a CA
    bundle but the system's own certificates, which `native-tls` selects.
    """
    variables = network.index_variables
    default = variables.get("UV_DEFAULT_INDEX") or variables.get("UV_INDEX_URL") or ""
    extra = [url for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL") for url in variables.get(name, "").split()]
    lines = []
    if default:
        lines.append(f"index-url = {json.dumps(_NAMED.sub('', default))}")
    if extra:
        lines.append(f"extra-index-url = {json.dumps([_NAMED.sub('', url) for url in extra])}")
    return "\n".join([*lines, "native-tls = true", ""]) if lines else ""


# pip's own environment variables and the keys that they stand for (https://pip.pypa.io/en/stable/topics/configuration/).
_KEYS = {
    "PIP_INDEX_URL": "index-url",
    "PIP_EXTRA_INDEX_URL": "extra-index-url",
    "PIP_TRUSTED_HOST": "trusted-host",
}


def certificate(network: Network) -> Path | None:
    """Return the CA bundle that pip has to trust: the one that pip.conf names, else the network's; None for neither.

    Raises:
        InvalidSettings: pip.conf cannot be read, or names a file that does not exist.
    """
    named = _read(network).get("global", "cert", fallback="")
    if not named:
        return network.ca_bundle
    if not Path(named).is_file():
        message = f"PIP_CONFIG_FILE {network.pip_config} names the certificate file {named}, which does not exist."
        raise InvalidSettings(message, remedy="Name a file that the build phase can read, or set SSL_CERT_FILE.")
    return Path(named)


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a CA bundle to where every RUN step can read it, whatever user it runs as.

    Raises:
        InvalidSettings: it cannot be read.
    """
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        message = f"The CA bundle {source} cannot be read: {error.strerror}."
        raise InvalidSettings(message, remedy="Name a readable file of certificates in SSL_CERT_FILE.") from error
    target.chmod(0o644)


def default_index(variables: Mapping[str, str]) -> str:
    """Return the address of the index that uv's variables name as the default one; empty for none."""
    # UV_DEFAULT_INDEX may give it a name, as in `name=https://…`.
    default = variables.get("UV_DEFAULT_INDEX") or variables.get("UV_INDEX_URL") or ""
    return _NAMED.sub("", default)


def pip_config(network: Network, seen_certificate: str) -> str:
    """Return the text of a pip.conf; empty where there is nothing to say.

    Args:
        network: what the environment names.
        seen_certificate: the path under which a RUN step finds the file `certificate` names; empty for none.

    Raises:
        InvalidSettings: PIP_CONFIG_FILE cannot be read.
    """
    parser = _read(network)
    values = {key: network.index_variables[name] for name, key in _KEYS.items() if name in network.index_variables}
    named = any(parser.has_option("global", key) for key in ("index-url", "index_url"))
    if not named and "index-url" not in values and (default := default_index(network.index_variables)):
        # The built-in template installs with pip, so that pip gets the index of uv's variables. Further indexes are
        # left out: pip would take a package from any of them, where uv takes it from the first that has it.
        values["index-url"] = default
    if seen_certificate:
        values["cert"] = seen_certificate
    if values and not parser.has_section("global"):
        parser.add_section("global")
    for key, value in values.items():
        parser.set("global", key, "\n".join(value.split()) if key != "cert" else value)
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def pip_options(network: Network) -> dict[str, str]:
    """Return the options that pip.conf and pip's own environment variables give to `pip install`, by their long names.

    Raises:
        InvalidSettings: PIP_CONFIG_FILE cannot be read.
    """
    parser = _read(network)
    options = {
        key.replace("_", "-").removeprefix("--"): value
        for section in ("global", "install")
        if parser.has_section(section)
        for key, value in parser.items(section)
    }
    variables = network.index_variables.items()
    return options | {name[4:].lower().replace("_", "-"): value for name, value in variables if name.startswith("PIP_")}


def _read(network: Network) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    if network.pip_config is None:
        return parser
    try:
        parser.read_string(network.pip_config.read_text())
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        message = f"PIP_CONFIG_FILE {network.pip_config} cannot be read: {type(error).__name__}."
        raise InvalidSettings(message, remedy="Name a file in pip's own format.") from error
    return parser


FIRST_INDEX = "first-index"
STRATEGIES = frozenset({FIRST_INDEX, "unsafe-first-match", "unsafe-best-match"})
# UV_INDEX may give an index a name, as in `name=https://…`.
_NAMED = re.compile(r"^[A-Za-z0-9._-]+=(?=[a-z]+://)")
_SCHEME = re.compile(r"https?://", re.IGNORECASE)
# The characters of an index's address that no file which names it could take for its own.
WRITABLE = re.compile(r"(?:[A-Za-z0-9._~+,=:@!*()/?&\[\]-]|%[0-9A-Fa-f]{2})+")
# A host, perhaps with its port.
_TRUSTED = re.compile(r"[A-Za-z0-9._*\[\]:-]+")


@dataclass(frozen=True, slots=True)
class IndexUrl:
    """The address of an index: without its credential, which is kept beside it and never shown.

    Attributes:
        url: `http`, `https` or `file`; no user, no password, no fragment.
        user: user of the credential; empty for none.
        password: its password or token; empty for none.
        of_model: whether a model names it, and no setting does.
    """

    url: str
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    of_model: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        """Return the address without its credential."""
        return self.url

    @property
    def with_credential(self) -> str:
        """The address with its credential in it, for a file that only a child of ours reads."""
        if not self.user and not self.password:
            return self.url
        parts = urlsplit(self.url)
        secret = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@"
        return urlunsplit(parts._replace(netloc=f"{secret}{parts.netloc}"))

    @property
    def is_file(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.url.startswith("file:")

    @property
    def folder(self) -> Path:
        """The folder of this machine that it names."""
        return Path(unquote(urlsplit(self.url).path))

    @classmethod
    def parse(cls, text: str, variable: str) -> Self:
        """Return the address that a setting names.

        Args:
            text: an `http`, `https` or `file` URL, perhaps with a credential; a path of a folder.
            variable: the setting's name, for the error; the value may hold a credential and is not shown.

        Raises:
            InvalidSettings: it is not such an address.
        """
        if text.startswith("/"):
            return cls(Path(text).as_uri())
        text = text.strip()
        try:
            parts = urlsplit(text)
            if parts.scheme == "file" and parts.path.startswith("/") and not parts.netloc:
                return cls(Path(unquote(parts.path)).as_uri())
            plain = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/"), fragment="")
            url = linked("", plain.geturl()) if _SCHEME.match(text) and text.isascii() else None
        except ValueError:
            url = None
        if url is None or not WRITABLE.fullmatch(url) or not text.isprintable() or " " in text:
            message = f"{variable} is not the address of a package index."
            remedy = "Set an https address such as https://pypi.example.com/simple, with %20 for a space."
            raise InvalidSettings(message, remedy=remedy)
        return cls(url, unquote(parts.username or ""), unquote(parts.password or ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes:
    """The package indexes of a resolution, in their order of priority.

    Attributes:
        extra: used before the default one.
        default: used last; None for the one that pip and uv have built in.
        find_links: folders and pages that list wheels.
        no_index: whether only `find_links` are used.
        strategy: uv's index strategy: by default a package comes from the first index that has it at all, so that
            nobody can put a newer one of the same name elsewhere.
        trusted: hosts reached over plain HTTP, or whose certificate is not checked: pip's trusted-host.
        allowed: prefixes of the addresses that a model may name by itself; `*` for any.
        ca_bundle: file of the authorities to trust, in PEM; None for the system's.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
        netrc: file of credentials by host; None for none.
    """

    extra: tuple[IndexUrl, ...] = ()
    default: IndexUrl | None = None
    find_links: tuple[IndexUrl, ...] = ()
    no_index: bool = False
    strategy: str = FIRST_INDEX
    trusted: frozenset[str] = frozenset()
    allowed: tuple[str, ...] = ()
    ca_bundle: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict, repr=False)
    netrc: Path | None = None

    @classmethod
    def of(cls, network: Network, *, allowed: Sequence[str] = ()) -> Self:
        """Return the indexes that the environment and pip.conf name; uv's variables win over pip's.

        Args:
            network: what the environment names.
            allowed: prefixes of the addresses that a model may name by itself; `*` for any.

        Raises:
            InvalidSettings: PIP_CONFIG_FILE cannot be read, or an address is invalid or plain HTTP.
        """
        variables, pip = network.index_variables, pip_options(network)

        def urls(*values: tuple[str, str]) -> tuple[IndexUrl, ...]:
            found = [IndexUrl.parse(_NAMED.sub("", word), name) for name, text in values for word in text.split()]
            return tuple(dict.fromkeys(found))

        uv = [(name, variables.get(name, "")) for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL")]
        default = next(
            (
                (name, value)
                for name, value in (
                    ("UV_DEFAULT_INDEX", variables.get("UV_DEFAULT_INDEX")),
                    ("UV_INDEX_URL", variables.get("UV_INDEX_URL")),
                    ("index-url", pip.get("index-url")),
                )
                if value
            ),
            None,
        )
        strategy = variables.get("UV_INDEX_STRATEGY", FIRST_INDEX)
        if strategy not in STRATEGIES:
            message = "UV_INDEX_STRATEGY is not one of uv's index strategies."
            raise InvalidSettings(message, remedy=f"Set one of {', '.join(sorted(STRATEGIES))}.")
        links = urls(
            ("UV_FIND_LINKS", variables.get("UV_FIND_LINKS", "").replace(",", " ")),
            ("find-links", pip.get("find-links", "")),
        )
        indexes = cls(
            extra=urls(*uv, ("extra-index-url", pip.get("extra-index-url", ""))),
            default=urls(default)[0] if default else None,
            # pip goes on without a folder that is not there, uv does not.
            find_links=tuple(link for link in links if not link.is_file or link.folder.is_dir()),
            no_index=pip.get("no-index", "").strip().lower() in {"1", "true", "yes", "on"},
            strategy=strategy,
            trusted=frozenset(_trusted(pip.get("trusted-host", ""))),
            allowed=tuple(allowed),
            ca_bundle=certificate(network),
            proxies=network.proxies,
            netrc=network.netrc,
        )
        for index in indexes.all:
            indexes.check(index.url)
            if index.is_file and index not in indexes.find_links:
                message = "A package index is a folder of this machine."
                raise InvalidSettings(message, remedy="Name it as find-links in pip.conf.")
        return indexes

    @property
    def all(self) -> tuple[IndexUrl, ...]:
        """Every index, in order of priority, without the built-in one."""
        named = () if self.no_index else (*self.extra, *((self.default,) if self.default else ()))
        return (*named, *self.find_links)

    @property
    def identity(self) -> str:
        """A hash of the indexes and their order, without credentials: 64 hexadecimal digits."""
        what = [
            [str(url) for url in self.extra],
            str(self.default or ""),
            [str(url) for url in self.find_links],
            self.no_index,
            self.strategy,
        ]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every password, plain and encoded for a URL, to mask the output of other programs."""
        known = (self.authenticated(index) for index in self.all)
        passwords = [url.password or url.user for url in known]
        return tuple(form for word in passwords if word for form in (word, quote(word, safe="")))

    def check(self, url: str) -> None:
        """Raise InvalidSettings where an address is over plain HTTP and its host is not trusted with it."""
        parts = urlsplit(url)
        if parts.scheme == "http" and not self.trusts(parts.netloc) and not is_loopback(parts.netloc):
            message = f"The address of the package index at {parts.netloc} is plain HTTP."
            raise InvalidSettings(message, remedy="Use https, or add the host to PIP_TRUSTED_HOST.")

    def trusts(self, host: str) -> bool:
        """Return whether a host (perhaps with its port) is trusted without a certificate."""
        return is_named(host, self.trusted)

    def allows(self, url: str) -> bool:
        """Return whether a model may name an address: one that the settings allow, or that they name themselves.

        `*` allows no address that a credential would be sent to: that has to be named.

        Args:
            url: in its canonical form.
        """
        named = (*self.allowed, *(index.url for index in self.all if not index.of_model))
        return any(is_within(url, prefix) for prefix in named) or ("*" in self.allowed and not self.credential(url))

    def joined(self, urls: Sequence[str]) -> Self:
        """Return these with the indexes that a model names, which come first; known ones are not added."""
        known = {index.url for index in self.all}
        new = tuple(IndexUrl(url, of_model=True) for url in dict.fromkeys(urls) if url not in known)
        return replace(self, extra=(*new, *self.extra)) if new else self

    @property
    def configured(self) -> frozenset[Origin]:
        """The origins of the indexes that the settings name, and of the built-in one if it is used."""
        built_in = () if self.no_index or self.default else (built_in_index(),)
        found = (origin_of(index.url) for index in (*self.all, *built_in) if not index.of_model)
        return frozenset(origin for origin in found if origin)

    def is_settings_own(self, url: str) -> bool:
        """Return whether an address is at an origin that a setting names: as an index, or as what a model may name."""
        origin = origin_of(url)
        return origin is not None and (origin in self.configured or origin in map(origin_of, self.allowed))

    def credential(self, url: str) -> tuple[str, str] | None:
        """Return user and password for an address: those of an index at the same origin, else those of netrc.

        An entry of netrc is for hosts that the settings name, as an index or in ALLOWED_INDEXES, and `default` for
        hosts of indexes alone: any other address may be one that an author chose.

        Raises:
            InvalidSettings: netrc cannot be read.
        """
        origin = origin_of(url)
        if origin is None:
            return None
        for index in self.all:
            if (index.user or index.password) and origin_of(index.url) == origin:
                return index.user, index.password
        if self.netrc is None or not self.is_settings_own(url):
            return None
        try:
            hosts = netrc.netrc(str(self.netrc)).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
            message = f"{str(self.netrc)!r} cannot be read as a netrc file: {type(error).__name__}."
            raise InvalidSettings(message, remedy="Correct it, or name another file in NETRC.") from None
        named = {origin_of(index.url) for index in self.all if not index.of_model}
        found = hosts.get(origin.host) or (hosts.get("default") if origin in named else None)
        return (found[0] or found[1] or "", found[2] or "") if found else None

    def authenticated(self, index: IndexUrl) -> IndexUrl:
        """Return an index with its credential, for a program that reads no netrc.

        Raises:
            InvalidSettings: netrc cannot be read.
        """
        credential = None if index.is_file or index.user or index.password else self.credential(index.url)
        return replace(index, user=credential[0], password=credential[1]) if credential else index


def _trusted(text: str) -> Sequence[str]:
    """Return the hosts that pip's trusted-host names.

    Raises:
        InvalidSettings: an entry is not a host.
    """
    if not all(_TRUSTED.fullmatch(word) for word in text.split()):
        message = "PIP_TRUSTED_HOST, or trusted-host in pip.conf, has an entry that is not a host."
        raise InvalidSettings(message, remedy="Set a list of hosts, each with or without a port.")
    return text.split()


@lru_cache(maxsize=1)
def built_in_index() -> IndexUrl:
    """Return the index that uv takes where nothing else is named; its help says which."""
    from uv import find_uv_bin

    command = [find_uv_bin(), "pip", "compile", "--help"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env={}).stdout
    found = re.search(r"by default: <(https://[^>\s]+)>", said)
    if found is None:
        message = "uv does not say which package index it takes by default."
        raise InvalidSettings(message, remedy="Name the index: PIP_INDEX_URL or UV_DEFAULT_INDEX.")
    return IndexUrl(found[1])
