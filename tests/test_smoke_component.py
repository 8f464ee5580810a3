"""The component k8s/smoke-test: what it makes of the two templates."""

import os
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from builder import cli
from tests.test_k8s import FOLDER, RELEASES, assert_confined, rendered

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
CANDIDATE = "registry.example.com/models/candidates:x"
PHASES = {
    "base": ["fetch", "candidate", "smoke", "push"],
    "dockerfile": ["preflight", "fetch", "build", "candidate", "smoke", "push"],
}
TEMPLATES = [("base", "wheels"), ("dockerfile", "wheels"), ("dockerfile", "dockerfile")]


def install(folder, overlaid, **data):
    """Return the documents of an install with the component, by their kind and name."""
    site, whole = folder / "site", folder / "whole"
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "builder-settings", "namespace": "builder"},
    }
    settings["data"] = data
    for path, document in {
        site: {
            "resources": [os.path.relpath(FOLDER / overlaid, site.resolve())],
            "components": [os.path.relpath(FOLDER / "air-gapped", site.resolve())],
            "patches": [{"patch": yaml.safe_dump(settings)}],
        },
        whole: {"resources": ["../site"], "components": [os.path.relpath(FOLDER / "smoke-test", whole.resolve())]},
    }.items():
        path.mkdir()
        (path / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return rendered(whole)


def pod_of(documents, method):
    return documents["CronJob", f"builder-publish-{method}"]["spec"]["jobTemplate"]["spec"]["template"]


@pytest.mark.parametrize(("overlaid", "method"), TEMPLATES)
def test_a_sidecar_runs_between_candidate_and_push(tmp_path, overlaid, method):
    documents = install(tmp_path, overlaid, SMOKE_TEST_CANDIDATE=CANDIDATE)
    pod = pod_of(documents, method)
    every = [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]
    assert [each["name"] for each in every] == PHASES["base" if method == "wheels" else "dockerfile"]
    assert pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"] == "push"
    *_, candidate, smoke, push = every
    assert smoke["image"] == CANDIDATE
    assert (smoke["restartPolicy"], smoke["imagePullPolicy"]) == ("Always", "Always")
    assert smoke.keys().isdisjoint({"env", "envFrom", "command", "args"})
    assert [mount["mountPath"] for mount in smoke.get("volumeMounts", [])] == (["/tmp"] if method == "wheels" else [])
    context = {"readOnlyRootFilesystem": True, **smoke["securityContext"], "runAsUser": 10001}
    assert_confined({"securityContext": context})
    assert "runAsUser" not in smoke["securityContext"]
    for each in every:
        if each is not smoke:
            assert each["args"] == [each["name"]]
            assert each["args"][0] in cli.builder.commands
            assert "network" in {mount["name"] for mount in each["volumeMounts"]}
    assert {**candidate, "name": "push", "args": ["push"]} == push


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("overlaid", ["base", "dockerfile"])
def test_an_install_with_it_is_valid(tmp_path, overlaid, release):
    documents = install(tmp_path, overlaid, SMOKE_TEST_CANDIDATE=CANDIDATE)
    for document in documents.values():
        kubernetes_validate.validate(document, release, strict=True)


@pytest.mark.parametrize("overlaid", ["base", "dockerfile"])
def test_sweep_and_listener_start_one_job_at_a_time(tmp_path, overlaid):
    documents = install(tmp_path, overlaid, SMOKE_TEST_CANDIDATE=CANDIDATE)
    data = documents["ConfigMap", "builder-settings"]["data"]
    assert (data["SWEEP_PARALLEL"], data["LISTEN_PARALLEL"]) == ("1", "1")
    assert documents["Deployment", "builder-listener"]["spec"]["replicas"] == 1


def test_a_node_with_the_only_listener_can_be_drained(tmp_path):
    documents = install(tmp_path, "base", SMOKE_TEST_CANDIDATE=CANDIDATE)
    budget = documents["PodDisruptionBudget", "builder-listener"]["spec"]
    assert (budget["maxUnavailable"], budget.get("minAvailable")) == (1, None)


def test_without_the_candidate_s_name_it_cannot_be_rendered(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        install(tmp_path, "base")
    assert "SMOKE_TEST_CANDIDATE" in failed.value.stderr
