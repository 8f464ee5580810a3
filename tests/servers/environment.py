"""The environment a test sees: the machine's own, without what would change what the program does."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from builder import masking
from builder.http import RetryPolicy
from builder.settings import Settings
from scripts.launch import ambient
from tests.patience import PATIENT
from tests.waiting import HANG

# What a publish leaves in this process for MLflow's client (`builder.domino`): a test's own authorities
# would be those of the next test, which may need the machine's.
_NETWORK = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in _NETWORK:
        before = os.environ.get(name)
        monkeypatch.setenv(name, before or "")  # what is set is remembered, and given back
        if before is None:
            monkeypatch.delenv(name)
    # A password of one test's is an ordinary word of the next one's.
    monkeypatch.setattr(masking, "_known", masking._Known())
    for name in list(os.environ):
        if ambient(name):
            monkeypatch.delenv(name)
    # Where the program sets a bound of its own, it leaves this one.
    for name, value in PATIENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("builder.clients._BASES_SECONDS", HANG)
    _run_no_image(monkeypatch)
    yield
    # As it is before `log.configure`: pytest puts its handler on each logger that tells no other, and a test that lets
    # such a one tell the others sees every line twice.
    ours = logging.getLogger("builder")
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)
    if "mlflow" in sys.modules:
        # `mlflow.set_tracking_uri` is kept in the module, and would lead the next test to this test's server.
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


def _run_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set SMOKE_TEST=off, in this process and for its children, wherever a test does not set it itself.

    Most images of the tests do not serve, and each would cost seconds.
    """
    monkeypatch.setenv("SMOKE_TEST", "off")
    read = Settings.from_environ.__func__  # type: ignore[attr-defined]

    def from_environ(cls, environ, *arguments, **options):
        return read(cls, {"SMOKE_TEST": "off", **environ}, *arguments, **options)

    monkeypatch.setattr(Settings, "from_environ", classmethod(from_environ))


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is taken and refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait hardly at all between two requests to a registry that is away."""
    monkeypatch.setattr("builder.clients.RetryPolicy", functools.partial(RetryPolicy, first=0.01, longest=0.05))
