"""What goes wrong in a cluster, one cause a test: each version ends published once, or with a typed error on it.

Cases that other files have: many submits and sweeps at one instant, a version without a Dockerfile in a *restricted*
namespace, a Job made by kubectl alone (test_jobs.py); templates with names, patched by overlays (test_manifests.py); a
Pod without a token at the API server and at the kubelet (test_cluster.py).
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import subprocess
import uuid

import pytest

from scripts.cluster import KubectlFailed
from tests.cluster.gate import Gate
from tests.cluster.site import TEMPLATE_POD, outcome, submit, tagged, wait_for, wait_for_templates
from tests.servers.forwarding import forwarding
from tests.servers.registries import PASSWORD, USER
from tests.versions import seed_layout
from tests.waiting import HANG, LONG_HANG, until

PYTHON = "/kaniko/venv/bin/python3"
JOB = "/spec/jobTemplate/spec"
# What a test changes in an install, and the next one finds as it was.
CHANGED = ("cronjobs", "configmaps", "secrets")
# What a version's Pod asks for in a phase, once.
UPLOAD = "^POST /v2/.*{name}/blobs/uploads/"
ARTIFACT = "^GET /api/2.0/mlflow-artifacts/artifacts/.*{run_id}/.*serve.py$"
BUILD = "^GET /held/.*{name}"
TAG = "^PUT /v2/.*{name}/manifests/v1$"
# It waits at the gate, and is then the builder.
WAITS = """
import os, sys, urllib.request
urllib.request.urlopen({url!r} + os.uname().nodename).read()
os.execv("/kaniko/bin/builder", ["builder", *sys.argv[1:]])
"""
# A child of it is killed for memory, and it ends as if nothing had been.
FORKS = """
import subprocess, sys, urllib.request
subprocess.run([sys.executable, "-c", "x = bytearray(1 << 30)"])
urllib.request.urlopen({url!r}).read()
"""
FILLS = """
import urllib.request
with open("/kaniko/tmp/large", "wb") as file:
    for _ in range(64):
        file.write(bytes(1 << 20))
urllib.request.urlopen({url!r}).read()
"""
LIES = """
import json, sys
message = {"state": "published", "image": "evil.example.com/x@sha256:" + 64 * "0", "error": "Gefahr: call us"}
open("/dev/termination-log", "w").write(json.dumps(message))
print("evil.example.com is not believed")
sys.exit(73)
"""


def run(code, container="containers/0"):
    """Return the operations with which a container runs Python code."""
    path = f"{TEMPLATE_POD}/{container}/command"
    return [{"op": "add", "path": path, "value": [PYTHON, "-I", "-c", code]}]


def put(path, value, op="add"):
    return {"op": op, "path": path, "value": value}


def volume(site, name):
    """Return the path of a volume in the template of the wheels method."""
    template = site.get("cronjob", "builder-publish-wheels")["spec"]["jobTemplate"]["spec"]["template"]
    names = [each["name"] for each in template["spec"]["volumes"]]
    return f"{TEMPLATE_POD}/volumes/{names.index(name)}"


ONE_POD = put(f"{JOB}/backoffLimit", 0)


@pytest.fixture(scope="module")
def gate(cluster, cluster_mlflow, cluster_registries):
    """The gate before MLflow and the registry."""
    server = cluster_mlflow.uri.removeprefix("http://")
    with (
        forwarding(server, address=cluster.address) as mlflow,
        forwarding(cluster_registries.models.host, address=cluster.address) as registry,
    ):
        yield Gate(mlflow, registry)


class Installs:
    """An install of each overlay, as good as new for each test."""

    def __init__(self, new_site, gate, images):
        self.new_site, self.gate, self.images = new_site, gate, images
        self.sites, self.fresh = {}, {}

    def of(self, overlay, settings):
        """Return the install of an overlay, for a target of its own; its Pods reach the servers through the gate."""
        if overlay not in self.sites:
            self._install(overlay)
        site, (environ, objects) = self.sites[overlay], self.fresh[overlay]
        settings = {"TARGET_TAG": f"EXTERNAL_TARGET_T{uuid.uuid4().hex[:8].upper()}", **settings}
        site.environ.clear()
        site.environ.update(environ | settings)
        site.kubectl("replace", "-f", "-", documents=objects)
        site.patch_settings(**settings)
        wait_for_templates(site.cluster, site.namespace)
        return site

    def _install(self, overlay):
        addresses = {
            "MLFLOW_TRACKING_URI": f"http://{self.gate.mlflow.host}",
            "REGISTRY_URL": f"{self.gate.registry.host}/failures",
        }
        network = {"INSECURE_REGISTRIES": f"{self.gate.registry.host},{self.images}"}
        site = self.sites[overlay] = self.new_site(overlay, settings=addresses, network=network)
        # A `builder` outside of the cluster goes straight to MLflow.
        site.environ["MLFLOW_TRACKING_URI"] = site.mlflow
        objects = [
            each for kind in CHANGED for each in site.get(kind) if each["metadata"]["name"].startswith("builder-")
        ]
        for each in objects:
            del each["metadata"]["resourceVersion"]
        self.fresh[overlay] = (dict(site.environ), objects)


@pytest.fixture(scope="module")
def installs(new_site_for_all, gate, cluster_registries):
    """The installs of the module."""
    return Installs(new_site_for_all, gate, cluster_registries.images.host)


@pytest.fixture
def failing(installs):
    """Return the install of an overlay, with further settings. What a test leaves in it is removed."""
    used = []

    def make(overlay="base", **settings):
        used.append(installs.of(overlay, settings))
        return used[-1]

    yield make
    installs.gate.rule = lambda _asked: None
    for site in used:
        now = ("--all", "--grace-period=1", "--wait=false")
        site.kubectl("delete", "jobs,pods,resourcequotas", *now)


def asked(phase, version):
    """Return what a version's Pod asks for in a phase."""
    return phase.format(name=version.name, run_id=version.run_id)


def begin(site, version, *options):
    """Begin to submit a version, and to wait for its end."""
    return site.start_builder("submit", version.name, version.version, "-n", site.namespace, "--wait", *options)


def ended(process):
    """Wait for the end of a command; return its exit code, and what it printed."""
    stdout, stderr = process.communicate(timeout=LONG_HANG)
    return process.returncode, stdout.strip(), stderr


def jobs(site):
    """Return the Jobs of this test."""
    target = site.environ["TARGET_TAG"].lower().removeprefix("external_target_")
    return site.get("jobs", "-l", f"builder/target={target}")


def job_of(site, version):
    """Return the name of a version's Job."""
    (name,) = [
        job["metadata"]["name"]
        for job in jobs(site)
        if job["metadata"]["annotations"]["builder/model-name"] == version.name
    ]
    return name


def published_once(site, version, gate):
    """Check that the version's tag was moved once, and that the version says so."""
    found = outcome(site, version)
    assert (found["state"], found["attempts"], found.get("error", "")) == ("published", "0", "")
    assert gate.tagged(f"/{version.name}/manifests/v{version.version}") == 1


def status(site, version):
    """Return what `builder status` knows of a version."""
    done = site.builder("status", version.name, version.version, "-o", "json", "-n", site.namespace)
    assert done.code == 0, done.stderr
    (row,) = json.loads(done.stdout)
    return row


def failed(site, version, kind, *words, attempts):
    """Check the error on a version."""
    found = outcome(site, version)
    assert found["state"] == "failed", found
    assert found["error"].startswith(f"{kind}: "), found
    assert all(word in found["error"] for word in words), found
    assert found["attempts"] == str(attempts), found
    return found


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("wheels", {ARTIFACT: 30, TAG: 1}),
        ("dockerfile", {UPLOAD: 30, ARTIFACT: 1, BUILD: 1, TAG: 30}),
    ],
)
def test_a_deleted_pod_is_followed_by_another_and_is_no_attempt(failing, gate, new_pump, method, phases):
    """In each phase, with and without the time to say that it was asked to end."""
    site = failing("base" if method == "wheels" else "dockerfile")
    if method == "dockerfile":
        site.patch_template(method, *run(WAITS.format(url=gate.held_url("")), "initContainers/2"))
    held, submitted = [], []
    with contextlib.ExitStack() as stack:
        for phase, grace in phases.items():
            version = new_pump()
            first, second = (stack.enter_context(gate.hold(asked(phase, version))) for _ in range(2))
            process = begin(site, version, f"--method={method}")
            first.wait()
            pod = site.pod_of(job_of(site, version))["metadata"]["name"]
            site.kubectl("delete", "pod", pod, f"--grace-period={grace}")
            first.drop()
            held.append((second, pod))
            submitted.append((version, process))
        # The Job controller waits for ten seconds before it makes another Pod.
        for (second, pod), (version, process) in zip(held, submitted, strict=True):
            second.wait()
            assert site.pod_of(job_of(site, version))["metadata"]["name"] != pod
            assert int(outcome(site, version).get("attempts") or 0) <= 1
            second.release()
            code, image, said = ended(process)
            assert (code, image) == (0, outcome(site, version)["image"]), said
            published_once(site, version, gate)


def test_a_drained_node_is_no_attempt(failing, gate, new_pump, cluster):
    site, version = failing(), new_pump()
    with gate.hold(asked(ARTIFACT, version)) as first, gate.hold(asked(ARTIFACT, version)) as second:
        process = begin(site, version)
        first.wait()
        name = job_of(site, version)
        try:
            pods = f"--pod-selector=batch.kubernetes.io/job-name={name}"
            cluster.kubectl("drain", cluster.node, "--delete-emptydir-data", pods)
            first.drop()
            assert "the Job does not go on" in wait_for(process.stderr, "no node takes it")
            row = status(site, version)
            assert (row["state"], "no node takes it" in row["error"]) == ("pending", True), row
        finally:
            cluster.kubectl("uncordon", cluster.node)
        second.wait()
        assert outcome(site, version)["attempts"] == "1"
        # Ignored by the podFailurePolicy: it is not one of the Pods that may fail.
        assert not site.get("job", name)["status"].get("failed"), site.get("pods")
        second.release()
        code, _, said = ended(process)
    assert code == 0, said
    published_once(site, version, gate)


def test_a_job_deleted_by_hand_is_made_again_by_the_next_sweep(failing, gate, new_pump):
    site = failing()
    version = tagged(new_pump, site)
    with gate.hold(asked(ARTIFACT, version)) as first:
        process = begin(site, version)
        first.wait()
        # Its Pod is gone then, too.
        site.kubectl("delete", "job", job_of(site, version), "--cascade=foreground")
    code, _, said = ended(process)
    assert code == 75, said
    assert "was deleted while it ran" in said
    assert '"submitted": 1' in site.sweep()
    assert site.ended(job_of(site, version)) == "Complete"
    published_once(site, version, gate)


def small_memory(container):
    path = f"{TEMPLATE_POD}/{container}/resources"
    return [put(f"{path}/requests/memory", "16Mi"), put(f"{path}/limits/memory", "48Mi"), ONE_POD]


def test_a_pod_killed_for_memory_is_recorded_by_the_next_sweep(failing, new_pump):
    site = failing(SWEEP_BACKOFF="3600")
    version = tagged(new_pump, site)
    site.patch_template("wheels", *small_memory("containers/0"))
    assert '"submitted": 1' in site.sweep()
    name = job_of(site, version)
    assert site.ended(name) == "Failed"
    assert "publish was killed" in status(site, version)["error"]
    assert '"failed": 1' in site.sweep()
    failed(site, version, "OverBudget", "container publish was killed", "memory", attempts=1)
    # Once; and no other Job before its time.
    assert '"waiting": 1' in site.sweep()
    assert job_of(site, version) == name
    failed(site, version, "OverBudget", attempts=1)


def engine_knows_of_killed(site, job):
    """Return whether the node's engine has heard that something in the container `fetch` was killed for memory."""
    status = site.pod_of(job)["status"]["initContainerStatuses"][1]
    _, _, container = status.get("containerID", "").partition("://")
    return bool(container) and f"TaskOOM event &TaskOOM{{ContainerID:{container}" in site.cluster.log("containerd")


@pytest.mark.parametrize("found_by", ["the sweep", "submit"])
def test_a_container_that_ends_well_though_a_process_was_killed_for_memory(failing, gate, new_pump, found_by):
    """The kubelet starts no other container then, where each process is killed for itself (cgroup v1)."""
    site = failing("dockerfile", BUILD_METHOD="dockerfile")
    version = tagged(new_pump, site)
    forks = run(FORKS.format(url=gate.held_url("killed")), "initContainers/1")
    site.patch_template("dockerfile", *forks, *small_memory("initContainers/1"))
    with gate.hold("^GET /held/killed") as held:
        process = begin(site, version, "--method=dockerfile") if found_by == "submit" else None
        assert process or '"submitted": 1' in site.sweep()
        held.wait()
        # The node's engine is told of that beside the end.
        until(lambda: engine_knows_of_killed(site, job_of(site, version)))
        held.release()
    if process:
        code, _, said = ended(process)
        assert code == 65, said
    else:
        pod = site.pod_of(job_of(site, version))["metadata"]["name"]
        reason = "{.status.initContainerStatuses[1].state.terminated.reason}"
        site.cluster.watch(f"pod/{pod}", reason, ("OOMKilled",), namespace=site.namespace)
        assert '"failed": 1' in site.sweep()
    failed(site, version, "OverBudget", "fetch", "memory", attempts=1)
    assert jobs(site) == []
    assert not gate.tagged(f"/{version.name}/manifests/v1")


@pytest.mark.parametrize("limit", ["ephemeral storage", "a volume's sizeLimit"])
def test_a_pod_evicted_for_disk(failing, gate, new_pump, limit):
    site, version = failing(), new_pump()
    if limit == "ephemeral storage":
        change = put(f"{TEMPLATE_POD}/containers/0/resources/limits/ephemeral-storage", "32Mi")
    else:
        change = put(f"{volume(site, 'scratch')}/emptyDir/sizeLimit", "32Mi")
    site.patch_template("wheels", *run(FILLS.format(url=gate.held_url("full"))), change, ONE_POD)
    with gate.hold("^GET /held/full"):
        code, _, said = ended(begin(site, version))
    assert code == 65, said
    failed(site, version, "OverBudget", "was evicted", attempts=1)


@pytest.mark.parametrize("found_by", ["the sweep", "submit"])
def test_a_job_that_takes_too_long(failing, gate, new_pump, found_by):
    site = failing()
    version = tagged(new_pump, site)
    with gate.hold(asked(ARTIFACT, version)) as held:
        process = begin(site, version)
        held.wait()
        name = job_of(site, version)
        if found_by == "the sweep":
            process.terminate()
            ended(process)
        site.kubectl("patch", "job", name, "-p", '{"spec": {"activeDeadlineSeconds": 1}}')
        assert site.ended(name) == "Failed"
    if found_by == "submit":
        code, _, said = ended(process)
        assert code == 65, said
        assert "error: The Job" in said
    else:
        assert "was ended after" in status(site, version)["error"]
        assert '"failed": 1' in site.sweep()
    failed(site, version, "MissedDeadline", "was ended after", attempts=1)


def no_quota(site):
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    site.cluster.create(quota, namespace=site.namespace)
    # Until its use is counted, Pods are refused for another reason.
    site.cluster.watch("resourcequota/none", "{.status.hard.pods}", ("0",), namespace=site.namespace)


def no_image(site):
    site.patch_template("wheels", put(f"{TEMPLATE_POD}/containers/0/image", f"{site.registry}/absent:1"))


def no_secret(site):
    path = f"{volume(site, 'registry-push')}/secret/secretName"
    site.patch_template("wheels", put(path, "not-there"))


def no_root(site):
    root = {"runAsUser": 0, "runAsNonRoot": False}
    site.patch_template(
        "wheels", *(put(f"{TEMPLATE_POD}/containers/0/securityContext/{key}", root[key]) for key in root)
    )


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (no_quota, ("no Pod can be created", "exceeded quota")),
        (no_image, ("container publish", "absent:1")),
        (no_secret, ("FailedMount", "not-there")),
        (no_root, ("no Pod can be created", "restricted")),
    ],
    ids=["quota", "image", "Secret", "admission"],
)
def test_a_pod_that_does_not_start(failing, new_pump, hinder, words):
    """Why is told at once, by `submit --wait` and `status`; it is ended after JOB_START_TIMEOUT."""
    site, version = failing(), new_pump()
    hinder(site)
    process = begin(site, version)
    line = wait_for(process.stderr, words[-1])
    assert "the Job does not go on" in line
    assert all(word in line for word in words), line
    row = status(site, version)
    assert row["state"] == "pending"
    assert all(word in row["error"] for word in words), row
    process.terminate()
    ended(process)
    # The Job is there still: this follows it.
    site.environ["JOB_START_TIMEOUT"] = "1"
    code, _, said = ended(begin(site, version))
    assert code == 75, said
    assert "has a Job that runs already" in said
    failed(site, version, "PodNotStarted", *words, attempts=0)
    assert jobs(site) == []


def test_the_sweep_ends_a_job_that_does_not_start(failing, new_pump):
    site = failing(JOB_START_TIMEOUT="1", SWEEP_BACKOFF="3600")
    version = tagged(new_pump, site)
    no_image(site)
    assert '"submitted": 1' in site.sweep()
    pod = site.pod_of(job_of(site, version))["metadata"]["name"]
    waiting = "{.status.containerStatuses[0].state.waiting.reason}"
    site.cluster.watch(f"pod/{pod}", waiting, ("ErrImagePull", "ImagePullBackOff"), namespace=site.namespace)
    # Its exit code is 75: that the Pod does not start is no fault of the version's.
    assert '"failed": 1' in site.sweep(ends="Failed")
    failed(site, version, "PodNotStarted", "absent:1", attempts=0)
    assert jobs(site) == []
    assert '"waiting": 1' in site.sweep()


def test_an_image_in_a_private_registry_is_pulled_with_the_secret_of_the_account(
    failing, new_pump, cluster_registries, tmp_path
):
    site, version = failing(), new_pump()
    source, image = cluster_registries.base_image, f"{site.registry}/{site.namespace}/private:1"
    config = cluster_registries.models.docker_config(tmp_path / "docker")
    command = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
    command += [f"--dest-authfile={config / 'config.json'}", f"docker://{source}", f"docker://{image}"]
    subprocess.run(command, check=True)
    site.patch_template(
        "wheels",
        put(f"{TEMPLATE_POD}/containers/0/image", image),
        put(f"{TEMPLATE_POD}/containers/0/command", ["python3", "-c", "import sys; sys.exit(78)"]),
    )
    process = begin(site, version)
    assert "the Job does not go on" in wait_for(process.stderr, "container publish")
    file = f"--from-file=.dockerconfigjson={config / 'config.json'}"
    site.kubectl("create", "secret", "generic", "builder-pull", "--type=kubernetes.io/dockerconfigjson", file)
    code, _, said = ended(process)
    site.cluster.remove_image(image)
    # Its program's own.
    assert code == 78, said


def wrong(site, secret):
    """Put a wrong password into a registry's Secret."""
    host = site.environ["REGISTRY_URL"].partition("/")[0]
    config = json.dumps({"auths": {host: {"username": USER, "password": "not that one"}}})
    site.kubectl("patch", "secret", secret, "-p", json.dumps({"stringData": {".dockerconfigjson": config}}))


def test_a_push_credential_that_is_refused(failing, gate, new_pump):
    site = failing()
    version = tagged(new_pump, site)
    wrong(site, "builder-registry-push")
    code, _, said = ended(begin(site, version))
    assert code == 77, said
    failed(site, version, "PermissionRefused", gate.registry.host, attempts=0)


@pytest.mark.parametrize(
    ("secret", "container"), [("builder-registry-push", "preflight"), ("builder-registry-pull", "fetch")]
)
def test_a_credential_that_is_refused_before_the_build(failing, gate, new_pump, secret, container):
    site, version = failing("dockerfile"), new_pump()
    wrong(site, secret)
    code, _, said = ended(begin(site, version, "--method=dockerfile"))
    assert code == 77, said
    failed(site, version, "PermissionRefused", gate.registry.host, attempts=0)
    name = job_of(site, version)
    statuses = {each["name"]: each["state"] for each in site.pod_of(name)["status"]["initContainerStatuses"]}
    assert statuses[container]["terminated"]["exitCode"] == 77
    assert "terminated" not in statuses["build"]
    # kubectl alone shows the container that was to come last; `builder logs` shows what there is.
    logs = site.builder("logs", version.name, version.version, "-n", site.namespace)
    last = logs.stdout.splitlines()[-1]
    assert last.startswith(f"[{container}] "), logs
    assert '"exit_code": 77' in last
    with pytest.raises(KubectlFailed, match="is waiting to start"):
        site.kubectl("logs", f"job/{name}")


def test_a_token_that_mlflow_refuses(failing, gate, new_pump):
    """No Pod can record that; who submitted it can."""
    site, version = failing(), new_pump()
    gate.rule = lambda asked: (
        (401, {}, b"who are you") if "/api/" in asked.path and asked.authorization != "Bearer right" else None
    )

    def use(token):
        data = {"stringData": {"MLFLOW_TRACKING_TOKEN": token}}
        site.kubectl("patch", "secret", "builder-mlflow", "-p", json.dumps(data))

    use("not-right")
    code, _, said = ended(begin(site, version))
    assert code == 77, said
    assert "not-right" not in said
    failed(site, version, "PermissionRefused", attempts=0)
    use("right")
    code, _, said = ended(begin(site, version))
    assert code == 0, said
    published_once(site, version, gate)


def test_a_certificate_that_is_not_trusted_is_a_matter_of_the_settings(failing, new_pump, cluster):
    # The API server's own, which no other authority has signed.
    index = f"{cluster.server}/simple"
    site, version = failing(), new_pump()
    data = {"data": {"PIP_INDEX_URL": index, "UV_DEFAULT_INDEX": index}}
    site.kubectl("patch", "configmap", "builder-network", "-p", json.dumps(data))
    # Nothing is known there: no lock, no layer.
    site.environ["REGISTRY_URL"] += f"/{version.name}"
    site.patch_settings(REGISTRY_URL=site.environ["REGISTRY_URL"])
    code, _, said = ended(begin(site, version))
    assert code == 78, said
    failed(site, version, "InvalidSettings", "certificate", attempts=0)


def test_mlflow_is_away_for_a_while(failing, gate, new_pump, cluster_mlflow):
    site, version = failing(), new_pump()
    with gate.hold(asked(ARTIFACT, version)) as first, gate.hold(asked(ARTIFACT, version)) as retried:
        process = begin(site, version)
        first.wait()
        with cluster_mlflow.server.away():
            first.release()
            retried.wait()
        retried.release()
        code, _, said = ended(process)
    assert code == 0, said
    published_once(site, version, gate)


def test_the_registry_is_away_for_a_while(failing, gate, new_pump, cluster_registries):
    site, version = failing(), new_pump()
    with gate.hold(asked(TAG, version)) as first, gate.hold(asked(TAG, version)) as retried:
        process = begin(site, version)
        first.wait()
        with cluster_registries.models.server.away():
            first.release()
            retried.wait()
        retried.release()
        code, _, said = ended(process)
    assert code == 0, said
    published_once(site, version, gate)


def test_a_registry_that_is_away_for_longer_than_a_pod_waits(failing, gate, new_pump):
    """The Pod ends with 69, and the Job's next one publishes; that is one attempt."""
    site, version = failing(), new_pump()
    away = [True]
    gate.rule = lambda asked: (503, {}, b"") if away[0] and asked.path.startswith("/v2/") else None
    process = begin(site, version)
    wait_for(process.stderr, "exit_code=69")
    away[0] = False
    code, _, said = ended(process)
    assert code == 0, said
    published_once(site, version, gate)


def test_a_bad_version_keeps_no_good_one_from_being_published(failing, gate, new_pump):
    site = failing(SWEEP_BACKOFF="3600")
    good = [tagged(new_pump, site) for _ in range(2)]
    bad = tagged(new_pump, site, MODEL_FOLDER="not/there")
    also_good = tagged(new_pump, site)
    assert '"submitted": 4' in site.sweep()
    assert site.ended(job_of(site, bad)) == "Failed"
    failed(site, bad, "InvalidVersion", "not/there", attempts=1)
    for version in (*good, also_good):
        assert site.ended(job_of(site, version)) == "Complete"
        published_once(site, version, gate)
    log = site.sweep()
    assert '"current": 3' in log
    assert '"waiting": 1' in log


def test_a_version_that_is_deleted_while_its_job_runs(failing, gate, new_pump):
    site = failing()
    version = tagged(new_pump, site)
    with gate.hold(asked(ARTIFACT, version)) as held:
        process = begin(site, version)
        held.wait()
        name = job_of(site, version)
        version.client.delete_model_version(version.name, version.version)
        # The sweep leaves the Job alone.
        assert '"failed"' not in site.sweep()
        assert [job["metadata"]["name"] for job in jobs(site)] == [name]
        held.release()
        code, _, said = ended(process)
    assert code == 66, said
    assert site.ended(name) == "Failed"
    assert not gate.tagged(f"/{version.name}/manifests/v1")


def test_a_version_that_is_deselected_while_its_job_runs(failing, gate, new_pump):
    site = failing()
    version = tagged(new_pump, site)
    with gate.hold(asked(ARTIFACT, version)) as held:
        assert '"submitted": 1' in site.sweep()
        held.wait()
        name = job_of(site, version)
        version.client.delete_model_version_tag(version.name, version.version, site.environ["TARGET_TAG"])
        site.sweep()
        held.release()
    assert site.ended(name) == "Complete"
    assert [job["metadata"]["name"] for job in jobs(site)] == [name]


def test_another_method_is_no_other_source(failing, gate, new_pump):
    site = failing("dockerfile")
    version = tagged(new_pump, site)
    code, image, said = ended(begin(site, version, "--method=wheels"))
    assert code == 0, said
    assert '"current": 1' in site.sweep()
    again = submit(site, version, "--wait", "--method=dockerfile")
    assert (again.code, again.stdout.strip()) == (0, image), again.stderr
    published_once(site, version, gate)


def test_labels_and_lines_of_the_log_name_the_version(failing, new_pump):
    site, version = failing("dockerfile"), new_pump()
    code, _, said = ended(begin(site, version, "--method=dockerfile"))
    assert code == 0, said
    name = job_of(site, version)
    pod = site.pod_of(name)
    for labels in (site.get("job", name)["metadata"]["labels"], pod["metadata"]["labels"]):
        found = {key: value for key, value in labels.items() if key.startswith(("builder/", "app.kubernetes.io/"))}
        assert found == {
            "app.kubernetes.io/name": "builder",
            "app.kubernetes.io/component": "publish",
            "app.kubernetes.io/part-of": "builder",
            "app.kubernetes.io/managed-by": "builder",
            "builder/method": "dockerfile",
            "builder/target": site.environ["TARGET_TAG"].lower().removeprefix("external_target_"),
            "builder/model": version.name,
            "builder/version": "1",
        }
    lines = site.kubectl("logs", pod["metadata"]["name"], "--all-containers").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert {event["phase"] for event in events} >= {"preflight", "fetch", "build", "push"}
    unnamed = [event for event in events if (event.get("model"), event.get("version")) != (version.name, "1")]
    assert unnamed == []


def test_the_path_of_secrets_is_shown(failing, new_pump):
    site, version = failing(), new_pump()
    variable = {"name": "SSL_CERT_FILE", "value": "/kaniko/credentials/mlflow/absent.pem"}
    site.patch_template("wheels", put(f"{TEMPLATE_POD}/containers/0/env/-", variable))
    code, _, said = ended(begin(site, version))
    assert code == 78, said
    assert "/kaniko/credentials/mlflow/absent.pem" in said


def test_what_a_dockerfile_says_of_its_end_is_not_believed(failing, new_pump):
    site, version = failing("dockerfile"), new_pump()
    site.patch_template("dockerfile", *run(LIES, "initContainers/2"), ONE_POD)
    code, image, said = ended(begin(site, version, "--method=dockerfile"))
    assert (code, image) == (73, ""), said
    assert "Gefahr" not in said
    found = failed(site, version, "BuildFailed", "container build ended with exit code 73", attempts=1)
    assert "evil" not in json.dumps(found)
    assert "Gefahr" not in status(site, version)["error"]


def test_sweeps_with_nothing_to_do_keep_the_log_of_a_version(failing, new_pump):
    site = failing()
    version = tagged(new_pump, site)
    site.kubectl("patch", "cronjob", "builder-sweep", "-p", '{"spec": {"successfulJobsHistoryLimit": 1}}')
    site.kubectl("create", "job", "sweep-1", "--from=cronjob/builder-sweep")
    assert site.ended("sweep-1") == "Complete"
    name = job_of(site, version)
    assert site.ended(name) == "Complete"
    site.kubectl("create", "job", "sweep-2", "--from=cronjob/builder-sweep")
    assert site.ended("sweep-2") == "Complete"
    site.kubectl("wait", "--for=delete", "job/sweep-1", f"--timeout={HANG:.0f}s")
    assert outcome(site, version)["image"] in site.log_of(name)


LOOKS = """\
FROM {base}
RUN env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'; ls -laR /kaniko/credentials /var/run/secrets 2>&1; \
    cat /kaniko/workspace/plan.json 2>&1; echo x > /kaniko/workspace/plan.json; \
    python3 -c "{ask}"
"""
ASK = """
import json, ssl, urllib.error, urllib.request
context = ssl._create_unverified_context()
for url in {urls!r}:
    try:
        # At the first there is nobody, as a rule.
        found = urllib.request.urlopen(url, timeout=5 if '169.254' in url else 300, context=context).status
    except urllib.error.HTTPError as error:
        found = error.code
    except OSError as error:
        found = 'nothing'
    print('found', url, found)
"""


@pytest.fixture
def kaniko(new_site, node_kaniko_image):
    """The overlay `dockerfile`, with the image that has Kaniko."""
    return new_site("dockerfile", image=node_kaniko_image)


@pytest.mark.kaniko
def test_a_run_step_finds_no_credential_and_is_nobody_elsewhere(kaniko, new_pump, cluster, cluster_registries):
    site = kaniko
    service = cluster.get("service", "kubernetes")["spec"]["clusterIP"]
    urls = [
        "http://169.254.169.254/latest/meta-data/",
        f"https://{service}/api/v1/namespaces/{site.namespace}/secrets",
        f"https://{cluster.address}:10250/pods",
        f"http://{cluster_registries.models.host}/v2/_catalog",
    ]
    ask = ASK.format(urls=urls).replace("\n", "\\n").replace("'", "\\x27")
    base = cluster_registries.base_image
    dockerfile = LOOKS.format(base=base, ask=f"exec('{ask}')")
    version = new_pump({"templates/Dockerfile.template": dockerfile})
    code, _, said = ended(begin(site, version))
    assert code == 0, said
    logs = site.kubectl("logs", site.pod_of(job_of(site, version))["metadata"]["name"], "-c", "build")
    found = dict(re.findall(r'"found ([^ "]+) ([a-z0-9]+)"', logs))
    metadata, api_server, kubelet, registry = (found.get(url) for url in urls)
    # Where the network has such a server, it may answer, but with nothing for a Pod.
    assert metadata in {"nothing", "401", "403", "404"}, found
    assert api_server in {"401", "403"}, found
    assert (kubelet, registry) == ("401", "401"), found
    assert "plan.json: Read-only file system" in logs
    code = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    names = ("MLFLOW_TRACKING_URI", "REGISTRY_URL", "SECRETS_DIR", "DOCKER_CONFIG=/kaniko/credentials")
    for secret in (*names, PASSWORD, code, "eyJhbGciOi"):
        assert secret not in logs, secret
    # The engine's lines say whose they are.
    events = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    assert {(event["model"], event["version"], event["phase"]) for event in events} == {(version.name, "1", "build")}


@pytest.mark.kaniko
def test_an_engine_killed_for_memory(kaniko, new_pump, cluster_registries):
    site = kaniko
    files = seed_layout(cluster_registries.base_image)
    eats = "\nRUN python3 -c 'x = bytearray(1 << 33)' || true\n"
    template = files["templates/Dockerfile.template"].replace("\nUSER", f"{eats}USER")
    version = new_pump({"templates/Dockerfile.template": template})
    limits = f"{TEMPLATE_POD}/initContainers/2/resources/limits/memory"
    site.patch_template("dockerfile", put(limits, "512Mi"), ONE_POD)
    code, _, said = ended(begin(site, version))
    assert code == 65, said
    failed(site, version, "OverBudget", "build", "memory", attempts=1)
