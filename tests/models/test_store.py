"""What is asked of MLflow that its documentation does not promise."""

from __future__ import annotations

import pytest
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from builder.errors import Defect
from builder.models import Artifact
from builder.models.store import ArtifactStore


def without_a_path(self, remote_file_path):
    """As another release might have it."""


def not_asked_of_stores(self, remote_file_path, local_path):
    """As another release might have it."""


@pytest.mark.parametrize("changed", [None, without_a_path, not_asked_of_stores])
def test_another_mlflow_is_told_from_a_server_that_is_away(changed, monkeypatch, tmp_path):
    if changed:
        if changed is without_a_path:
            changed.__isabstractmethod__ = True
        monkeypatch.setattr(ArtifactRepository, "_download_file", changed)
    else:
        monkeypatch.delattr(ArtifactRepository, "_download_file")
    root = "mlflow-artifacts:/1/run/artifacts"
    with pytest.raises(Defect, match="MLflow that is installed here") as caught:
        ArtifactStore("http://127.0.0.1:1").download(Artifact(path="a", size=1, root=root, remote="a"), tmp_path / "a")
    assert "requirements/builder.txt" in caught.value.remedy
