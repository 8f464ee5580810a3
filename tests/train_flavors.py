"""Log one small model of each flavor: `python -m tests.train_flavors`, with MLFLOW_TRACKING_URI.

Prints, as one line of JSON, the URI of each model's version, a request for its server, and its own prediction.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import mlflow  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

_HELPER = "def doubled(frame):\n    return (frame.sum(axis=1) * 2).tolist()\n"
_MODEL = """\
import mlflow
from helper_of_the_model.arithmetic import doubled

class Doubled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return doubled(model_input)

mlflow.models.set_model(Doubled())
"""
FRAME = pd.DataFrame(np.random.default_rng(0).random((60, 3)), columns=["a", "b", "c"])
TARGET = (FRAME.a > FRAME.b).astype(int)


def pinned(*names: str) -> list[str]:
    """Return requirements on what is installed here: the flavors then share most of their wheels."""
    return [f"{name}=={version(name)}" for name in names]


def sklearn(name: str) -> Any:
    """Log a scikit-learn model with the requirements that MLflow infers, and return it."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(FRAME, TARGET)
    mlflow.sklearn.log_model(model, name="mymodel", registered_model_name=name)
    return model


def xgboost(name: str) -> Any:
    """Log an XGBoost model, and return it.

    MLflow would add the package `xgboost`, with hundreds of megabytes for graphics cards, to the one installed here.
    """
    from xgboost import XGBClassifier

    model = XGBClassifier(n_estimators=3, max_depth=2, n_jobs=1).fit(FRAME, TARGET)
    needs = pinned("xgboost-cpu", "pandas", "numpy", "scipy", "scikit-learn")
    mlflow.xgboost.log_model(model, name="mymodel", registered_model_name=name, pip_requirements=needs)
    return model


def lightgbm(name: str) -> Any:
    """Log a LightGBM model, and return it."""
    from lightgbm import Dataset, train

    parameters = {"verbose": -1, "objective": "regression", "num_threads": 1}
    model = train(parameters, Dataset(FRAME, TARGET), num_boost_round=2)
    needs = pinned("lightgbm", "pandas", "numpy", "scipy")
    mlflow.lightgbm.log_model(model, name="mymodel", registered_model_name=name, pip_requirements=needs)
    return model


def pyfunc(name: str) -> Any:
    """Log a Python model whose code stands in a folder beside it, and return it."""
    with tempfile.TemporaryDirectory() as folder:
        helper = Path(folder) / "helper_of_the_model"
        helper.mkdir()
        (helper / "__init__.py").touch()
        (helper / "arithmetic.py").write_text(_HELPER)
        program = Path(folder) / "program.py"
        program.write_text(_MODEL)
        sys.path.insert(0, folder)
        mlflow.pyfunc.log_model(
            name="mymodel",
            python_model=str(program),
            code_paths=[str(helper)],
            registered_model_name=name,
            pip_requirements=pinned("pandas", "numpy"),
        )
        return mlflow.pyfunc.load_model(f"models:/{name}/1")


class Scaled(mlflow.pyfunc.PythonModel):
    """Is in no module where this file is the program, so that it is pickled by value; its requirements name no sklearn."""

    def predict(self, context: Any, model_input: Any, params: Any = None) -> Any:
        """Return each row, scaled."""
        from sklearn.preprocessing import scale

        return scale(model_input, axis=1).tolist()


def by_value(name: str) -> Any:
    """Log a Python model of a class that is here alone, with the requirements that MLflow infers, and return it."""
    mlflow.pyfunc.log_model(name="mymodel", python_model=Scaled(), registered_model_name=name)
    return mlflow.pyfunc.load_model(f"models:/{name}/1")


FLAVORS = {each.__name__: each for each in (sklearn, xgboost, lightgbm, pyfunc, by_value)}


def main() -> None:
    """Log what the arguments name."""
    prefix, *names = sys.argv[1:]
    told = {}
    sent = FRAME.head(5)
    printed, sys.stdout = sys.stdout, sys.stderr
    for name in names:
        with mlflow.start_run():
            model = FLAVORS[name](prefix + name)
        own = model.predict(sent)
        told[name] = {
            "name": prefix + name,
            "body": json.dumps({"dataframe_split": sent.to_dict(orient="split")}),
            "prediction": own.tolist() if hasattr(own, "tolist") else own,
        }
    printed.write(json.dumps(told))
    printed.flush()
    # Without waiting for threads of libraries.
    os._exit(0)


if __name__ == "__main__":
    main()
