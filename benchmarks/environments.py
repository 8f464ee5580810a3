"""The model versions that are published: each kind of environment, registered in a real MLflow server."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

from benchmarks import clients
from scripts.base_image import SUITE
from scripts.machine import native_platform

PLATFORMS = ("linux/amd64", "linux/arm64", "linux/arm/v7")
# What Debian's Python is in the base image that is made here.
PYTHON = "3.11"
TORCH_INDEX = "BENCH_TORCH_INDEX"
_CODE = f"""\
flavors:
  python_function:
    loader_module: mlflow.pyfunc.model
    python_version: {PYTHON}.2
    env:
      virtualenv: python_env.yaml
"""
_TAGS = {"EXTERNAL_TARGET_PLTR_FOUNDRY": "true", "MODEL_ENTRY_POINT": "app.py"}
_MEBI = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version that was registered.

    Attributes:
        name: of the model.
        version: its number.
        source: what `mlflow artifacts download` is given: options.
        folder: where the download has to go below a Docker context, so that the model is in `mymodel`.
    """

    name: str
    version: str
    source: tuple[str, ...]
    folder: str


@dataclass(frozen=True, kw_only=True)
class Versions:
    """What the jobs of one environment publish.

    Attributes:
        first: the version that is published first.
        changed: the next version of the same model, in which one file is another.
        other: another model in the same environment.
    """

    first: Version
    changed: Version
    other: Version


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A kind of model.

    Attributes:
        name: the word that selects it.
        title: what the report calls it.
        register: registers its versions on the MLflow server at a URI.
        client: whether the versions bring their own client, else MLflow's scoring server answers.
        request: a body for POST /invocations.
        platforms: those that its packages have wheels for, this machine's first.
        large: whether it is left out unless asked for.
        lacking: why it cannot be measured here; empty where it can.
    """

    name: str
    title: str
    register: Callable[[str], Versions]
    client: bool = True
    request: str = '{"inputs": [[5.1, 3.5, 1.4, 0.2]]}'
    platforms: tuple[str, ...] = PLATFORMS[:2]
    large: bool = False
    lacking: str = ""


def environments() -> list[Environment]:
    """Return every environment, in the order of the report."""
    columns = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
    logged = json.dumps({"dataframe_split": {"columns": columns, "data": [[5.1, 3.5, 1.4, 0.2]]}})
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    other = "" if here == PYTHON else f"MLflow writes this Python, {here}, and the base image of {SUITE} has {PYTHON}"
    torch = os.environ.get(TORCH_INDEX, "")
    native = (native_platform(),)
    return [
        Environment(name="sklearn", title="scikit-learn alone", register=_sklearn),
        Environment(
            name="mlflow",
            title="what MLflow writes for a logged scikit-learn model",
            register=_logged,
            client=False,
            request=logged,
            lacking=other,
        ),
        Environment(name="xgboost", title="xgboost and pandas", register=_xgboost),
        Environment(name="pure", title="pure Python (requests)", register=_pure, platforms=PLATFORMS),
        Environment(name="model-1g", title="a model of 1 GB, 1 MB of it changed", register=_gigabyte, platforms=native),
        Environment(
            name="model-shards",
            title="a model of 400 MB in 40 shards, 1 MB of it changed",
            register=_shards,
            platforms=native,
        ),
        Environment(
            name="model-4g",
            title="a model of 4 GB in 40 shards, 1 MB of it changed",
            register=_four,
            platforms=native,
            large=True,
        ),
        Environment(
            name="torch",
            title="CPU torch and transformers",
            register=_torch,
            platforms=native,
            large=True,
            lacking="" if torch else f"{TORCH_INDEX} names no index of CPU builds",
        ),
    ]


def _sklearn(uri: str) -> Versions:
    from sklearn.datasets import load_iris  # type: ignore[import-untyped]
    from sklearn.ensemble import RandomForestClassifier  # type: ignore[import-untyped]

    data = load_iris()

    def model(seed: int) -> dict[str, bytes]:
        fitted = RandomForestClassifier(n_estimators=20, random_state=seed).fit(data.data, data.target)
        return {"model.pkl": pickle.dumps(fitted)}

    return _versions(uri, "sklearn", _pins("scikit-learn"), clients.SKLEARN, model)


def _xgboost(uri: str) -> Versions:
    # It is not one of our own packages, so its version stands here; pandas is.
    requirements = f"xgboost==3.1.1\n{_pins('pandas')}"
    return _versions(uri, "xgboost", requirements, clients.XGBOOST, _seed)


def _pure(uri: str) -> Versions:
    return _versions(uri, "pure", _pins("requests"), clients.PURE, _seed)


def _torch(uri: str) -> Versions:
    requirements = f"--extra-index-url {os.environ[TORCH_INDEX]}\ntorch\ntransformers\n"
    return _versions(uri, "torch", requirements, clients.TORCH, _seed)


def _gigabyte(uri: str) -> Versions:
    return _weights(uri, "model-1g", _pins("packaging"), files=10, mebi=100)


def _shards(uri: str) -> Versions:
    return _weights(uri, "model-shards", _stack(), files=40, mebi=10)


def _four(uri: str) -> Versions:
    return _weights(uri, "model-4g", _stack(), files=40, mebi=100)


def _stack() -> str:
    """Return the requirements of an environment that takes many of an image's layers."""
    return _pins("mlflow-skinny", "scikit-learn", "pandas", "pyarrow", "fastapi", "uvicorn")


def _weights(uri: str, name: str, requirements: str, *, files: int, mebi: int) -> Versions:
    """Register versions with some large files, which are in all of them, and one of 1 MB, which is not."""
    with tempfile.TemporaryDirectory(prefix="bench-model-") as scratch:
        large = Path(scratch)
        for number in range(files):
            with (large / f"weights-{number}.bin").open("wb") as file:
                file.writelines(os.urandom(_MEBI) for _ in range(mebi))
        return _versions(
            uri, name, requirements, clients.WEIGHTS, lambda _: {"head.bin": os.urandom(_MEBI)}, large=large
        )


def _seed(seed: int) -> dict[str, bytes]:
    return {"seed.json": json.dumps({"seed": seed}).encode()}


def _pins(*names: str) -> str:
    return "".join(f"{name}=={installed(name)}\n" for name in names)


def _versions(
    uri: str,
    name: str,
    requirements: str,
    client: str,
    model: Callable[[int], dict[str, bytes]],
    *,
    large: Path | None = None,
) -> Versions:
    """Register three versions whose artifacts are a model and a client, as a run's."""
    from mlflow import MlflowClient

    catalog = MlflowClient(uri)

    def register(registered: str, seed: int) -> Version:
        run = catalog.create_run("0")
        with tempfile.TemporaryDirectory(prefix="bench-artifacts-") as local:
            files = {
                "mymodel/MLmodel": _CODE.encode(),
                "mymodel/python_env.yaml": f"python: {PYTHON}.2\ndependencies: [-r requirements.txt]\n".encode(),
                "mymodel/requirements.txt": requirements.encode(),
                "client/app.py": client.encode(),
                **{f"mymodel/{path}": content for path, content in model(seed).items()},
            }
            for path, content in files.items():
                target = Path(local) / path
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(content)
            catalog.log_artifacts(run.info.run_id, local)
        if large:
            catalog.log_artifacts(run.info.run_id, str(large), "mymodel")
        catalog.set_terminated(run.info.run_id)
        if not catalog.search_registered_models(f"name = '{registered}'"):
            catalog.create_registered_model(registered)
        source = f"{run.info.artifact_uri}/mymodel"
        made = catalog.create_model_version(registered, source=source, run_id=run.info.run_id, tags=_TAGS)
        return Version(name=registered, version=str(made.version), source=("--run-id", run.info.run_id), folder=".")

    return Versions(
        first=register(f"bench-{name}", 0),
        changed=register(f"bench-{name}", 1),
        other=register(f"bench-{name}-other", 2),
    )


def _logged(uri: str) -> Versions:
    """Register three versions as `mlflow.sklearn.log_model` does it, requirements inferred."""
    import mlflow
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    mlflow.set_tracking_uri(uri)
    data = load_iris(as_frame=True)
    requirements: list[str] | None = None

    def register(registered: str, rows: int) -> Version:
        nonlocal requirements
        model = LogisticRegression(max_iter=1000).fit(data.data[:rows], data.target[:rows])
        with mlflow.start_run():
            logged = mlflow.sklearn.log_model(
                model,
                name="model",
                registered_model_name=registered,
                input_example=data.data[:2],
                pip_requirements=requirements,
            )
        if requirements is None:
            # Inferring takes ten seconds; the next ones are of the same environment.
            with tempfile.TemporaryDirectory(prefix="bench-model-") as folder:
                found = mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=folder)
                requirements = (Path(found) / "requirements.txt").read_text().split()
        number = str(logged.registered_model_version)
        mlflow.MlflowClient().set_model_version_tag(registered, number, "EXTERNAL_TARGET_PLTR_FOUNDRY", "true")
        source = ("--artifact-uri", f"models:/{registered}/{number}")
        return Version(name=registered, version=number, source=source, folder="mymodel")

    return Versions(
        first=register("bench-mlflow", 150), changed=register("bench-mlflow", 140), other=register("bench-other", 130)
    )
