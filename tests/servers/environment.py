"""The environment a test sees: the machine's own, without what would change what the program does."""

from __future__ import annotations

import os
import re
import sys

import pytest

# Every variable that the program, MLflow, boto3 or an engine would take a setting from. What describes the machine's
# network (proxies, CA bundles, package indexes) stays: the servers and the builds need it.
_AMBIENT = re.compile(
    r"(?:MLFLOW|REGISTRY|DOMINO|TARGET|BUILD|MODEL|SWEEP|KUBERNETES|BUILDAH|STORAGE|TRUST|ALLOWED|INSECURE)_.*"
    r"|BUILDER_(?!TEST_).*|AWS_(?!CA_BUNDLE$).*"
    r"|DOCKER_CONFIG|BASE_IMAGE|WHEEL_LAYERS|SECRETS_DIR|LOG_FORMAT|LOG_LEVEL|TERMINATION_LOG|RESOLVE_AS_OF|NO_COLOR"
)


def ambient(name: str) -> bool:
    """Return whether the variable is one that no test may inherit."""
    return bool(_AMBIENT.fullmatch(name))


def clean_environ(**more: str) -> dict[str, str]:
    """Return the machine's environment for a child process of the tests, with `more` on top."""
    kept = {name: value for name, value in os.environ.items() if not ambient(name)}
    # A server that writes no bytecode compiles itself anew at every start.
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, **more}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in list(os.environ):
        if ambient(name):
            monkeypatch.delenv(name)
    yield
    if "mlflow" in sys.modules:
        # `mlflow.set_tracking_uri` is kept in the module, and would lead the next test to this test's server.
        import mlflow  # noqa: PLC0415 - imported already, or not needed

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
