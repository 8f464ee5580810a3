"""The example's notebook, executed as a reader would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from builder.dockerfile.template import rendered
from builder.models.catalog import MlflowCatalog
from builder.models.context import write_context
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
        notebook, timeout=HANG, startup_timeout=int(HANG), iopub_timeout=int(HANG),
        kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}},
    )  # fmt: skip
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
    with serving(context) as (_, address):
        return asked(address, {"rows": [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]]})[1]


@contextlib.contextmanager
def serving(context):
    """Run the client as the image would; give its process and where it listens."""
    environ = {**os.environ, "HOST": "127.0.0.1", "PORT": "0"}
    argv = [sys.executable, "-W", "ignore", str(context / "client" / "app.py")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as client:
        try:
            line = client.stdout.readline()
            assert line.startswith("listening on port "), client.communicate()[1]
            yield client, f"http://127.0.0.1:{line.split()[-1]}/invocations"
        finally:
            client.kill()
            client.communicate()


def asked(address, content):
    """Return status and content of the client's answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        with urllib.request.urlopen(address, body, timeout=HANG) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


MLMODEL = """\
flavors:
  python_function: {loader_module: doubling, code: code}
signature:
  inputs: '[{"type": "double", "name": "x", "required": true}]'
"""
DOUBLING = """\
class Doubling:
    def predict(self, rows):
        if (rows["x"] < 0).any():
            raise RuntimeError("the model is at fault")
        return rows["x"] * 2

def _load_pyfunc(path):
    return Doubling()
"""


def test_the_client_says_whose_fault_it_is_and_ends_when_asked_to(tmp_path):
    (tmp_path / "mymodel" / "code").mkdir(parents=True)
    (tmp_path / "mymodel" / "MLmodel").write_text(MLMODEL)
    (tmp_path / "mymodel" / "code" / "doubling.py").write_text(DOUBLING)
    shutil.copytree(EXAMPLES / "foundry_model" / "client", tmp_path / "client")
    with serving(tmp_path) as (client, address):
        assert asked(address, {"rows": [{"x": 1.5}]}) == (200, {"predictions": [3.0]})
        wrong = {
            "another column": {"rows": [{"y": 1.5}]},
            "another type": {"rows": [{"x": "word"}]},
            "no rows": {},
            "no JSON": b"{",
            "another form": [1],
        }
        answers = {case: asked(address, content) for case, content in wrong.items()}
        assert {case: status for case, (status, _) in answers.items()} == dict.fromkeys(wrong, 400)
        assert "x" in answers["another column"][1]["error"]
        status, said = asked(address, {"rows": [{"x": -1.0}]})
        assert status == 500
        assert said["error"]
        client.terminate()
        assert client.wait(HANG) == 0
