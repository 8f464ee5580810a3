"""Fixtures that every test may ask for; they live in tests/servers/."""

from hypothesis import HealthCheck, settings

# How long an example takes is a matter of what else the machine does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

pytest_plugins = [
    "tests.servers.environment",
    "tests.servers.backends",
    "tests.servers.registries",
    "tests.servers.mlflow",
    "tests.servers.mlflow_releases",
    "tests.servers.domino",
    "tests.servers.interpreters",
    "tests.servers.images",
    "tests.servers.containers",
    "tests.servers.small",
    "tests.builder_image",
]
