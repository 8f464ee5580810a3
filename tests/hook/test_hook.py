"""`builder hook` as a process in a Domino run: which version, which way, and what is left of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import httpx2
import pytest
from mlflow import MlflowClient

from builder.errors import ExitCode
from builder.oci import OCI_INDEX, OCI_MANIFEST
from builder.reference import Reference
from scripts.launch import clean_environ
from tests.hook.conftest import HOOK
from tests.hook.kubernetes import serving
from tests.hook.responder import IMAGE, PUBLISHED, SECRET
from tests.hook.test_publish_hook import templates
from tests.servers.domino import API_KEY
from tests.versions import MLMODEL, register
from tests.waiting import HANG, LONG_HANG


def pulled(image):
    """Return the manifest behind a digest reference."""
    reference = Reference.parse(image)
    repository = reference.repository
    url = f"http://{repository.host}/v2/{repository.path}/manifests/{reference.digest}"
    return httpx2.get(url, headers={"Accept": f"{OCI_INDEX}, {OCI_MANIFEST}"}, timeout=HANG).raise_for_status().json()


def columns(**more):
    return {"state": "failed", "image": "", "digest": "", "platforms": "", **more}


DOCKERFILE = {"templates/Dockerfile.template": "FROM scratch\n"}


@pytest.fixture
def with_listener(domino, responder):
    """Let the runs reach a listener."""
    domino.environ |= {"LISTENER_URL": responder.url, "SUBMIT_SECRET": SECRET}


def test_a_run_publishes_here_what_it_has_registered(domino, train, with_registry, mlflow_server):
    run = domino.ended(domino.start(f"{train('run-publishes')} && {HOOK} --result result.json"))
    assert run.status == "Succeeded", run.output
    image = run.output.strip().splitlines()[-1]
    assert image.startswith(f"{with_registry}/run-publishes@sha256:")
    assert pulled(image)["schemaVersion"] == 2
    assert run.columns["state"] == "published"
    assert run.columns["image"] == image
    assert run.columns["digest"] == image.partition("@")[2]
    assert run.columns["platforms"] == "linux/amd64"
    assert 0 < run.columns["seconds"] < LONG_HANG
    assert set(run.columns) == {"state", "image", "digest", "platforms", "seconds"}
    result = json.loads((domino.root / "result.json").read_text())
    assert (result["model"], result["version"], result["how"]) == ("run-publishes", "1", "here")
    assert (result["image"], result["platforms"], result["exit_code"]) == (image, ["linux/amd64"], 0)
    tags = MlflowClient(mlflow_server.uri).get_model_version("run-publishes", "1").tags
    assert tags["publish.pltr_foundry.image"] == image
    # One line for people says what was done, and how.
    assert re.search(rf"run-publishes version 1 is published for linux/amd64: {image} \([0-9.]+ s, here\)", run.output)
    assert "how=here" in run.output


def test_the_identity_is_the_proxy_s_and_not_a_key_s(domino, with_registry, small):
    version = small()
    domino.environ["DOMINO_USER_API_KEY"] = API_KEY
    run = domino.ended(domino.start(f"{HOOK} {version.name} {version.version}"))
    assert run.status == "Succeeded", run.output
    sent = {name.lower() for headers in domino.mlflow_asked for name in headers}
    assert "user-agent" in sent
    assert not sent & {"authorization", "x-domino-api-key", "x-domino-execution"}


def test_what_a_training_wrote_for_the_dashboard_stays(domino, with_listener, responder):
    wrote = """echo '{"AUC": 0.98}' > dominostats.json"""
    run = domino.ended(domino.start(f"{wrote} && {HOOK} pump 3"))
    assert (run.columns["AUC"], run.columns["state"]) == (0.98, "published"), run.output


def test_the_newest_selected_version_of_this_run_is_taken(domino, train, with_registry):
    other = domino.ended(domino.start(train("newest-selected")))
    assert other.status == "Succeeded", other.output
    several = " && ".join([train("newest-selected"), train("newest-selected"), train("newest-selected", "", "false")])
    run = domino.ended(domino.start(f"{several} && {HOOK} --result result.json"))
    assert run.status == "Succeeded", run.output
    assert json.loads((domino.root / "result.json").read_text())["version"] == "3"


def test_a_run_that_selected_nothing_says_what_it_registered(domino, train, with_registry):
    run = domino.ended(domino.start(f"{train('selects-nothing', '', 'false')} && {HOOK}"))
    assert run.code == ExitCode.NO_INPUT
    assert "selects-nothing" in run.output
    assert "EXTERNAL_TARGET_PLTR_FOUNDRY" in run.columns["error"]
    assert run.columns | {"error": "", "seconds": 0} == columns(exit_code=66, error="", seconds=0)


def test_a_run_that_registered_nothing_says_so(domino, with_registry):
    run = domino.ended(domino.start(HOOK))
    assert run.code == ExitCode.NO_INPUT
    assert "registered no model version" in run.output


def test_a_run_of_mlflow_s_is_enough(domino, with_registry, small):
    version = small()
    domino.environ["MLFLOW_RUN_ID"] = version.run_id
    run = domino.ended(domino.start(HOOK))
    assert run.status == "Succeeded", run.output
    assert run.columns["image"] == version.outcome()["image"]


def test_named_arguments_come_before_the_environment(domino, with_registry, small):
    wanted, other = small(), small()
    domino.environ |= {"MODEL_NAME": other.name, "MODEL_VERSION": other.version}
    run = domino.ended(domino.start(f"{HOOK} {wanted.name} {wanted.version}"))
    assert run.status == "Succeeded", run.output
    assert wanted.outcome()["state"] == "published"
    assert other.outcome() == {}
    run = domino.ended(domino.start(HOOK))
    assert (run.status, other.outcome()["state"]) == ("Succeeded", "published")


def test_a_model_without_a_version_is_not_guessed(domino, with_registry):
    domino.environ["MODEL_NAME"] = "pump"
    run = domino.ended(domino.start(HOOK))
    assert run.code == ExitCode.CONFIG
    assert "MODEL_VERSION is missing" in run.output


# ---- the ways


def test_a_version_with_a_dockerfile_goes_through_the_listener(domino, with_registry, with_listener, small, responder):
    version = small(files=DOCKERFILE)
    running = {"state": "running"}
    responder.outcomes = [running, running, PUBLISHED]
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1 --result result.json"))
    assert run.status == "Succeeded", run.output
    assert run.output.strip().splitlines()[-1] == IMAGE
    assert responder.taken[0] == ("/publish", {"model": version.name, "version": "1"})
    # What is not answered in time is asked once more.
    assert [path for path, _ in responder.taken].count("/outcome") >= 3
    assert run.columns["platforms"] == "linux/amd64,linux/arm64"
    result = json.loads((domino.root / "result.json").read_text())
    assert (result["how"], result["job"]) == ("listener", "publish-pump-v1-0123456789")
    # Which way, and why not the one before.
    (said,) = [line for line in run.output.splitlines() if "how=listener" in line]
    assert "has a Dockerfile" in said


def test_without_a_registry_it_goes_through_the_listener(domino, with_listener, responder):
    run = domino.ended(domino.start(f"{HOOK} pump @champion"))
    assert run.status == "Succeeded", run.output
    assert responder.taken[0] == ("/publish", {"model": "pump", "version": "@champion"})
    assert "REGISTRY_URL is missing" in run.output


def test_a_registry_that_refuses_to_be_pushed_to_is_no_way(
    domino, with_registry, with_listener, small, read_only_registry, responder
):
    version = small()
    domino.environ["REGISTRY_URL"] = f"{read_only_registry.host}/models"
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1"))
    assert run.status == "Succeeded", run.output
    assert run.columns["image"] == IMAGE


@pytest.mark.parametrize("why", ["not trusted", "docker-credential-not-installed"])
def test_a_registry_that_cannot_be_used_from_here_is_no_way(
    domino, with_registry, with_listener, small, tls_registry, basic_registry, responder, tmp_path, why
):
    version = small()
    server = tls_registry if why == "not trusted" else basic_registry
    # Only a registry that wants a credential has its helper run.
    (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {basic_registry.host: "not-installed"}}))
    domino.environ |= {"REGISTRY_URL": f"{server.host}/models", "DOCKER_CONFIG": str(tmp_path)}
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1"))
    assert (run.status, run.columns["image"]) == ("Succeeded", IMAGE), run.output
    (said,) = [line for line in run.output.splitlines() if "how=listener" in line]
    assert "not_here=" in said
    assert why in said
    # Where it is the only way, it is the error.
    taken = len(responder.taken)
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1 --how here"))
    assert run.code == run.columns["exit_code"] == ExitCode.CONFIG, run.output
    assert why in run.columns["error"]
    assert len(responder.taken) == taken


def test_a_job_is_followed_for_the_time_that_is_given(domino, with_listener, responder):
    responder.outcomes = [{"state": "running"}]
    run = domino.ended(domino.start(f"{HOOK} pump @champion --timeout 0.1 --result result.json"))
    assert run.code == ExitCode.TEMPORARY, run.output
    assert (run.columns["state"], run.columns["exit_code"]) == ("running", ExitCode.TEMPORARY)
    assert "publish-pump-v3-0123456789 has not ended after 0.1 s, and goes on" in run.columns["error"]
    left = json.loads((domino.root / "result.json").read_text())
    assert (left["job"], left["version"]) == ("publish-pump-v3-0123456789", "3")


def test_a_way_that_is_asked_for_is_the_only_one(domino, with_registry, with_listener, small, responder):
    version = small(files=DOCKERFILE)
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1 --how here"))
    assert run.code == ExitCode.CONFIG
    assert "has a Dockerfile" in run.output
    assert responder.ids == []
    domino.environ["SUBMIT_SECRET"] = "not-the-secret-at-all"
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1 --how listener"))
    assert run.code == ExitCode.NO_PERMISSION
    assert run.columns["exit_code"] == ExitCode.NO_PERMISSION


def test_where_no_way_is_possible_each_says_why(domino):
    run = domino.ended(domino.start(f"{HOOK} pump 3"))
    assert run.code == ExitCode.CONFIG
    for why in ("REGISTRY_URL is missing", "LISTENER_URL is missing", "SUBMIT_SECRET is missing"):
        assert why in run.columns["error"]


def test_a_failure_of_the_publisher_s_is_the_hook_s(domino, with_listener, responder):
    responder.outcomes = [{"state": "failed", "error": "No such folder.", "remedy": "Add it.", "exit_code": 65}]
    run = domino.ended(domino.start(f"{HOOK} pump 3 --result result.json"))
    assert run.code == ExitCode.DATA
    assert "No such folder. Add it." in run.columns["error"]
    result = json.loads((domino.root / "result.json").read_text())
    assert (result["error"], result["remedy"], result["exit_code"]) == ("No such folder.", "Add it.", 65)
    assert run.columns | {"seconds": 0, "error": ""} == columns(exit_code=65, seconds=0, error="")


def test_an_image_of_others_is_no_failure(domino, with_listener, responder):
    responder.outcomes = [{"state": "foreign"}]
    run = domino.ended(domino.start(f"{HOOK} pump 3"))
    assert (run.status, run.columns["state"], run.columns["image"]) == ("Succeeded", "foreign", "")
    assert "left alone" in run.output


def test_a_version_that_cannot_be_published_here_is_recorded(domino, with_registry, mlflow_server):
    version = register(mlflow_server.uri, {"mymodel/MLmodel": MLMODEL, "mymodel/requirements.txt": "needs-old==1.0\n"})
    run = domino.ended(domino.start(f"{HOOK} {version.name} 1"))
    assert run.code == int(run.columns["exit_code"]) > 0
    assert version.outcome()["state"] == "failed"


def test_a_stopped_run_says_that_its_job_goes_on(domino, with_listener, responder):
    responder.outcomes = [{"state": "running"}]
    run = domino.start(f"exec {HOOK} pump 3")
    while len(responder.taken) < 2 and not run.ended.wait(0.05):
        pass
    domino.stop(run)
    domino.ended(run)
    assert run.code == ExitCode.TEMPORARY, run.output
    assert run.columns["state"] == "running"
    assert "goes on" in run.columns["error"]


# ---- outside of Domino


def outside(*arguments, folder, **environ):
    return subprocess.run(
        [sys.executable, "-m", "builder", "hook", *arguments],
        check=False, text=True, capture_output=True, cwd=folder, timeout=LONG_HANG,
        env=clean_environ(SUBMIT_SECRET=SECRET, **environ),
    )  # fmt: skip


def test_outside_of_domino_only_what_is_asked_for_is_written(responder, tmp_path):
    done = outside("pump", "3", folder=tmp_path, LISTENER_URL=responder.url)
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n")
    assert list(tmp_path.iterdir()) == []
    assert all(json.loads(line)["event"] for line in done.stderr.splitlines())
    done = outside("pump", "3", "--stats", "here.json", folder=tmp_path, LISTENER_URL=responder.url)
    assert json.loads((tmp_path / "here.json").read_text())["state"] == "published"


def test_a_broken_stats_file_does_not_hide_the_outcome(responder, tmp_path):
    (tmp_path / "dominostats.json").write_text("{")
    done = outside("pump", "3", folder=tmp_path, LISTENER_URL=responder.url, DOMINO_WORKING_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n")
    assert (tmp_path / "dominostats.json").read_text() == "{"
    assert "left as it is" in done.stderr


def test_settings_that_cannot_be_used_are_told_as_well(responder, tmp_path):
    done = outside("pump", "3", folder=tmp_path, LISTENER_URL="no address", DOMINO_WORKING_DIR=str(tmp_path))
    assert done.returncode == ExitCode.CONFIG
    told = json.loads((tmp_path / "dominostats.json").read_text())
    assert (told["state"], told["exit_code"]) == ("failed", 78)
    assert "LISTENER_URL is malformed" in told["error"]


def test_a_file_that_could_not_be_written_is_refused_before(responder, tmp_path):
    done = outside("pump", "3", "--result", "none/result.json", folder=tmp_path, LISTENER_URL=responder.url)
    assert done.returncode == ExitCode.USAGE
    assert responder.ids == []


@pytest.mark.parametrize("run", ["' or 1 = 1", "a b", "x" * 200])
def test_a_malformed_run_is_refused(tmp_path, mlflow_server, run):
    done = outside(folder=tmp_path, MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_RUN_ID=run)
    assert done.returncode == ExitCode.CONFIG
    assert "MLFLOW_RUN_ID" in done.stderr


def test_the_cluster_is_asked_in_the_namespace_and_for_the_time_that_are_given(tmp_path, mlflow_server, small):
    version = small()
    with serving(templates(), tmp_path) as api:
        config = api.kubeconfig(tmp_path)
        config.write_text(config.read_text().replace(api.namespace, "another"))
        environ = {
            "KUBECONFIG": str(config),
            "KUBE_NAMESPACE": api.namespace,
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": "registry.example.com/models",
        }
        version.client.set_registered_model_alias(version.name, "champion", version.version)
        asked = (version.name, "@champion", "--how", "cluster", "--stats", "stats.json", "--result", "result.json")
        api.waiting = {"reason": "ContainerCreating"}
        done = outside(*asked, "--timeout", "0.1", folder=tmp_path, **environ)
        assert done.returncode == ExitCode.TEMPORARY, done.stderr
        (name,) = api.jobs
        assert f"The Job {name} has not ended after 0.1 s, and goes on." in done.stderr
        assert json.loads((tmp_path / "stats.json").read_text())["state"] == "running"
        assert json.loads((tmp_path / "result.json").read_text())["version"] == version.version
        api.waiting = None
        done = outside(*asked, folder=tmp_path, **environ)
        assert (done.returncode, done.stdout) == (0, f"{IMAGE}\n"), done.stderr
        done = outside(*asked, "--namespace", "another", folder=tmp_path, **environ)
        assert done.returncode != 0
