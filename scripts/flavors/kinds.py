"""Which models are tried: one of each flavor and release, and model folders as real people have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from builder.package_index import built_in_index

_OLD_NAME = built_in_index().url.replace("pypi.", "pypi.python.")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model that is saved by MLflow itself, in an environment of its own (scripts/flavors/saved.py).

    Attributes:
        title: what the table calls it.
        name: the function that saves it.
        packages: what its environment is made of, beside MLflow.
        mlflow: requirement of MLflow's package; the newest release where it says nothing else.
        python: minor version of its Python.
        as_of: the day whose packages are taken, `2023-12-31`; empty for today's.
    """

    title: str
    name: str
    packages: tuple[str, ...] = ()
    mlflow: str = "mlflow"
    python: str = "3.11"
    as_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A model folder that is written by hand: what MLflow would not save today, or not on this machine.

    Attributes:
        title: what the table calls it.
        files: contents by path in the model folder; MLmodel is made where it is not given.
        mlmodel: lines below `python_function` in the MLmodel that is made.
        more: further lines of that MLmodel.
        question: what is asked; `2` is sent as `{"inputs": [[2.0]]}` where it is not given.
        python: minor version of its Python.
    """

    title: str
    files: Mapping[str, str] = field(default_factory=dict)
    mlmodel: Mapping[str, str] = field(default_factory=dict)
    more: str = ""
    question: str = '{"inputs": [[2.0]]}'
    python: str = "3.11"

    def contents(self) -> dict[str, str]:
        """Return the files of the model folder."""
        lines = {"loader_module": "loader", "code": "code", "python_version": f"{self.python}.9", **self.mlmodel}
        made = "\n".join(f"    {name}: {value}" for name, value in lines.items())
        mlmodel = f"flavors:\n  python_function:\n{made}\n{self.more}"
        loader = {} if "code/loader.py" in self.files else {"code/loader.py": LOADER}
        return {"MLmodel": mlmodel, "requirements.txt": "mlflow\npandas\n", **loader, **self.files}


# No pickle, so that any release of MLflow reads it.
LOADER = """\
class Model:
    def predict(self, data, params=None):
        return [[2.0 * float(value) for value in row] for row in getattr(data, "values", data)]


def _load_pyfunc(path):
    return Model()
"""


def _predicting(*lines: str) -> dict[str, str]:
    body = "\n".join(f"        {line}" for line in lines)
    return {"code/loader.py": LOADER.replace("        return", f"{body}\n        return")}


FLAVORS = (
    Saved(title="scikit-learn", name="sklearn", packages=("scikit-learn",)),
    Saved(title="XGBoost", name="xgboost", packages=("xgboost", "scikit-learn")),
    Saved(title="LightGBM", name="lightgbm", packages=("lightgbm", "scikit-learn")),
    Saved(title="CatBoost", name="catboost", packages=("catboost",)),
    Saved(title="statsmodels", name="statsmodels", packages=("statsmodels",)),
    Saved(title="Prophet", name="prophet", packages=("prophet",)),
    Saved(title="ONNX", name="onnx", packages=("onnx", "onnxruntime")),
    Saved(title="spaCy", name="spacy", packages=("spacy",)),
    Saved(title="PyTorch", name="pytorch", packages=("torch",)),
    Saved(title="TensorFlow (Keras)", name="tensorflow", packages=("tensorflow-cpu",)),
    Saved(title="Transformers", name="transformers", packages=("transformers", "torch", "torchvision")),
    Saved(title="LangChain, from code", name="langchain", packages=("langchain", "langchain-core")),
    Saved(title="pyfunc, from code", name="from_code"),
    Saved(title="pyfunc with code_paths", name="code_paths", packages=("scikit-learn",)),
)
RELEASES = tuple(
    Saved(
        title=f"scikit-learn, MLflow {release}",
        name="sklearn",
        packages=("scikit-learn", "pandas", "setuptools<81"),
        mlflow=f"{package}=={release}",
        as_of=as_of,
    )
    for package, release, as_of in (
        # PyArrow and Numba of their day have no wheels for Python 3.11, and saving needs none.
        ("mlflow-skinny", "1.30.0", "2023-03-31"),
        ("mlflow-skinny", "2.1.1", "2023-01-31"),
        ("mlflow", "2.9.2", "2023-12-31"),
        ("mlflow", "2.15.1", "2024-08-31"),
        ("mlflow", "2.22.0", "2025-05-31"),
        ("mlflow", "3.1.1", "2025-07-15"),
    )
)
WRITTEN = (
    Written(title="a loader module, no pickle"),
    Written(title="no `python_function`", files={"MLmodel": "flavors:\n  ours:\n    data: x\n"}),
    Written(
        title="`model_code_path` of Windows, the file is there",
        files={
            "model.py": "import mlflow\n\n\nclass Model(mlflow.pyfunc.PythonModel):\n"
            "    def predict(self, context, model_input, params=None):\n        return model_input * 2\n\n\n"
            "mlflow.models.set_model(Model())\n"
        },
        mlmodel={"loader_module": "mlflow.pyfunc.model", "model_code_path": "C:\\Users\\me\\model.py", "code": "null"},
    ),
    Written(
        title="Spark, a base without Java",
        mlmodel={"loader_module": "mlflow.spark"},
        files={"requirements.txt": "mlflow\npyspark==3.5.1\n"},
    ),
    Written(
        title="OpenCV, a base without libGL",
        files={"requirements.txt": "mlflow\nopencv-python==4.10.0.84\n", **_predicting("import cv2")},
    ),
    Written(
        title="OpenCV headless",
        files={"requirements.txt": "mlflow\nopencv-python-headless==4.10.0.84\n", **_predicting("import cv2")},
    ),
    Written(
        title="`mlflow_version: 2.9.2`, requirements `mlflow>=2.10,<3`",
        files={"requirements.txt": "mlflow>=2.10,<3\n"},
        more="mlflow_version: 2.9.2\n",
    ),
    Written(title="`getpass.getuser()` in predict", files=_predicting("import getpass; getpass.getuser()")),
    Written(
        title="`from sklearn.preprocessing import scale` in predict, not in the requirements",
        files=_predicting("from sklearn.preprocessing import scale; scale([1.0, 2.0])"),
    ),
    Written(
        title="MLflow 1.20.2, logged in 2021 and registered today",
        python="3.8",
        files={"requirements.txt": "mlflow==1.20.2\npandas\n"},
        more="utc_time_created: '2021-10-01 10:00:00.000000'\n",
    ),
    Written(
        title="bare `mlflow`, MLmodel without `mlflow_version`, logged in 2022",
        files={"requirements.txt": "mlflow\nscikit-learn==1.1.3\n"},
        more="utc_time_created: '2023-03-31 10:00:00.000000'\n",
    ),
    Written(
        title="`mlflow==3.10.0`, the loader imports what is missing",
        files={"requirements.txt": "mlflow==3.10.0\n", "code/loader.py": "import not_there\n" + LOADER},
    ),
    Written(
        title="conda.yaml names packages, requirements.txt has them",
        files={
            "requirements.txt": "mlflow\nnumpy\npandas\n",
            "conda.yaml": "dependencies:\n- python=3.11\n- pip\n- numpy\n- pandas\n- pip:\n  - mlflow\n",
        },
    ),
    Written(
        title="conda.yaml alone",
        files={
            "requirements.txt": "",
            "conda.yaml": "dependencies:\n- python=3.11\n- numpy=1.26.4\n- pip:\n  - mlflow\n",
        },
    ),
    Written(
        title="python_env.yaml says `-r requirements.txt`, conda.yaml has the list",
        files={
            "python_env.yaml": "python: 3.11.9\ndependencies:\n- -r requirements.txt\n",
            "conda.yaml": "dependencies:\n- python=3.11\n- pip:\n  - mlflow\n  - pandas\n",
        },
    ),
    Written(
        title="`--extra-index-url` with PyPI's old name",
        files={"requirements.txt": f"--extra-index-url {_OLD_NAME}\nmlflow\npandas\n"},
    ),
    Written(
        title="`numpy @ file:///croot/…` (pip freeze in conda)",
        files={"requirements.txt": "mlflow\nnumpy @ file:///croot/numpy_1707/work\n"},
    ),
    Written(title="`pywin32`", files={"requirements.txt": "mlflow\npywin32==306\n"}),
    Written(
        title="a package without wheels (`holidays==0.19`)",
        files={"requirements.txt": "mlflow\nholidays==0.19\n", **_predicting("import holidays")},
    ),
    Written(
        title="`wandb==0.18.7`, several wheels fit",
        files={"requirements.txt": "mlflow\nwandb==0.18.7\n", **_predicting("import wandb")},
    ),
    Written(
        title="Python 3.7 (an ABI with an `m`)",
        python="3.7",
        files={"requirements.txt": "mlflow==1.30.0\npandas\n"},
        more="utc_time_created: '2023-03-31 10:00:00.000000'\n",
    ),
    Written(
        title="conda.yaml names another Python than MLmodel",
        python="3.7",
        files={
            "requirements.txt": "mlflow==2.9.2\npandas\n",
            "conda.yaml": "dependencies:\n- python=3.8.5\n- pip:\n  - mlflow==2.9.2\n  - pandas\n",
        },
        more="utc_time_created: '2023-12-31 10:00:00.000000'\n",
    ),
    Written(
        title="torchvision 0.11.2, whose METADATA is not what its RECORD says",
        python="3.8",
        files={"requirements.txt": "mlflow==2.9.2\npandas\ntorchvision==0.11.2\n", **_predicting("import torchvision")},
        more="utc_time_created: '2023-12-31 10:00:00.000000'\n",
    ),
)
