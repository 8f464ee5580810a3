"""What images are served by in these tests."""

import pytest

from tests.package_index.server import running

UVICORN = b"import os, runpy\nrunpy.run_path(os.environ['__pyfunc_model_path__'] + '/server.py')\n"


@pytest.fixture(scope="module")
def server_packages():
    """An index whose scoring server is the model's own server.py."""
    with running() as index:
        index.add("mlflow-skinny", "3.1.0")
        index.add("pandas", "2.2.0")
        index.add("uvicorn", "0.30.0", files={"uvicorn/__main__.py": UVICORN})
        yield index
