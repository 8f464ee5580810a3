"""Both methods give images that behave alike: one index may hold both, and nobody should notice which is which."""

from __future__ import annotations

import json

import pytest

from builder.publish import publish
from tests.servers.small import REQUIREMENTS


def environment(config):
    return dict(entry.partition("=")[::2] for entry in config["Env"])


@pytest.mark.parametrize("client", [True, False], ids=["client", "scoring server"])
def test_an_engine_s_image_and_an_assembled_one(small, small_settings, base_image, packages, crane, runtime, client):
    # Nothing is served here, so that nothing of them is needed but their names.
    for name, version in (("mlflow-skinny", "3.17.2"), ("pandas", "2.0"), ("uvicorn", "1.0")):
        packages.add(name, version)
    model = small(
        REQUIREMENTS if client else f"{REQUIREMENTS}mlflow-skinny==3.17.2\n",
        files={} if client else {"client/app.py": None},
        tags={} if client else {"MODEL_ENTRY_POINT": ""},
    )
    configs, said = {}, {}
    for method in ("dockerfile", "wheels"):
        settings = small_settings(
            model,
            BASE_IMAGE=base_image,
            BUILD_METHOD=method,
            REGISTRY_URL=f"{base_image.partition('/')[0]}/{model.name}-{method}",
            PIP_INDEX_URL=packages.simple,
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
