"""`builder doctor` as people run it."""

import json
import subprocess
import sys

from scripts.launch import clean_environ
from tests.waiting import LONG_HANG

# Runs the program, and leaves the names of the modules that its threads were the first to look for.
_WATCHED = """
import json, os, sys, threading
from pathlib import Path

class Watch:
    names = set()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread():
            cls.names.add(name)

sys.meta_path.insert(0, Watch)
from builder.__main__ import run
run(["doctor"], os.environ)
Path(sys.argv[1]).write_text(json.dumps(sorted(Watch.names)))
"""


def test_a_table_of_what_is_well(doctor):
    done = doctor(LOG_FORMAT="text")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line[9:].split("  ")[0]: line[:7].strip() for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert rows["MLflow"] == "ok"
    assert rows["push"] == "ok"
    assert rows["cluster"] == rows["rights"] == rows["policies"] == "skipped"
    assert done.stdout.splitlines()[-1].split(" ")[1] == "ok,"


def test_clients_are_imported_before_the_checks_share_them(environ, tmp_path):
    # Threads that enter a circle of imports at two places get halves of modules: once in a hundred runs.
    argv = [sys.executable, "-c", _WATCHED, str(tmp_path / "names")]
    variables = clean_environ(**environ, KUBECONFIG="/nonexistent/kubeconfig")
    subprocess.run(argv, check=True, capture_output=True, env=variables, timeout=LONG_HANG)
    names = json.loads((tmp_path / "names").read_text())
    assert "builder.package_index.client" in names, "nothing was watched"
    # A package that MLflow's client enters at one place.
    names = [name for name in names if not name.startswith("mlflow.tracking.request_header")]
    clients = ("mlflow", "kubernetes", "requests", "urllib3", "google")
    assert not [name for name in names if name.partition(".")[0] in clients]


def test_everything_wrong_at_once_is_told_at_once(doctor, dead_port):
    wrong = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{dead_port}",
        "REGISTRY_URL": f"127.0.0.1:{dead_port}/models",
        "BASE_IMAGE": f"127.0.0.1:{dead_port}/base:1",
        "UV_DEFAULT_INDEX": f"http://127.0.0.1:{dead_port}/simple",
        "BUILD_ENGINE": "kaniko",
        "LISTENER_URL": f"http://127.0.0.1:{dead_port}",
    }
    done = doctor("-o", "json", "-n", "builder", **wrong)
    found = {row["check"]: row for row in json.loads(done.stdout)}
    failed = {name: row["exit_code"] for name, row in found.items() if row["state"] == "fail"}
    assert failed == {
        "MLflow": 69,
        "push": 69,
        "base image": 69,
        "package index": 69,
        "engine": 78,
        "cluster": 78,
        "webhook": 69,
        "listener": 69,
    }
    assert all(found[name]["remedy"] for name in failed)
    assert done.returncode == 78


def test_settings_that_cannot_be_used_are_told_first(doctor):
    done = doctor(REGISTRY_URL="", LISTENER_URL="no address")
    assert done.returncode == 78
    assert "REGISTRY_URL" in done.stderr
    assert "LISTENER_URL" in done.stderr
