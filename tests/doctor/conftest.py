"""One check of `builder doctor`, with the settings of an environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from builder.doctor import Check, Finding
from builder.doctor.checklist import CHECKS
from builder.doctor.surroundings import surroundings
from builder.http import RetryPolicy
from builder.settings import DoctorSettings
from scripts.launch import clean_environ
from tests.package_index.server import PackageIndex
from tests.servers.mlflow import MlflowServer
from tests.servers.registries import RegistryServer
from tests.waiting import HANG, LONG_HANG

# As patient with a server that is slow as it is with none.
_PATIENT = RetryPolicy(attempts=2, deadline=HANG, unanswered=1)


@pytest.fixture
def environ(mlflow_server: MlflowServer, registry: RegistryServer, packages: PackageIndex, tiny_base: str):
    """The environment of a doctor that finds nothing wrong."""
    return {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/doctor",
        "BASE_IMAGE": tiny_base,
        "UV_DEFAULT_INDEX": packages.simple,
        "TARGET_TAG": "EXTERNAL_TARGET_DOCTOR",
        "SMOKE_TEST": "off",
        "PATH": os.environ["PATH"],
    }


@pytest.fixture
def look(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finding]:
    """Return what one check finds, in that environment with some variables changed; empty ones are not set."""
    for module in ("surroundings", "machine"):
        monkeypatch.setattr(f"builder.doctor.{module}.POLICY", _PATIENT)

    def found(name: str, *, in_pod: bool = False, check: Callable | None = None, **changes: str) -> Finding:
        settings = DoctorSettings.from_environ({**environ, **changes})
        with surroundings(settings, in_pod=in_pod) as around:
            run = check or dict(CHECKS)[name]
            return Check(name=name, look=lambda: run(around)).run()

    return found


@pytest.fixture
def doctor(environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `builder doctor` in that environment with some variables changed, without a cluster unless one is named."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "builder", "doctor", f"--timeout={HANG:.0f}", *arguments]
        nothing = {"NO_COLOR": "1", "KUBECONFIG": "/nonexistent/kubeconfig"}
        variables = clean_environ(**{**nothing, **environ, **changes})
        return subprocess.run(argv, check=False, capture_output=True, text=True, env=variables, timeout=LONG_HANG)

    return run
