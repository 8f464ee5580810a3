"""Requests that wait as long as a busy server takes: where one is repeated, a test that counts fails."""

from __future__ import annotations

import httpx2
import pytest

from tests.waiting import HANG

# For MLflow's client in another process: a version is not made twice.
PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": f"{HANG:.0f}"}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """For conftest.py of a folder: its tests ask servers that answer."""
    for name in ("builder.http._TIMEOUT", "builder.oci.transport._UPLOAD_TIMEOUT"):
        monkeypatch.setattr(name, httpx2.Timeout(HANG))
