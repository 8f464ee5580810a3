from __future__ import annotations

import pytest

from tests.patience import patient
from tests.waiting import HANG

__all__ = ["patient"]


@pytest.fixture(autouse=True)
def _patient_children(monkeypatch):
    """Give uv, and an interpreter that tells what it is, the time that a busy machine takes."""
    monkeypatch.setattr("builder.wheels.uv.HTTP_SECONDS", int(HANG))
    monkeypatch.setattr("builder.wheels.install._TELL_SECONDS", HANG)
