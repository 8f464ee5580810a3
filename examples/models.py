"""The demo's two models, saved as MLflow models."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent


def save_flower_model(folder: Path) -> None:
    """Train a classifier on the iris flowers and save it in `folder`."""
    import mlflow
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    flowers, kinds = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=500).fit(flowers, kinds)
    # Skinny: the image loads the model, and serves no user interface.
    names = ("mlflow-skinny", "scikit-learn", "numpy", "pandas", "scipy", "cloudpickle")
    pinned = [f"{name}=={version(name)}" for name in names]
    mlflow.sklearn.save_model(model, folder, pip_requirements=pinned, serialization_format="cloudpickle")


def save_pump_model(folder: Path) -> None:
    """Save the rules of examples/pump_alarm in `folder`."""
    import mlflow

    example = HERE / "pump_alarm"
    mlflow.pyfunc.save_model(
        folder,
        loader_module="pump_alarm",
        code_paths=[str(example / "pump_alarm.py")],
        data_path=str(example / "rules.toml"),
    )
    # MLflow adds itself to what it is told; this model's own server does without.
    (folder / "requirements.txt").write_text("# nothing but Python: the client's own requirements are beside it\n")
