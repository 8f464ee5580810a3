"""The listener's callers and a real `builder listen`, each a process of its own; Kubernetes alone is not the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder.cluster.job import MODEL_NAME
from builder.errors import ExitCode
from scripts.launch import Processes, Program, clean_environ, free_port, running
from tests.hook.kubernetes import MESSAGE, serving
from tests.hook.responder import IMAGE, SECRET
from tests.hook.test_publish_hook import FILE, templates
from tests.waiting import LONG_HANG

HOOK = (sys.executable, "-m", "builder", "hook")


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory):
    with serving(templates(), tmp_path_factory.mktemp("kubernetes")) as running_api:
        yield running_api


@pytest.fixture
def api(kubernetes):
    """The API, whose Jobs end as they should; those of earlier tests stay, since the listener may look at them still."""
    kubernetes.code, kubernetes.message = 0, dict(MESSAGE)
    return kubernetes


@pytest.fixture(scope="module")
def listen(kubernetes, mlflow_server, tmp_path_factory):
    """Run `builder listen`, and return how it is called."""
    port, metrics, folder = free_port(), free_port(), tmp_path_factory.mktemp("listen")
    environ = {
        "LISTEN_HOST": "127.0.0.1",
        "LISTEN_PORT": str(port),
        "METRICS_PORT": str(metrics),
        "SUBMIT_SECRET": f"an-older-one-0123456789 {SECRET}",
        "KUBECONFIG": str(kubernetes.kubeconfig(folder)),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": "registry.example.com/models",
    }
    program = Program(
        name="listen",
        kind="python",
        argv=(sys.executable, "-m", "builder", "listen"),
        port=port,
        ready=f"http://127.0.0.1:{metrics}/readyz",
        folder=folder,
        environ=environ,
    )
    with running(Processes(), program):
        yield {"LISTENER_URL": f"http://127.0.0.1:{port}", "SUBMIT_SECRET": SECRET}


def jobs_of(api, version):
    """Return the names of a version's Jobs."""
    jobs = dict(api.jobs)
    return [name for name, job in jobs.items() if job["metadata"]["annotations"][MODEL_NAME] == version.name]


def call(*argv, folder, **environ):
    return subprocess.run(
        argv, check=False, text=True, capture_output=True, cwd=folder, timeout=LONG_HANG,
        env=clean_environ(PATH=os.environ["PATH"], DOMINO_WORKING_DIR=str(folder), **environ),
    )  # fmt: skip


@pytest.mark.parametrize("program", [HOOK, (sys.executable, "-I", str(FILE))], ids=["builder", "file"])
def test_a_version_is_published_and_followed(api, listen, small, tmp_path, program):
    version = small(name=f"Modell für {tmp_path.name}")
    version.client.set_registered_model_alias(version.name, "champion", version.version)
    done = call(*program, version.name, "@champion", "--result", "r.json", folder=tmp_path, **listen)
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr
    result = json.loads(Path(tmp_path / "r.json").read_text())
    (name,) = jobs_of(api, version)
    assert (result["how"], result["version"], result["job"]) == ("listener", version.version, name)
    assert json.loads((tmp_path / "dominostats.json").read_text())["image"] == IMAGE


@pytest.mark.parametrize("program", [HOOK, (sys.executable, "-I", str(FILE))], ids=["builder", "file"])
def test_a_failure_comes_with_its_code(api, listen, small, tmp_path, program):
    api.code, api.message = 65, {"state": "failed", "error": "InvalidVersion: No such folder.", "exit_code": 65}
    version = small()
    done = call(*program, version.name, version.version, folder=tmp_path, **listen)
    assert (done.returncode, done.stdout) == (ExitCode.DATA, ""), done.stderr
    assert "No such folder." in done.stderr
    done = call(*program, "no-such-model", "1", folder=tmp_path, **listen)
    assert done.returncode == ExitCode.NO_INPUT, done.stderr


def test_a_secret_that_is_not_the_listener_s_is_refused(api, listen, small, tmp_path):
    version = small()
    environ = {**listen, "SUBMIT_SECRET": "not-the-secret-at-all"}
    for program in (HOOK, (sys.executable, "-I", str(FILE))):
        done = call(*program, version.name, version.version, "--how", "listener", folder=tmp_path, **environ)
        assert done.returncode == ExitCode.NO_PERMISSION, done.stderr
    assert jobs_of(api, version) == []


def test_submit_via_prints_the_job(api, listen, small, tmp_path):
    version = small()
    submit = (sys.executable, "-m", "builder", "submit", version.name, version.version, "--via", listen["LISTENER_URL"])
    done = call(*submit, folder=tmp_path, SUBMIT_SECRET=SECRET)
    (name,) = jobs_of(api, version)
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr
    done = call(*submit, "--wait", folder=tmp_path, SUBMIT_SECRET=SECRET)
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr
