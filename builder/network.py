"""The way to the network, as the settings describe it, for engines and package indexes."""

from __future__ import annotations

from builder.build.engine import Network
from builder.settings import BuildSettings, Settings


def network(settings: BuildSettings) -> Network:
    """Return how pulls, RUN steps and package indexes are reached; only `Settings` know a netrc file."""
    return Network(
        ca_bundle=settings.ssl_cert_file,
        pip_config=settings.pip_config_file,
        proxies=settings.proxies,
        index_variables={name: value.get_secret_value() for name, value in settings.index_variables.items()},
        insecure_registries=settings.insecure_registries,
        netrc=settings.netrc if isinstance(settings, Settings) else None,
    )
