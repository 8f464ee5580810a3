"""Fixtures that every test may ask for; they live in tests/servers/."""

pytest_plugins = [
    "tests.servers.environment",
    "tests.servers.backends",
    "tests.servers.registries",
    "tests.servers.mlflow",
    "tests.servers.mlflow_releases",
    "tests.servers.images",
    "tests.servers.containers",
    "tests.servers.small",
    "tests.builder_image",
]
