"""Models of MLflow's flavors, logged by MLflow itself: published by their wheels, run, and asked for a prediction."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sklearn

from builder.publish import publish
from builder.settings import Settings
from scripts.launch import clean_environ
from scripts.machine import native_platform, pip_configuration

ROOT = Path(__file__).parent.parent
# Beside other tests, a model may take minutes until it serves.
ASK, changed = re.subn(r"\bSECONDS = [0-9]+\n", "SECONDS = 600\n", (ROOT / "examples" / "ask.py").read_text())
assert changed == 1
FLAVORS = ("sklearn", "xgboost", "lightgbm", "pyfunc", "by_value")


@pytest.fixture(scope="module")
def trained(mlflow_server):
    """What each flavor's model was registered as, a request and the prediction it must be answered with."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train_flavors", "flavor-", *FLAVORS],
        check=False,
        text=True,
        capture_output=True,
        cwd=ROOT,
        env=clean_environ(MLFLOW_TRACKING_URI=mlflow_server.uri),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def base_with_openmp(base_image, crane, tmp_path_factory):
    """The base image with GNU's OpenMP, which LightGBM's wheel does not bring; it is taken from scikit-learn's."""
    (library,) = Path(sklearn.__file__).parent.parent.glob("scikit_learn.libs/libgomp*")
    archive = tmp_path_factory.mktemp("openmp") / "layer.tar"
    with tarfile.open(archive, "w") as layer:
        layer.add(library, f"usr/lib/{platform.machine()}-linux-gnu/libgomp.so.1")
    reference = base_image.replace("base/python", "base/python-with-openmp")
    crane("append", "--base", base_image, "--platform", native_platform(), "--new_layer", str(archive), "-t", reference)
    return reference


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_container_predicts_what_the_model_predicts(
    trained, flavor, mlflow_server, registry, base_with_openmp, runtime, crane, tmp_path
):
    model = trained[flavor]
    environ = {
        **clean_environ(**pip_configuration()),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        # All flavors share one repository of wheel layers.
        "REGISTRY_URL": f"{registry.host}/flavors",
        "BASE_IMAGE": base_with_openmp,
        "MODEL_NAME": model["name"],
        "MODEL_VERSION": "1",
        "BUILDER_WORKSPACE": str(tmp_path),
    }
    published = publish(Settings.from_environ(environ))
    with runtime.started(published.reference) as container:
        answer = json.loads(container.python(ASK, model["body"]))
        # Not the whole package, which serving never imports.
        assert container.python("import importlib.util as u; print(u.find_spec('sqlalchemy'))") == "None\n"
    flat = [np.ravel(each).tolist() for each in (answer["predictions"], model["prediction"])]
    assert flat[0] == pytest.approx(flat[1])
