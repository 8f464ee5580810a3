from __future__ import annotations

import pytest
from mlflow import MlflowClient

from builder.models.catalog import MlflowCatalog
from tests.models.models import Shelf, model_folder


def _shelf(server, monkeypatch) -> Shelf:
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return Shelf(MlflowClient(server.uri), MlflowCatalog(server.uri))


@pytest.fixture
def shelf(mlflow_server, monkeypatch) -> Shelf:
    return _shelf(mlflow_server, monkeypatch)


@pytest.fixture
def file_shelf(mlflow_file_server, monkeypatch) -> Shelf:
    return _shelf(mlflow_file_server, monkeypatch)


@pytest.fixture(params=["mlflow_server", "mlflow_file_server", "mlflow_s3_server"])
def any_shelf(request, monkeypatch) -> Shelf:
    return _shelf(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def model(tmp_path):
    return model_folder(tmp_path / "saved")


@pytest.fixture
def client_programs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "app.py").write_text("print('hello')\n")
    return folder
