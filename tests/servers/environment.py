"""The environment a test sees: the machine's own, without what would change what the program does."""

from __future__ import annotations

import functools
import os
import sys

import pytest

from builder import masking
from builder.images.retry import Patience
from scripts.launch import ambient


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    # A password of one test's is an ordinary word of the next one's.
    monkeypatch.setattr(masking, "_known", masking._Known())
    for name in list(os.environ):
        if ambient(name):
            monkeypatch.delenv(name)
    yield
    if "mlflow" in sys.modules:
        # `mlflow.set_tracking_uri` is kept in the module, and would lead the next test to this test's server.
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait hardly at all between two requests to a registry that is away."""
    monkeypatch.setattr("builder.images.registries.Patience", functools.partial(Patience, first=0.01, longest=0.05))
