"""Both methods give images that behave alike: one index may hold both, and nobody should notice which is which."""

from __future__ import annotations

import json

import pytest

from builder.publish import publish
from tests.package_index.server import running
from tests.servers.small import REQUIREMENTS


def environment(config):
    return dict(entry.partition("=")[::2] for entry in config["Env"])


@pytest.fixture(scope="module")
def served():
    """An index of what serving needs, by name: nothing is served here."""
    with running() as index:
        for name, version in (("mlflow-skinny", "3.17.2"), ("pandas", "2.0"), ("uvicorn", "1.0")):
            index.add(name, version)
        index.add("small-app", "1.0")
        yield index


@pytest.mark.parametrize("client", [True, False], ids=["client", "scoring server"])
def test_an_engine_s_image_and_an_assembled_one(small, small_settings, base_image, served, crane, runtime, client):
    model = small(
        REQUIREMENTS if client else f"{REQUIREMENTS}mlflow-skinny==3.17.2\n",
        files={"client/app.py": "print(1)\n" if client else None},
        tags={} if client else {"MODEL_ENTRY_POINT": ""},
    )
    configs, said = {}, {}
    for method in ("dockerfile", "wheels"):
        settings = small_settings(
            model,
            BASE_IMAGE=base_image,
            BUILD_METHOD=method,
            REGISTRY_URL=f"{base_image.partition('/')[0]}/{model.name}-{method}",
            UV_DEFAULT_INDEX=served.simple,
            WHEEL_BYTECODE="false",
        )
        reference = publish(settings).reference
        configs[method] = json.loads(crane("config", str(reference)))["config"]
        program = "import os, sys, small_app; print(sys.prefix, os.getcwd(), os.getuid(), small_app.__file__)"
        said[method] = runtime.output(reference, "python", "-c", program)
    engine, assembled = configs["dockerfile"], configs["wheels"]
    for field in ("User", "WorkingDir", "Cmd", "ExposedPorts"):
        assert engine[field] == assembled[field]
    assert environment(engine) == environment(assembled)
    assert said["dockerfile"] == said["wheels"]
    assert said["wheels"].startswith("/opt/model /app 10001 /opt/model/lib/python3.11/site-packages/small_app/")
