"""The servers that a command talks to: MLflow and the registries, each opened once."""

from __future__ import annotations

import functools
import logging
import re
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from builder import __version__
from builder.errors import InvalidSettings
from builder.http import RetryPolicy, proxy_for
from builder.models.catalog import MlflowCatalog
from builder.models.domino import restored
from builder.models.version import Catalog
from builder.oci.authn import Credential, Credentials
from builder.oci.registry import Registry
from builder.oci.transport import Transport
from builder.settings import CommonSettings, Settings
from builder.smoke import SmokeTests

_TIMEOUT = httpx.Timeout(60, connect=15)
_LIMITS = httpx.Limits(max_connections=32, max_keepalive_connections=16, keepalive_expiry=30)


class Registries:
    """Gives the client of a registry; a context manager that closes their connections. For several threads.

    Args:
        credentials: asked when a registry asks.
        ca_bundle: file of the authorities to trust, in PEM; None for the system's.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
        insecure: hosts reached over plain HTTP, beside this machine's own.
        policy: how long a registry is waited for.

    Raises:
        InvalidSettings: the bundle is none, or a proxy's address.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        *,
        ca_bundle: Path | None = None,
        proxies: Mapping[str, str] | None = None,
        insecure: Iterable[str] = (),
        policy: RetryPolicy | None = None,
    ) -> None:
        self._credentials = credentials or Credentials()
        self._insecure = frozenset(insecure)
        self._policy = policy or RetryPolicy()
        self._lock = threading.Lock()
        self._registries: dict[str, Registry] = {}
        for name in ("httpx", "httpcore"):
            # They log whole URLs, and that of a redirect may be signed.
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = httpx.Client(
            transport=_Routes(_context(ca_bundle), dict(proxies or {})),
            trust_env=False,
            follow_redirects=False,
            timeout=_TIMEOUT,
            headers={"User-Agent": f"model-image-builder/{__version__}"},
        )
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    @classmethod
    def from_settings(
        cls, settings: CommonSettings, *, docker_config: Path | None = None, policy: RetryPolicy | None = None
    ) -> Self:
        """Return the registries that settings describe.

        Args:
            settings: those of a phase; only `Settings` name a registry credential.
            docker_config: folder of a Docker config.json, in place of DOCKER_CONFIG.
            policy: how long a registry is waited for.
        """
        explicit, credential = "", None
        if isinstance(settings, Settings):
            docker_config = docker_config or settings.docker_config
            if settings.registry_user and settings.registry_token:
                explicit = settings.registry_url.host
                credential = Credential(settings.registry_user, settings.registry_token.get_secret_value())
        return cls(
            Credentials(explicit=explicit, credential=credential, docker_config=docker_config),
            ca_bundle=settings.ssl_cert_file,
            proxies=settings.proxies,
            insecure=settings.insecure_registries,
            policy=policy,
        )

    def for_host(self, host: str) -> Registry:
        """Return the client of a registry, always the same for the same host."""
        with self._lock:
            if host not in self._registries:
                transport = Transport(
                    host,
                    client=self._client,
                    credentials=self._credentials,
                    insecure=self._insecure,
                    policy=self._policy,
                )
                self._registries[host] = Registry(transport)
            return self._registries[host]

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()


class _Routes(httpx.BaseTransport):
    """Sends each request directly, or through the proxy that the settings name for its host."""

    def __init__(self, context: ssl.SSLContext, proxies: Mapping[str, str]) -> None:
        self._proxies = proxies
        self._direct = httpx.HTTPTransport(verify=context, trust_env=False, limits=_LIMITS)
        self._through: dict[str, httpx.HTTPTransport] = {}
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            address = proxies.get(name, "")
            if address and address not in self._through:
                self._through[address] = _through(name, address, context)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        port = url.port or (443 if url.scheme == "https" else 80)
        proxy = proxy_for(url.scheme, url.host, port, self._proxies)
        return self._through.get(proxy, self._direct).handle_request(request)

    def close(self) -> None:
        for transport in (self._direct, *self._through.values()):
            transport.close()


def _through(name: str, address: str, context: ssl.SSLContext) -> httpx.HTTPTransport:
    try:
        proxy = _proxy(address, context)
    except (ValueError, httpx.InvalidURL):
        # The address may hold a password, so neither it nor the cause is shown.
        message = f"{name} is not the address of a proxy that can be used."
        raise InvalidSettings(message, remedy="It is a URL such as http://proxy.example.com:3128.") from None
    return httpx.HTTPTransport(verify=context, trust_env=False, limits=_LIMITS, proxy=proxy)


def _proxy(address: str, context: ssl.SSLContext) -> httpx.Proxy:
    url = httpx.URL(address if "://" in address else f"http://{address}")
    if url.scheme not in {"http", "https"} or not re.fullmatch(r"[A-Za-z0-9._:-]+", url.host):
        raise ValueError
    return httpx.Proxy(url, ssl_context=context if url.scheme == "https" else None)


@functools.lru_cache(maxsize=4)
def _context(bundle: Path | None) -> ssl.SSLContext:
    """Return what connections trust; to read the authorities takes 30 ms, so it is done once."""
    try:
        return ssl.create_default_context(cafile=str(bundle) if bundle else None)
    except (OSError, ssl.SSLError) as error:
        message = f"SSL_CERT_FILE is {str(bundle)!r}, which holds no certificates that can be read."
        raise InvalidSettings(message, remedy="It is a file of the authorities to trust, in PEM.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The clients that everything here talks through.

    Attributes:
        catalog: the model registry.
        registries: where images go, and what stands there.
        bases: the registries of base images, which an engine may reach another way: they are not waited for.
        smoke_tests: runs images before their tags move.
    """

    catalog: Catalog
    registries: Registries
    bases: Registries
    smoke_tests: SmokeTests


@contextmanager
def connected(settings: Settings) -> Iterator[Services]:
    """Give clients for MLflow and for registries, and close them afterwards."""
    with restored(), ExitStack() as stack:
        registries = stack.enter_context(Registries.from_settings(settings))
        bases = stack.enter_context(Registries.from_settings(settings, policy=RetryPolicy(attempts=2, deadline=20)))
        catalog = MlflowCatalog.from_settings(settings)
        yield Services(catalog=catalog, registries=registries, bases=bases, smoke_tests=SmokeTests(settings))
