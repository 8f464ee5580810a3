"""What is imported when: whatever a command does not need makes everybody wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from builder.errors import ExitCode
from scripts.launch import clean_environ
from tests.versions import register, seed_layout

# Packages that only a build, a terminal or MLflow needs.
HEAVY = {"boto3", "fastapi", "installer", "jinja2", "jwt", "mlflow", "packaging", "pip", "requests", "uv", "yaml"}
# Ours that only a build needs.
BUILDS = {
    "builder.dockerfile.buildah",
    "builder.package_index.client",
    "builder.dockerfile.kaniko",
    "builder.wheels.resolve",
    "builder.wheels.requirements",
    "builder.wheels.install",
}


def modules(code: str, environ: dict[str, str] | None = None) -> set[str]:
    """Return the modules that a fresh interpreter holds when it has run some code."""
    report = "import json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    argv = [sys.executable, "-c", f"{code}\n{report}"]
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        argv, check=True, capture_output=True, text=True, env=clean_environ(PYTHONPATH=path, **(environ or {}))
    )
    return set(json.loads(ran.stderr.splitlines()[-1]))


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_help_needs_click_alone():
    new = modules("from builder.__main__ import run\nassert run(['--help'], {}) == 0") - modules("")
    assert packages(new) - set(sys.stdlib_module_names) == {"builder", "click"}
    commands = {"bulk", "domino_jobs", "in_cluster", "invocation", "listen", "options", "phases"}
    assert {name for name in new if name.startswith("builder")} == {
        "builder", "builder.__main__", "builder.cli", "builder.errors", "builder.masking",
        *(f"builder.cli.{name}" for name in commands),
    }  # fmt: skip


@pytest.mark.parametrize(
    "ours", ["builder.publish", "builder.publish.inspect", "builder.batch.sweep", "builder.batch.download"]
)
def test_no_heavy_package_is_imported_before_it_is_used(ours):
    new = modules(f"import builder.report, builder.settings, {ours}") - modules("")
    assert packages(new) & HEAVY == set()
    assert new & BUILDS == set()


def test_what_no_request_needs_of_mlflow_is_imported_when_it_is_used():
    code = "from builder.__main__ import postpone\npostpone()\nfrom mlflow import MlflowClient"
    new = modules(code)
    assert "mlflow.tracking" in new
    assert {"fastapi", "mlflow.genai.judges"} & new == set()
    used = modules(f"{code}\nimport mlflow\nassert callable(mlflow.genai.evaluate)")
    assert "mlflow.genai.judges" in used


@pytest.fixture
def published(mlflow_server, registry):
    """The environment of a version that is published already."""
    version = register(mlflow_server.uri, seed_layout("", "FROM scratch\nCOPY $model_folder /app\nUSER 10001\n"))
    environ = {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/startup",
        "MODEL_NAME": version.name,
        "MODEL_VERSION": version.version,
    }
    subprocess.run(
        [sys.executable, "-m", "builder", "publish"], check=True, capture_output=True, env=clean_environ(**environ)
    )
    return environ


def test_a_publish_with_nothing_to_do_imports_no_builder_of_anything(published):
    code = "import os\nfrom builder.__main__ import run\nassert run(['publish'], os.environ) == 0"
    new = modules(code, published)
    assert "mlflow" in new
    assert (packages(new) - packages(modules("import mlflow"))) & HEAVY == set()
    assert new & BUILDS == set()


def test_a_process_that_ends_searches_no_garbage():
    code = """\
import atexit, gc, sys
from builder import __main__
atexit.register(lambda: print(gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))
sys.argv = ["builder", "no-such-command"]
__main__._AT_EXIT = 300  # a busy machine may take longer than the usual limit
__main__.main()
"""
    path = os.pathsep.join(filter(None, sys.path))
    argv = [sys.executable, "-c", code]
    ran = subprocess.run(argv, check=False, capture_output=True, text=True, env=clean_environ(PYTHONPATH=path))
    assert ran.returncode == ExitCode.USAGE
    assert ran.stdout == "True True\n"
