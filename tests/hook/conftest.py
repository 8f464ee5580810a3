"""A Domino whose runs can publish, and a listener beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hook.responder import Responder, responding
from tests.patience import PATIENT
from tests.servers.domino import Domino
from tests.servers.registries import RegistryServer

ROOT = Path(__file__).parents[2]
HOOK = f"{sys.executable} -m builder hook"
# What a data scientist's run does: it logs a model, registers it, and selects it.
TRAIN = """\
import os, sys
from tests.servers.small import small_files
from tests.versions import register
name, dockerfile, tag = (sys.argv[1:] + ["", ""])[:3]
more = {"templates/Dockerfile.template": "FROM scratch\\n"} if dockerfile else {}
done = register(os.environ["MLFLOW_TRACKING_URI"], small_files(**more), name=name,
                tags={"EXTERNAL_TARGET_PLTR_FOUNDRY": tag or "true"})
print("registered", done.name, done.version)
"""


@pytest.fixture
def responder() -> Iterator[Responder]:
    """A listener that answers what it is told to."""
    with responding() as running:
        yield running


@pytest.fixture
def train(domino: Domino) -> Callable[..., str]:
    """Return the command of a run that registers a version."""
    (domino.root / "train.py").write_text(TRAIN)
    domino.environ["PYTHONPATH"] = str(ROOT)
    domino.environ.update(PATIENT)
    return lambda *arguments: " ".join([sys.executable, "train.py", *(f"'{each}'" for each in arguments)])


@pytest.fixture
def with_registry(domino: Domino, registry: RegistryServer, packages, tiny_base: str, tmp_path: Path) -> str:
    """Let the runs reach a registry, and return the namespace of this test in it."""
    namespace = f"{registry.host}/{tmp_path.name.lower().replace('_', '-')}"
    domino.environ |= {"REGISTRY_URL": namespace, "BASE_IMAGE": tiny_base, "UV_DEFAULT_INDEX": packages.simple}
    domino.environ["SMOKE_TEST"] = "off"
    return namespace
