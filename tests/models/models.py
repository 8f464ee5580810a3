"""What the tests of this folder register: one model and its client, in every way that MLflow knows."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from builder.models import ModelVersion
from builder.models.catalog import MlflowCatalog

TARGET = "EXTERNAL_TARGET_PLTR_FOUNDRY"
_numbers = itertools.count()


def model_folder(folder: Path) -> Path:
    """Write what `save_model` would, without the seconds it takes."""
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    python_version: 3.11.7\n")
    (folder / "requirements.txt").write_text("numpy\n")
    (folder / "python_env.yaml").write_text("python: 3.11.7\n")
    (folder / "data" / "weights.bin").write_bytes(bytes(range(256)) * 300)
    (folder / "data" / "naïve name.txt").write_text("é")
    return folder


@dataclass(frozen=True)
class Shelf:
    """A server, its client and its catalog."""

    client: MlflowClient
    catalog: MlflowCatalog

    def experiment(self) -> str:
        return self.client.create_experiment(f"experiment-{os.getpid()}-{next(_numbers)}")

    def run(self, *folders: tuple[Path, str], experiment: str = "") -> str:
        """Log folders in a new run, and return its id."""
        run_id = self.client.create_run(experiment or self.experiment()).info.run_id
        for path, name in folders:
            self.client.log_artifacts(run_id, str(path), name)
        return run_id

    def logged_model(self, folder: Path, name: str, run_id: str | None) -> str:
        """Log a model the way MLflow 3 does, and return its id."""
        experiment = self.client.get_run(run_id).info.experiment_id if run_id else self.experiment()
        model = self.client.create_logged_model(experiment, name=name, source_run_id=run_id)
        get_artifact_repository(model.artifact_location, tracking_uri=self.client.tracking_uri).log_artifacts(
            str(folder)
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        if run_id:
            outputs = [mlflow.entities.LoggedModelOutput(model_id=model.model_id, step=0)]
            self.client.log_outputs(run_id, outputs)
        return model.model_id

    def version(
        self, source: str, *, tags: Mapping[str, str] | None = None, name: str = "", **more: str | None
    ) -> ModelVersion:
        """Register a source, under a name of its own unless one is given."""
        name = name or f"model-{os.getpid()}-{next(_numbers)}"
        try:
            self.client.create_registered_model(name)
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self.client.create_model_version(name, source=source, tags=dict(tags or {}), **more)
        return self.catalog.find(name, str(made.version))

    def in_run(self, *folders: tuple[Path, str], tags: Mapping[str, str] | None = None, name: str = "") -> ModelVersion:
        """Register files of a run, the way of MLflow 2; the first folder is the model's."""
        run_id = self.run(*folders)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/{folders[0][1]}"
        return self.version(source, tags=tags, name=name, run_id=run_id)
