"""The servers that a command talks to: MLflow and the registries, each opened once."""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from builder.domino import restored
from builder.http import Client, Closing, RetryPolicy
from builder.log import stage
from builder.models import Catalog
from builder.models.catalog import MlflowCatalog
from builder.oci.authn import Credential, Credentials
from builder.oci.registry import Registry
from builder.oci.transport import REGISTRY, Transport
from builder.reference import Reference
from builder.settings import CommonSettings, Settings

if TYPE_CHECKING:
    from builder.smoke import SmokeTests
    from builder.smoke.sidecar import Sidecar
    from builder.wheels.recipe import WheelsMethod


# To look up a base image, which a plan can do without.
_BASES_SECONDS = 20
# What a cloud, or an operator, sets for a workload identity; most publishers have none.
_IDENTITIES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AZURE_FEDERATED_TOKEN_FILE",
    "GCE_METADATA_HOST",
)


class Registries(Closing):
    """The clients of registries; a context manager that closes their connections. Thread-safe.

    Args:
        credentials: used at a registry's first challenge.
        ca_bundle: file of the authorities to trust, in PEM; None for the system's.
        proxies: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, those that are set.
        insecure: hosts reached over plain HTTP, beside loopback.
        policy: how often and how long a request is tried.

    Raises:
        InvalidSettings: the bundle or the address of a proxy cannot be used.
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
        self._client = Client(REGISTRY, ca_bundle=ca_bundle, proxies=proxies)

    @classmethod
    def from_settings(
        cls, settings: CommonSettings, *, docker_config: Path | None = None, policy: RetryPolicy | None = None
    ) -> Self:
        """Return the clients that settings describe.

        Args:
            settings: those of a phase; only `Settings` name a registry credential.
            docker_config: folder of a Docker config.json, in place of DOCKER_CONFIG.
            policy: how often and how long a request is tried.
        """
        explicit, credential, identity = "", None, None
        if isinstance(settings, Settings):
            docker_config = docker_config or settings.docker_config
            if settings.registry_user and settings.registry_token:
                explicit = settings.registry_url.host
                credential = Credential(settings.registry_user, settings.registry_token.get_secret_value())
            identity = _identity(settings)
        return cls(
            Credentials(explicit=explicit, credential=credential, docker_config=docker_config, identity=identity),
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

    def credential_of(self, host: str) -> tuple[str, bool]:
        """Return what names the credential of a host, empty for nothing, and whether it gives one.

        Raises:
            InvalidSettings: DOCKER_CONFIG's config.json cannot be used, or the helper that it names is not installed.
            PermissionRefused: the helper failed, or the cloud refuses the identity.
            ServiceUnavailable: the cloud does not answer.
        """
        source, found = self._credentials.source(host), self._credentials.for_host(host)
        return source or ("the workload identity" if found else ""), found is not None

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _identity(settings: Settings) -> Callable[[str], Credential | None] | None:
    """Return what finds credentials by a workload identity; None where there is no identity.

    It is for the hosts that the settings name: a Dockerfile may name any other of a cloud's.
    """
    variables = {name: value.get_secret_value() for name, value in settings.mlflow_variables.items()}
    variables["GCE_METADATA_HOST"] = settings.gce_metadata_host
    if not any(variables.get(name) for name in _IDENTITIES):
        return None
    from builder.oci.clouds import CloudIdentity

    find = CloudIdentity(variables=variables, ca_bundle=settings.ssl_cert_file, proxies=settings.proxies).for_host
    base = Reference.parse(settings.base_image.replace("{python_version}", "3.11"))
    hosts = {settings.registry_url.host, base.repository.host}
    hosts |= {pattern.host for pattern in settings.allowed_base_images}
    return lambda host: find(host) if host in hosts else None


@dataclass(frozen=True, kw_only=True)
class Services:
    """The clients of one command, each opened once, and not before it is used.

    Attributes:
        settings: what they are opened with.
        catalog: the model registry.
        registries: those of the images, and of the wheel layers.
        bases: the registries of base images, with few retries: an engine may reach them another way.
        in_pod: whether each phase is a container of a Pod, where a sidecar may run what is to be tested.
    """

    settings: Settings = field(repr=False)
    catalog: Catalog
    registries: Registries
    bases: Registries
    in_pod: bool = False

    @functools.cached_property
    def smoke_tests(self) -> SmokeTests:
        """The smoke tests, which run images before their tags move."""
        from builder.smoke import SmokeTests

        return SmokeTests(self.settings, runtimes=[self.sidecar] if self.sidecar else None)

    @functools.cached_property
    def sidecar(self) -> Sidecar | None:
        """The sidecar that runs the image; None where this is no Pod with one."""
        candidate = self.settings.smoke_test_candidate
        if candidate is None or not self.in_pod:
            return None
        from builder.smoke.runtime import native_platform
        from builder.smoke.sidecar import Sidecar

        registry = self.registries.for_host(candidate.repository.host)
        return Sidecar(registry, candidate, native_platform(), pod=platform.node())

    @functools.cached_property
    def wheels(self) -> WheelsMethod:
        """The wheels method."""
        # Its imports take a while, and most runs have nothing to do.
        with stage("imports"):
            from builder.wheels.recipe import WheelsMethod

        return WheelsMethod.from_settings(self.settings, self.registries)

    def close(self) -> None:
        """Close the clients that were opened on demand."""
        if "wheels" in self.__dict__:
            self.wheels.close()


@contextmanager
def connected(settings: Settings, *, in_pod: bool = False) -> Iterator[Services]:
    """Give clients for MLflow and for registries, and close them afterwards.

    Args:
        settings: what they are opened with.
        in_pod: whether each phase is a container of a Pod.
    """
    with restored(), ExitStack() as stack:
        registries = stack.enter_context(Registries.from_settings(settings))
        bases = stack.enter_context(
            Registries.from_settings(settings, policy=RetryPolicy(attempts=2, deadline=_BASES_SECONDS))
        )
        catalog = MlflowCatalog.from_settings(settings)
        services = Services(settings=settings, catalog=catalog, registries=registries, bases=bases, in_pod=in_pod)
        stack.callback(services.close)
        yield services
