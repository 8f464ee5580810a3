"""What serving needs of MLflow: which requirements, and that a model is really served with no more than those."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import pytest
from packaging.version import Version

from builder.dockerfile.engine import machine_platform
from builder.model_folder import server_of
from builder.package_index.client import IndexClient
from builder.wheels.inputs import for_serving
from builder.wheels.requirements import Requirements
from builder.wheels.resolve import lock
from tests.package_index.server import machine_indexes
from tests.waiting import LONG_HANG


def served(*lines, logged="", **options):
    return for_serving(Requirements.of(*lines, mlflow_version=logged), **options).to_text().splitlines()


def wanted(lines):
    return [line for line in lines if not line.startswith("--")]


@pytest.mark.parametrize(
    ("lines", "logged", "expected"),
    [
        (
            ["mlflow==3.17.2", "scikit-learn==1.9.1"],
            "3.17.2",
            ["mlflow-skinny==3.17.2", "pandas", "scikit-learn==1.9.1", "uvicorn"],
        ),
        (["mlflow==3.17.2", "pandas==3.1.1"], "3.17.2", ["mlflow-skinny==3.17.2", "pandas==3.1.1", "uvicorn"]),
        (["mlflow==2.20.1"], "2.20.1", ["flask", "gunicorn", "mlflow-skinny==2.20.1", "pandas"]),
        (["mlflow[databricks]==3.1.0"], "3.1.0", ["mlflow-skinny[databricks]==3.1.0", "pandas", "uvicorn"]),
        (["mlflow"], "3.1.0", ["mlflow-skinny==3.1.0", "pandas", "uvicorn"]),
        (["mlflow>=2,<3"], "3.1.0", ["mlflow-skinny<3,>=2", "pandas", "uvicorn"]),
        (["mlflow==2.*"], "2.20.0", ["flask", "gunicorn", "mlflow-skinny==2.20.0", "pandas"]),
        (["mlflow; python_version < '4'"], "", ['mlflow-skinny; python_version < "4"', "pandas", "uvicorn"]),
        (["mlflow-skinny==3.1.0", "numpy"], "3.1.0", ["mlflow-skinny==3.1.0", "numpy", "pandas", "uvicorn"]),
        (["numpy"], "2.19.0", ["flask", "gunicorn", "mlflow-skinny==2.19.0", "numpy", "pandas"]),
        (["numpy"], "", ["mlflow-skinny", "numpy", "pandas", "uvicorn"]),
    ],
)
def test_mlflow_is_replaced_by_the_part_that_serves(lines, logged, expected):
    assert wanted(served(*lines, logged=logged)) == expected


@pytest.mark.parametrize(
    ("version", "bounds"),
    [
        ("2.14.0", {"flask<4", "numpy<2", "pandas<3", "setuptools<81"}),
        ("2.22.0", {"flask<4", "numpy<3", "pandas<3", "starlette<1"}),
        ("3.12.0", {"flask<4", "numpy<3", "pandas<3", "starlette<1"}),
        ("3.15.0", {"flask<4", "numpy<3", "pandas<3"}),
        ("3.17.2", {"flask<4", "numpy<3", "pandas<4"}),
        ("4.0.0", set()),
    ],
)
def test_the_bounds_that_mlflow_sets_are_kept(version, bounds):
    found = served(f"mlflow=={version}")
    assert {line.removeprefix("--constraint ") for line in found if line.startswith("--")} == bounds


def test_what_the_model_pins_is_not_bounded():
    assert "pandas<3" not in " ".join(served("mlflow==2.22.0", "pandas==3.1.1"))


def test_the_whole_package_is_kept_if_asked_for():
    assert wanted(served("mlflow==3.17.2", "numpy", full=True)) == ["mlflow==3.17.2", "numpy"]
    lean = for_serving(Requirements.of("mlflow==3.17.2"))
    assert wanted(lean.otherwise.to_text().splitlines()) == ["mlflow==3.17.2"]


def test_nothing_is_added_for_a_client_of_the_version_s_own():
    assert served("numpy", logged="3.17.2", own_client=True) == ["numpy"]
    assert "mlflow-skinny==3.17.2" in served("mlflow==3.17.2", own_client=True)


# Real models, served from what was locked and nothing else.

# What MLflow logs for each flavor, less the pins, which are as of a day.
MODELS = {
    "sklearn": (
        ["numpy", "pandas", "scikit-learn", "scipy", "skops"],
        "mlflow.sklearn.save_model(LogisticRegression().fit(X, y), PATH)",
    ),
    "lightgbm": (
        ["lightgbm", "numpy", "pandas", "scikit-learn", "scipy", "skops"],
        "import lightgbm, mlflow.lightgbm; mlflow.lightgbm.save_model(lightgbm.LGBMClassifier(n_estimators=3, min_child_samples=1).fit(X, y), PATH)",
    ),
    # The same package built without CUDA, whose libraries alone are hundreds of megabytes.
    "xgboost": (
        ["numpy", "pandas", "scikit-learn", "scipy", "xgboost-cpu"],
        "import xgboost, mlflow.xgboost; mlflow.xgboost.save_model(xgboost.XGBClassifier(n_estimators=3).fit(X, y), PATH)",
    ),
    "pyfunc": (
        ["cloudpickle"],
        """
        import pathlib, sys
        code = pathlib.Path("src/mymath"); code.mkdir(parents=True)
        (code / "__init__.py").write_text("def twice(value): return value * 2")
        sys.path.insert(0, "src")
        class Twice(mlflow.pyfunc.PythonModel):
            def predict(self, context, model_input, params=None):
                import mymath
                return [mymath.twice(float(value)) for value in model_input["a"]]
        mlflow.pyfunc.save_model(PATH, python_model=Twice(), code_paths=[str(code)])
        sys.path.remove("src")
        """,
    ),
}
TRAIN = """
import logging, sys, warnings, json, mlflow, mlflow.pyfunc
warnings.simplefilter("ignore"); logging.disable()
import numpy as np, pandas as pd
PATH = sys.argv[1]
X = pd.DataFrame({{"a": [0.0, 1, 2, 3] * 5, "b": [1.0, 0, 1, 0] * 5}})
y = np.array([0, 0, 1, 1] * 5)
if "sklearn" in {flavor!r}:
    import mlflow.sklearn; from sklearn.linear_model import LogisticRegression
{train}
rows = json.loads(sys.argv[2])
print(json.dumps(np.asarray(mlflow.pyfunc.load_model(PATH).predict(pd.DataFrame(**rows))).tolist()))
"""
ROWS = {"columns": ["a", "b"], "data": [[0.0, 1.0], [3.0, 0.0]]}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return tmp_path_factory.mktemp("wheels")


def environment(requirements, wheels, folder):
    """Make a virtual environment of what was locked, and return its interpreter."""
    from uv import find_uv_bin

    indexes = machine_indexes()
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with IndexClient(indexes) as client, ThreadPoolExecutor(8) as pool:
        found = lock(
            requirements,
            platform=machine_platform(),
            indexes=indexes,
            model=folder,
            python=python,
            glibc=(2, 36),
            as_of=datetime(2026, 11, 15, tzinfo=UTC),
            client=client,
            timeout=LONG_HANG,
        )
        missing = [wheel for wheel in found.wheels if not (wheels / wheel.filename).exists()]
        list(pool.map(lambda wheel: client.download(wheel, wheels / wheel.filename), missing))
    interpreter = folder / "venv/bin/python"
    uv = [find_uv_bin(), "--no-cache", "--quiet", "--no-config", "--offline"]
    subprocess.run([*uv, "venv", "--python", sys.executable, folder / "venv"], check=True)
    files = [wheels / wheel.filename for wheel in found.wheels]
    subprocess.run(
        [*uv, "pip", "install", "--no-deps", "--no-index", "--python", interpreter, *files],
        check=True,
    )
    return interpreter, {wheel.name for wheel in found.wheels}


@pytest.mark.parametrize(
    ("mlflow", "flavor"),
    [
        ("3.17.2", "sklearn"),
        ("3.17.2", "lightgbm"),
        ("3.17.2", "xgboost"),
        ("3.17.2", "pyfunc"),
        ("2.22.0", "pyfunc"),
    ],
)
def test_a_model_is_served_with_no_more_than_what_is_locked(wheels, tmp_path, mlflow, flavor):
    logged, train = MODELS[flavor]
    lines = [line for line in logged if line != "skops" or mlflow != "2.22.0"] + (
        ["cloudpickle"] if mlflow == "2.22.0" else []
    )
    requirements = for_serving(Requirements.of(f"mlflow=={mlflow}", *lines, mlflow_version=mlflow))
    python, names = environment(requirements, wheels, tmp_path)
    assert "mlflow-skinny" in names
    assert not names & {"mlflow", "sqlalchemy", "alembic", "matplotlib", "pyarrow", "docker", "graphene"}
    (tmp_path / "train.py").write_text(TRAIN.format(flavor=flavor, train=textwrap.dedent(train)))
    model = tmp_path / "model"
    bare = {"HOME": str(tmp_path), "PATH": "/nonexistent", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [python, "train.py", model, json.dumps(ROWS)], cwd=tmp_path, env=bare, stdout=subprocess.PIPE, check=True
    )
    expected = json.loads(done.stdout.splitlines()[-1])
    with socket.create_server(("127.0.0.1", 0)) as listening, (tmp_path / "log").open("wb") as log:
        os.set_inheritable(listening.fileno(), True)  # noqa: FBT003
        module, app = server_of(Version(mlflow))
        server = subprocess.Popen(
            [python, "-m", module, app, "--fd", str(listening.fileno())],
            cwd=tmp_path,
            env={**bare, "__pyfunc_model_path__": str(model)},
            stderr=log,
            pass_fds=[listening.fileno()],
        )
        with ThreadPoolExecutor(2) as pool:
            # The socket listens already, so that the request waits for the server, and for its end if it dies.
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/invocations"
            answer = pool.submit(httpx2.post, url, json={"dataframe_split": ROWS}, timeout=LONG_HANG)
            ended = pool.submit(server.wait)
            try:
                wait([answer, ended], return_when=FIRST_COMPLETED)
                assert not ended.done(), (tmp_path / "log").read_text()
                assert answer.result().json() == {"predictions": expected}
            finally:
                listening.close()
                server.kill()


def test_the_lock_of_what_mlflow_logs_is_a_fraction_of_mlflow_s(wheels):
    assert sum(path.stat().st_size for path in Path(wheels).iterdir()) < 250 << 20
