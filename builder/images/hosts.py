"""Registry hosts: their synonyms, which may be reached over plain HTTP, and which through a proxy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

from builder import reference

DOCKER_HUB = reference.DOCKER_HUB
# The host that serves Docker Hub's API, and the name under which Docker keeps its credential.
_DOCKER_HUB_API = "registry-1.docker.io"
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
canonical = reference.canonical_host


def api_host(host: str) -> str:
    """Return the host, with its port, that serves a registry's API."""
    return _DOCKER_HUB_API if canonical(host) == DOCKER_HUB else host


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


def is_named(host: str, names: Iterable[str]) -> bool:
    """Return whether `names` holds `host`, with its port or without."""
    name, _ = split(host)
    return any(host.lower() == entry.lower() or entry.lower() == name for entry in names)


def proxy_for(scheme: str, name: str, port: int, proxies: Mapping[str, str]) -> str:
    """Return the URL of the proxy to reach a host through; empty for none.

    NO_PROXY's entries are hosts, domains (with or without a leading dot, and all below them), addresses and networks,
    each perhaps with a port, or `*` for everything. This machine is never reached through a proxy.

    Args:
        scheme: `http` or `https`.
        name: the host's name or address, without brackets.
        port: the port.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
    """
    if is_loopback(f"[{name}]" if ":" in name else name):
        return ""
    if any(_excepts(entry.strip().lower(), name.lower(), port) for entry in proxies.get("NO_PROXY", "").split(",")):
        return ""
    return proxies.get("HTTPS_PROXY" if scheme == "https" else "HTTP_PROXY", "")


def _excepts(entry: str, name: str, port: int) -> bool:
    if not entry:
        return False
    if entry == "*":
        return True
    try:
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        try:
            return ipaddress.ip_address(name) in network
        except ValueError:
            return False
    domain, entry_port = split(entry)
    if entry_port and entry_port != str(port):
        return False
    domain = domain.removeprefix("*").lstrip(".")
    return name == domain or name.endswith(f".{domain}")
