"""The example's notebook, executed as a reader would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from builder.models.context import write_context
from builder.models.mlflow_catalog import MlflowCatalog
from builder.rendering import rendered
from builder.settings import CatalogSettings
from tests.models.models import TARGET
from tests.waiting import HANG

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "register_and_publish.ipynb"


def executed(monkeypatch, **environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=HANG, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)})
    return notebook


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_the_notebook_registers_a_version_that_can_be_published(mlflow_server, monkeypatch, tmp_path):
    notebook = executed(monkeypatch, MLFLOW_TRACKING_URI=mlflow_server.uri, MODEL_NAME="from the notebook")
    assert "waits for the next sweep" in str(notebook.cells[-3].outputs)
    catalog = MlflowCatalog(mlflow_server.uri)
    version = catalog.find("from the notebook", "1")
    assert version.selected_by(TARGET)
    write_context(catalog, catalog.artifacts(version), tmp_path / "context")
    settings = CatalogSettings.from_environ({"MLFLOW_TRACKING_URI": mlflow_server.uri})
    files = rendered(settings, version, tmp_path / "context")
    assert 'ENTRYPOINT ["python", "/app/client/app.py"]' in str(files.dockerfile)
    assert "ENV PATH=$PATH:/app/bin" in str(files.dockerfile)
    assert prediction(tmp_path / "context") == {"predictions": [0, 2]}


def prediction(context):
    """Run the client as the image would, and ask it about two flowers."""
    environ = {**os.environ, "HOST": "127.0.0.1", "PORT": "0"}
    argv = [sys.executable, "-W", "ignore", str(context / "client" / "app.py")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as client:
        try:
            line = client.stdout.readline()
            assert line.startswith("listening on port "), client.communicate()[1]
            rows = json.dumps({"rows": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]}).encode()
            with urllib.request.urlopen(
                f"http://127.0.0.1:{line.split()[-1]}/invocations", rows, timeout=HANG
            ) as answer:
                return json.load(answer)
        finally:
            client.kill()
            client.communicate()
