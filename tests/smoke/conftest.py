"""What images are served by in these tests."""

import pytest

from tests.package_index.server import running
from tests.waiting import HANG

UVICORN = b"import os, runpy\nrunpy.run_path(os.environ['__pyfunc_model_path__'] + '/server.py')\n"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """Give podman any time for what is not the image's own."""
    for name in ("_SHORT", "_SHORT_QUERY"):
        monkeypatch.setattr(f"builder.smoke.runtime.{name}", HANG)


@pytest.fixture(scope="module")
def server_packages():
    """An index whose scoring server is the model's own server.py."""
    with running() as index:
        index.add("mlflow-skinny", "3.1.0")
        index.add("pandas", "2.2.0")
        index.add("uvicorn", "0.30.0", files={"uvicorn/__main__.py": UVICORN})
        yield index
