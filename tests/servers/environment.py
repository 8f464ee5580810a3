"""The environment a test sees: the machine's own, without what would change what the program does."""

from __future__ import annotations

import os
import sys

import pytest

from scripts.launch import ambient


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in list(os.environ):
        if ambient(name):
            monkeypatch.delenv(name)
    yield
    if "mlflow" in sys.modules:
        # `mlflow.set_tracking_uri` is kept in the module, and would lead the next test to this test's server.
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
