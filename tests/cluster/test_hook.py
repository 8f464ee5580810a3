"""The hook against a real cluster: through a real listener, and by the Kubernetes API, as the program and as one file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from scripts.launch import clean_environ
from tests.cluster.listening import SUBMIT_SECRET, listening
from tests.cluster.site import Done, outcome
from tests.hook.conftest import ROOT
from tests.waiting import LONG_HANG

FILE = ROOT / "examples" / "domino" / "publish_hook.py"


@pytest.fixture
def listener(site):
    """One Pod that listens; MLflow does not deliver to it."""
    with listening(site, webhook=False) as running:
        yield running


@pytest.fixture
def account(site):
    """Return how the sweep's account reaches the API, without a kubeconfig."""
    return {
        "KUBE_API_URL": site.cluster.server,
        "KUBE_TOKEN": site.kubectl("create", "token", "builder-sweep").strip(),
        "KUBE_CA": str(site.cluster.ca),
        "KUBE_NAMESPACE": site.namespace,
    }


@pytest.fixture
def one_file(site, tmp_path):
    """Run publish_hook.py with the site's settings."""

    def run(version, *arguments, **environ):
        keep = {name: site.environ[name] for name in ("MLFLOW_TRACKING_URI", "TARGET_TAG", "NO_PROXY")}
        done = subprocess.run(
            [sys.executable, "-I", str(FILE), version.name, version.version, *arguments],
            check=False, text=True, capture_output=True, cwd=tmp_path, timeout=LONG_HANG,
            env=clean_environ(DOMINO_WORKING_DIR=str(tmp_path), **{**keep, **environ}),
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def columns(tmp_path):
    return json.loads((tmp_path / "dominostats.json").read_text())


def test_the_program_publishes_through_the_listener(site, listener, new_pump, tmp_path):
    version = new_pump()
    secret = {"LISTENER_URL": listener.url, "SUBMIT_SECRET": SUBMIT_SECRET, "DOMINO_WORKING_DIR": str(tmp_path)}
    done = site.builder("hook", version.name, version.version, "--how", "listener", **secret)
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == outcome(site, version)["image"] == columns(tmp_path)["image"]
    # Published already: the listener tells the same at once.
    again = site.builder("submit", version.name, version.version, "--via", listener.url, "--wait", **secret)
    assert (again.code, again.stdout) == (0, done.stdout), again.stderr


def test_a_version_that_cannot_be_published_ends_with_its_code(site, listener, new_pump, tmp_path):
    version = new_pump(MODEL_FOLDER="not/there")
    secret = {"LISTENER_URL": listener.url, "SUBMIT_SECRET": SUBMIT_SECRET, "DOMINO_WORKING_DIR": str(tmp_path)}
    done = site.builder("hook", version.name, version.version, "--how", "listener", **secret)
    assert (done.code, done.stdout) == (65, ""), done.stderr
    assert "not/there" in columns(tmp_path)["error"]


def test_a_caller_with_another_secret_is_refused(site, listener, new_pump):
    version = new_pump()
    done = site.builder(
        "submit", version.name, version.version, "--via", listener.url, SUBMIT_SECRET="another-secret-0123456789"
    )
    assert done.code == 77, done.stderr
    assert site.jobs() == []


def test_the_program_publishes_by_the_kubernetes_api(site, new_pump, tmp_path):
    version = new_pump()
    done = site.builder(
        "hook", version.name, version.version, "--how", "cluster", "-n", site.namespace,
        DOMINO_WORKING_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == outcome(site, version)["image"] == columns(tmp_path)["image"]
    assert columns(tmp_path)["state"] == "published"


def test_the_one_file_publishes_through_the_listener(site, listener, new_pump, one_file, tmp_path):
    version = new_pump(name="Modell für Pumpe 11")
    done = one_file(version, LISTENER_URL=listener.url, SUBMIT_SECRET=SUBMIT_SECRET)
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == outcome(site, version)["image"] == columns(tmp_path)["image"]


def test_the_one_file_publishes_by_the_kubernetes_api_with_the_sweep_s_rights(site, account, new_pump, one_file):
    version = new_pump(name="Modell für Pumpe 12")
    done = one_file(version, **account)
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == outcome(site, version)["image"]
    # The policies admitted it: it is a copy of the template. The program takes it for its own.
    (job,) = site.jobs()
    submitted = site.builder("submit", version.name, version.version, "--wait", "-n", site.namespace)
    assert submitted.stdout == done.stdout
    (again,) = site.jobs()
    assert again["metadata"]["name"] == job["metadata"]["name"]
