"""The manifests before a real API server: what it admits, and from whom.

No Job runs here: almost all requests are dry runs, of which the API server keeps nothing.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

import certifi
import pytest
import yaml

from scripts.cluster import KubectlFailed
from tests.cluster.site import copy_of
from tests.waiting import HANG, LONG_HANG, until

K8S = Path(__file__).parents[2] / "k8s"
METHODS = ("wheels", "dockerfile")
DIFFERS = "The Pod of this Job differs from the one in the template"
OVERLAYS = ("base", "dockerfile", "single", "domino")
COMPONENTS = ("air-gapped", "aks", "eks", "gke", "user-namespaces")


class Refused(Exception):
    """The API server's answer to a request that it refuses."""


class Account:
    """A service account and its requests; kubectl would take most of a second for each."""

    def __init__(self, cluster, namespace, name):
        self.namespace, self.server = namespace, cluster.server
        self.token = cluster.kubectl(f"--namespace={namespace}", "create", "token", name).strip()
        context = ssl.create_default_context(cafile=cluster.ca)
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        self.opener = urllib.request.build_opener(*handlers)

    def request(self, path, body=None, method=None, kind="application/json"):
        """Send a request, and return the answer's document.

        Raises:
            Refused: with the API server's message.
        """
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server}{path}", data, headers, method=method)
        try:
            with self.opener.open(request, timeout=HANG) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            message = json.loads(error.read())["message"]
            raise Refused(" ".join(message.split())) from None

    def create(self, document, namespace=None):
        """Create a Job or a Pod without keeping it."""
        root = {"Job": "/apis/batch/v1", "Pod": "/api/v1"}[document["kind"]]
        place = f"namespaces/{namespace or self.namespace}/{document['kind'].lower()}s"
        return self.request(f"{root}/{place}?dryRun=All", document)

    def may(self, verb, resource, group="", namespace=None):
        """Return whether RBAC allows something."""
        resource, _, subresource = resource.partition("/")
        attributes = {
            "namespace": namespace or self.namespace,
            "verb": verb,
            "group": group,
            "resource": resource,
            "subresource": subresource,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        return self.request("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)["status"]["allowed"]


class Install:
    """An overlay in a namespace of its own."""

    def __init__(self, cluster, namespace):
        self.cluster, self.namespace = cluster, namespace
        self.sweep = Account(cluster, namespace, "builder-sweep")

    def template(self, method):
        """Return a template as the sweep reads it."""
        name = f"builder-publish-{method}"
        return self.sweep.request(f"/apis/batch/v1/namespaces/{self.namespace}/cronjobs/{name}")

    def job(self, method):
        """Return the Job that the sweep makes of a template for a version."""
        return copy_of(self.template(method))


def overlay(folder, namespace, *resources, components=(), k8s=K8S, **more):
    """Write a kustomization on top of folders of k8s/, and return its folder."""
    folder.mkdir(exist_ok=True)
    document = {
        "namespace": namespace,
        "resources": [os.path.relpath(k8s / each, folder.resolve()) for each in resources],
        "components": [os.path.relpath(k8s / each, folder.resolve()) for each in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return folder


def refusal(install, job, words=""):
    """Wait until the API server, which learns of policies and templates by watching them, refuses a Job; return why.

    Args:
        install: whose sweep asks.
        job: the Job.
        words: of the refusal that is waited for; others come before the policies are known.
    """
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        try:
            install.sweep.create(job)
        except Refused as refused:
            if words in str(refused):
                return str(refused)
        time.sleep(0.05)
    message = "the Job is admitted"
    raise AssertionError(message)


def wait_for_policies(install):
    """Wait until the policies are in force, and know the templates as they are."""
    for method in METHODS:
        no_copy = install.job(method)
        first(no_copy)["image"] = "registry.example.com/more:1"
        refusal(install, no_copy, DIFFERS)
    no_method = install.job(METHODS[0])
    no_method["metadata"]["labels"].pop("builder/method")
    refusal(install, no_method, "copies of the templates")
    deadline = time.monotonic() + HANG
    while True:
        try:
            for method in METHODS:
                install.sweep.create(install.job(method))
        except Refused as refused:
            if time.monotonic() > deadline:
                message = f"no copy is admitted: {refused}"
                raise AssertionError(message) from None
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="module")
def install(cluster, tmp_path_factory):
    """The overlay `dockerfile`, with some patches of a template, as people write them."""
    namespace = f"install-{os.getpid()}"
    patches = [
        {
            "target": {"kind": "CronJob", "name": "builder-publish-.*"},
            "patch": yaml.safe_dump(
                [
                    {
                        "op": "add",
                        "path": "/spec/jobTemplate/spec/template/spec/nodeSelector",
                        "value": {"kubernetes.io/arch": "amd64"},
                    },
                    {
                        "op": "replace",
                        "path": "/spec/jobTemplate/spec/template/spec/containers/0/resources/limits/memory",
                        "value": "2Gi",
                    },
                    {
                        "op": "add",
                        "path": "/spec/jobTemplate/metadata/labels/kueue.x-k8s.io~1queue-name",
                        "value": "publishers",
                    },
                    {"op": "replace", "path": "/spec/jobTemplate/spec/backoffLimit", "value": 1},
                ]
            ),
        }
    ]
    folder = overlay(tmp_path_factory.mktemp("install"), namespace, "dockerfile", patches=patches)
    cluster.kubectl("apply", "-k", str(folder))
    made = Install(cluster, namespace)
    wait_for_policies(made)
    yield made
    cluster.kubectl("delete", "namespace", namespace, "--wait=false")


def pod_of(job):
    return job["spec"]["template"]["spec"]


def first(job):
    return pod_of(job)["containers"][0]


def secret_volume(job):
    pod_of(job)["volumes"].append({"name": "more", "secret": {"secretName": "builder-pull"}})


def host_path(job):
    pod_of(job)["volumes"].append({"name": "more", "hostPath": {"path": "/"}})


def mount(job):
    pod_of(job)["containers"][0]["volumeMounts"].append({"name": "mlflow", "mountPath": "/more"})


def container(job):
    pod_of(job)["containers"].append({"name": "more", "image": "registry.example.com/more:1"})


def init_container(job):
    pod_of(job).setdefault("initContainers", []).insert(0, {"name": "more", "image": "registry.example.com/more:1"})


def other_secret(job):
    for volume in pod_of(job)["volumes"]:
        if volume["name"] == "mlflow":
            volume["secret"]["secretName"] = "builder-pull"


def context(**changes):
    return lambda job: first(job)["securityContext"].update(changes)


def pod(**changes):
    return lambda job: pod_of(job).update(changes)


def spec(**changes):
    return lambda job: job["spec"].update(changes)


def without(name):
    return lambda job: job["spec"].pop(name)


def labels(**changes):
    return lambda job: job["metadata"]["labels"].update({key.replace("__", "/"): v for key, v in changes.items()})


def pod_labels(**changes):
    return lambda job: job["spec"]["template"]["metadata"]["labels"].update(changes)


def pod_annotations(changes):
    return lambda job: job["spec"]["template"]["metadata"]["annotations"].update(changes)


OFTEN = "would start Pods more often"
LONGER = "would live longer"
OTHERWISE = "would end in another way"
REFUSED = {
    "another image": (lambda job: first(job).update(image="registry.example.com/more:1"), DIFFERS),
    "another command": (lambda job: first(job).update(command=["/bin/sh"]), DIFFERS),
    "other arguments": (lambda job: first(job).update(args=["warm"]), DIFFERS),
    "another Secret": (other_secret, DIFFERS),
    "one more Secret": (secret_volume, DIFFERS),
    "one more mount": (mount, DIFFERS),
    "a host path": (host_path, DIFFERS),
    "one more variable": (lambda job: first(job)["env"].append({"name": "MORE", "value": "1"}), DIFFERS),
    "another ConfigMap": (lambda job: first(job).update(envFrom=[]), DIFFERS),
    "another account": (pod(serviceAccountName="builder-sweep"), DIFFERS),
    "a token": (pod(automountServiceAccountToken=True), DIFFERS),
    "one more container": (container, DIFFERS),
    "one more init container": (init_container, DIFFERS),
    "privileged": (context(privileged=True, allowPrivilegeEscalation=True), DIFFERS),
    "root": (context(runAsUser=0, runAsNonRoot=False), DIFFERS),
    "the node's network": (pod(hostNetwork=True), DIFFERS),
    "the node's processes": (pod(hostPID=True), DIFFERS),
    "a node": (pod(nodeName="node1"), DIFFERS),
    "another pull secret": (pod(imagePullSecrets=[{"name": "more"}]), DIFFERS),
    "a resource limit": (lambda job: first(job)["resources"]["limits"].update(memory="64Gi"), DIFFERS),
    "parallelism": (spec(parallelism=100), OFTEN),
    "completions": (spec(completions=100), OFTEN),
    "indexed": (spec(completionMode="Indexed"), OFTEN),
    "more attempts": (spec(backoffLimit=3), OFTEN),
    "no limit of attempts": (without("backoffLimit"), OFTEN),
    "a longer deadline": (spec(activeDeadlineSeconds=1_000_000), LONGER),
    "no deadline": (without("activeDeadlineSeconds"), LONGER),
    "kept for ever": (without("ttlSecondsAfterFinished"), LONGER),
    "no policy for failures": (without("podFailurePolicy"), OTHERWISE),
    "other Pods replaced": (spec(podReplacementPolicy="TerminatingOrFailed", podFailurePolicy=None), OTHERWISE),
    "managed by another controller": (spec(managedBy="example.com/more"), OTHERWISE),
    "one more label": (labels(more="1"), "The labels of this Job differ"),
    "one more label of the Pod": (pod_labels(more="1"), "The labels of the Pod differ"),
    "another component": (
        pod_labels(**{"app.kubernetes.io/component": "sweep"}),
        "The labels of the Pod differ",
    ),
    "one more annotation": (
        lambda job: job["metadata"]["annotations"].update(more="1"),
        "The annotations of this Job differ",
    ),
    "one more annotation of the Pod": (pod_annotations({"more": "1"}), "The annotations of the Pod differ"),
    "forced": (pod_annotations({"builder/force": "true"}), "The annotations of the Pod differ"),
    "rebuilt": (pod_annotations({"builder/rebuild": "true"}), "The annotations of the Pod differ"),
    "an owner": (
        lambda job: job["metadata"].update(
            ownerReferences=[{"apiVersion": "v1", "kind": "ConfigMap", "name": "builder-network", "uid": "1"}]
        ),
        "may have owner references",
    ),
    "a finalizer": (lambda job: job["metadata"].update(finalizers=["example.com/more"]), "or finalizers"),
    "a finalizer of the Pod": (
        lambda job: job["spec"]["template"]["metadata"].update(finalizers=["example.com/more"]),
        "or finalizers",
    ),
    "another method": (labels(builder__method="more"), "copies of the templates"),
    "no method": (lambda job: job["metadata"]["labels"].pop("builder/method"), "copies of the templates"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_template_is_admitted(install, method):
    made = install.sweep.create(install.job(method))
    assert made["metadata"]["uid"] == made["spec"]["template"]["metadata"]["labels"]["controller-uid"]


@pytest.mark.parametrize("method", METHODS)
def test_a_queue_may_suspend_a_copy(install, method):
    job = install.job(method)
    job["spec"]["suspend"] = True
    assert install.sweep.create(job)["spec"]["suspend"] is True


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", REFUSED)
def test_a_job_that_is_no_copy_is_refused(install, method, what):
    change, reason = REFUSED[what]
    job = install.job(method)
    change(job)
    with pytest.raises(Refused, match=re.escape(reason)):
        install.sweep.create(job)


def test_another_account_with_the_role_is_held_to_copies_too(install, new_namespace):
    """Such as Domino's runs, which make a Job from a namespace of their own."""
    elsewhere = new_namespace()
    runs = Account(install.cluster, elsewhere, "default")
    no_copy, no_method = install.job("wheels"), install.job("wheels")
    secret_volume(no_copy)
    del no_method["metadata"]["labels"]["builder/method"]

    def bind(role):
        binding = ("create", "rolebinding", f"runs-{role}", f"--role={role}", f"--serviceaccount={elsewhere}:default")
        install.cluster.kubectl(f"--namespace={install.namespace}", *binding)

    def until_allowed(verb, resource, group=""):
        until(lambda: runs.may(verb, resource, group, namespace=install.namespace))

    bind("builder-sweep")
    until_allowed("create", "template-copies", "builder")
    runs.create(install.job("wheels"), namespace=install.namespace)
    with pytest.raises(Refused, match=DIFFERS):
        runs.create(no_copy, namespace=install.namespace)
    with pytest.raises(Refused, match="copies of the templates"):
        runs.create(no_method, namespace=install.namespace)
    # Who may read the Secrets has no need of a Job for that.
    reader = ("create", "role", "reader", "--verb=get", "--resource=secrets")
    install.cluster.kubectl(f"--namespace={install.namespace}", *reader)
    bind("reader")
    until_allowed("get", "secrets")
    runs.create(no_copy, namespace=install.namespace)


def test_a_copy_of_one_template_is_none_of_the_other(install):
    job = install.job("wheels")
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        metadata["labels"]["builder/method"] = "dockerfile"
    with pytest.raises(Refused, match="builder-publish-dockerfile"):
        install.sweep.create(job)


def test_a_changed_template_is_what_counts(install):
    """A Job is compared with the template as it is now."""
    job = install.job("wheels")
    patch = '[{"op": "replace", "path": "/spec/jobTemplate/spec/activeDeadlineSeconds", "value": 60}]'
    here = (f"--namespace={install.namespace}", "patch", "cronjob", "builder-publish-wheels", "--type=json", "-p")
    install.cluster.kubectl(*here, patch)
    try:
        assert LONGER in refusal(install, job, LONGER)
    finally:
        install.cluster.kubectl(*here, patch.replace("60", "7800"))
    wait_for_policies(install)


def test_without_a_template_nothing_is_admitted(install):
    job = install.job("dockerfile")
    template = install.template("dockerfile")
    for field in ("resourceVersion", "uid", "creationTimestamp", "generation"):
        del template["metadata"][field]
    here = f"--namespace={install.namespace}"
    install.cluster.kubectl(here, "delete", "cronjob", "builder-publish-dockerfile")
    try:
        assert "no params found" in refusal(install, job, "no params found")
    finally:
        install.cluster.create(template, namespace=install.namespace)
    wait_for_policies(install)


@pytest.mark.parametrize(
    ("verb", "resource", "group"),
    [
        ("create", "pods", ""),
        ("delete", "pods", ""),
        ("patch", "pods", ""),
        ("create", "pods/exec", ""),
        ("get", "pods/exec", ""),
        ("create", "pods/attach", ""),
        ("create", "pods/portforward", ""),
        ("update", "pods/ephemeralcontainers", ""),
        ("patch", "pods/ephemeralcontainers", ""),
        ("create", "cronjobs", "batch"),
        ("patch", "cronjobs", "batch"),
        ("update", "cronjobs", "batch"),
        ("delete", "cronjobs", "batch"),
        ("list", "cronjobs", "batch"),
        ("patch", "jobs", "batch"),
        ("update", "jobs", "batch"),
        ("update", "jobs/status", "batch"),
        ("deletecollection", "jobs", "batch"),
        ("patch", "events", ""),
        ("update", "events", ""),
        ("delete", "events", ""),
        ("get", "secrets", ""),
        ("list", "secrets", ""),
        ("watch", "secrets", ""),
        ("create", "secrets", ""),
        ("get", "configmaps", ""),
        ("update", "configmaps", ""),
        ("create", "serviceaccounts/token", ""),
        ("impersonate", "serviceaccounts", ""),
        ("create", "deployments", "apps"),
        ("create", "replicationcontrollers", ""),
        ("create", "podtemplates", ""),
        ("create", "rolebindings", "rbac.authorization.k8s.io"),
        ("bind", "roles", "rbac.authorization.k8s.io"),
        ("escalate", "roles", "rbac.authorization.k8s.io"),
        ("delete", "networkpolicies", "networking.k8s.io"),
        ("delete", "validatingadmissionpolicies", "admissionregistration.k8s.io"),
        ("get", "nodes", ""),
        ("get", "nodes/proxy", ""),
    ],
)
def test_what_the_sweep_s_account_may_not_do(install, verb, resource, group):
    assert not install.sweep.may(verb, resource, group)


def test_the_sweep_s_account_reads_no_secret_and_changes_no_template(install):
    install.cluster.kubectl(f"--namespace={install.namespace}", "create", "secret", "generic", "builder-mlflow")
    here = f"namespaces/{install.namespace}"
    with pytest.raises(Refused, match=r'cannot get resource "secrets"'):
        install.sweep.request(f"/api/v1/{here}/secrets/builder-mlflow")
    template = f"/apis/batch/v1/{here}/cronjobs/builder-publish-wheels"
    with pytest.raises(Refused, match=r'cannot patch resource "cronjobs"'):
        install.sweep.request(template, {"spec": {"suspend": False}}, "PATCH", "application/merge-patch+json")
    with pytest.raises(Refused, match=r'cannot get resource "cronjobs"'):
        install.sweep.request(f"/apis/batch/v1/{here}/cronjobs/builder-sweep")


def test_the_sweep_s_account_creates_no_pod_and_nothing_in_another_namespace(install, new_namespace):
    job = install.job("wheels")
    alone = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "alone"}, "spec": pod_of(job)}
    with pytest.raises(Refused, match=r'cannot create resource "pods"'):
        install.sweep.create(alone)
    elsewhere = new_namespace()
    assert install.sweep.may("create", "jobs", "batch")
    for verb in ("create", "get", "list", "watch", "delete"):
        assert not install.sweep.may(verb, "jobs", "batch", namespace=elsewhere)
    with pytest.raises(Refused, match=r'cannot create resource "jobs"'):
        install.sweep.create(job, namespace=elsewhere)


def test_the_account_that_publishes_may_do_nothing(install):
    account = Account(install.cluster, install.namespace, "builder-publish")
    for verb in ("create", "get", "list", "watch", "delete", "update", "patch"):
        for resource, group in (("jobs", "batch"), ("cronjobs", "batch"), ("pods", ""), ("secrets", "")):
            assert not account.may(verb, resource, group)


def test_other_people_s_jobs_are_none_of_the_policy_s_business(install):
    job = install.job("wheels")
    pod_annotations({"builder/force": "true"})(job)
    here = f"--namespace={install.namespace}"
    made = install.cluster.kubectl(here, "create", "--dry-run=server", "-f", "-", documents=[job])
    assert "created (server dry run)" in made


def test_the_api_server_finds_no_fault_with_the_policies(install):
    for policy in ("builder-jobs", "builder-job-methods"):
        status = install.cluster.watch(
            f"validatingadmissionpolicy/{policy}", "{.status.observedGeneration}", ("1", "2")
        )
        assert status
        found = install.cluster.get("validatingadmissionpolicy", policy)["status"]
        assert "expressionWarnings" not in found.get("typeChecking", {}), found


def as_pod(job_template):
    template = copy.deepcopy(job_template["spec"]["template"])
    template["metadata"]["name"] = "template"
    return {"apiVersion": "v1", "kind": "Pod"} | template


def rendered(cluster, folder):
    return [each for each in yaml.safe_load_all(cluster.kubectl("kustomize", str(folder))) if each]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pods_of_an_overlay_are_admitted_where_it_puts_them(cluster, new_namespace, tmp_path, name):
    documents = rendered(cluster, overlay(tmp_path / "overlay", "unused", name))
    levels = [each["metadata"]["labels"] for each in documents if each["kind"] == "Namespace"]
    # Domino's namespace has no labels of ours.
    level = levels[0]["pod-security.kubernetes.io/enforce"] if levels else "baseline"
    assert level == ("restricted" if name == "base" else "baseline")
    namespace = new_namespace(level)
    pods = [as_pod(each["spec"]["jobTemplate"]) for each in documents if each["kind"] == "CronJob"]
    assert pods
    for account in ("builder-sweep", "builder-publish"):
        cluster.kubectl(f"--namespace={namespace}", "create", "serviceaccount", account)
    here = (f"--namespace={namespace}", "create", "--dry-run=server", "-f", "-")
    for each in pods:
        cluster.kubectl(*here, documents=[each])


def test_a_dockerfile_s_root_is_refused_in_the_namespace_of_the_base(cluster, new_namespace, tmp_path):
    namespace = new_namespace("restricted")
    cluster.kubectl(f"--namespace={namespace}", "create", "serviceaccount", "builder-publish")
    documents = rendered(cluster, K8S / "dockerfile")
    (template,) = [each for each in documents if each["metadata"]["name"] == "builder-publish-dockerfile"]
    with pytest.raises(KubectlFailed) as refused:
        cluster.kubectl(
            f"--namespace={namespace}",
            "create",
            "--dry-run=server",
            "-f",
            "-",
            documents=[as_pod(template["spec"]["jobTemplate"])],
        )
    # Root and the capabilities: the exceptions that k8s/dockerfile/namespace.yaml gives reasons for, and no other.
    _, _, violations = str(refused.value).partition('violates PodSecurity "restricted:latest": ')
    assert [each.split(" (")[0] for each in violations.split("), ")] == [
        "unrestricted capabilities",
        "runAsNonRoot != true",
        "runAsUser=0",
    ]
    assert violations.count('container "build"') == violations.count("container") == 3


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_api_server_takes_an_overlay_without_a_warning(cluster, new_namespace, tmp_path, name):
    level = "restricted" if name == "base" else "baseline"
    namespace = new_namespace(level, {"pod-security.kubernetes.io/warn": level})
    folder = overlay(tmp_path / "overlay", namespace, name)
    cluster.kubectl("apply", "--warnings-as-errors", "--dry-run=server", "-k", str(folder))


@pytest.mark.parametrize("overlaid", ["base", "dockerfile"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_the_api_server_takes_a_component_on_top(cluster, new_namespace, tmp_path, component, overlaid):
    level = "restricted" if overlaid == "base" else "baseline"
    namespace = new_namespace(level, {"pod-security.kubernetes.io/warn": level})
    folder = overlay(tmp_path / "overlay", namespace, overlaid, components=[component])
    cluster.kubectl("apply", "--warnings-as-errors", "--dry-run=server", "-k", str(folder))


def test_a_bundle_that_is_too_large_for_an_annotation_fits_by_server_side_apply(cluster, new_namespace, tmp_path):
    """As k8s/air-gapped/kustomization.yaml says."""
    shutil.copytree(K8S, tmp_path / "k8s")
    public = Path(certifi.where()).read_text()
    (tmp_path / "k8s" / "air-gapped" / "ca-bundle.pem").write_text(public + public)
    folder = overlay(tmp_path / "overlay", new_namespace(), "base", components=["air-gapped"], k8s=tmp_path / "k8s")
    apply = ("apply", "--dry-run=server", "-k", str(folder))
    with pytest.raises(KubectlFailed, match="Too long"):
        cluster.kubectl(*apply)
    cluster.kubectl(*apply, "--server-side", "--force-conflicts")


def test_two_targets_side_by_side(cluster):
    namespaces = ("builder-pltr-foundry", "builder-second")
    try:
        cluster.kubectl("apply", "-k", str(K8S / "targets"))
        for namespace in namespaces:
            settings = cluster.get(f"--namespace={namespace}", "configmap", "builder-settings")["data"]
            assert settings["TARGET_TAG"].endswith(namespace.removeprefix("builder-").replace("-", "_").upper())
            (subject,) = cluster.get(f"--namespace={namespace}", "rolebinding", "builder-sweep")["subjects"]
            assert subject["namespace"] == namespace
    finally:
        cluster.kubectl("delete", "namespace", *namespaces, "--ignore-not-found", "--wait=false")


def test_an_install_twice_changes_nothing(install, tmp_path):
    folder = overlay(tmp_path / "overlay", install.namespace, "dockerfile")
    install.cluster.kubectl("apply", "--dry-run=server", "-k", str(folder))
    again = install.cluster.kubectl("apply", "--dry-run=server", "-k", str(K8S / "policies"))
    assert [line for line in again.splitlines() if "unchanged" not in line] == []


def test_cronjob_yaml_and_job_yaml_are_taken_as_they_are(cluster):
    """In the namespace that both name; a Job with a Dockerfile needs the overlay that admits one."""
    try:
        cluster.kubectl("apply", "--warnings-as-errors", "-f", str(K8S / "cronjob.yaml"))
        with pytest.raises(KubectlFailed, match="would violate PodSecurity"):
            cluster.kubectl("create", "--warnings-as-errors", "--dry-run=server", "-f", str(K8S / "job.yaml"))
        cluster.kubectl("apply", "--warnings-as-errors", "-k", str(K8S / "dockerfile"))
        wait_for_policies(Install(cluster, "builder"))
        cluster.kubectl("create", "--warnings-as-errors", "-f", str(K8S / "job.yaml"))
        (job,) = cluster.get("--namespace=builder", "jobs", "-l", "builder/method=dockerfile")
        annotations = job["spec"]["template"]["metadata"]["annotations"]
        assert annotations["builder/model-name"] == "pltr_foundry_model"
    finally:
        cluster.kubectl("delete", "namespace", "builder", "--ignore-not-found", timeout=LONG_HANG)
