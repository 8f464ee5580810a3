"""An install as an operator has it: the manifests of k8s/ in a namespace, with the settings and Secrets of the tests."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from examples.models import HERE, save_pump_model
from scripts.cluster import Cluster, KubectlFailed
from scripts.launch import clean_environ
from scripts.machine import native_platform
from tests.versions import Registered, register
from tests.waiting import HANG, LONG_HANG, until

TEMPLATE_POD = "/spec/jobTemplate/spec/template/spec"
JOB_ENDED = ("Complete", "Failed")
# Of a CronJob that makes no Job by itself.
ASLEEP = '[{"op": "add", "path": "/spec/suspend", "value": true}]'
READINGS = {"inputs": [{"bearing_celsius": 96, "vibration_mm_s": 2.8, "pressure_bar": 17}]}


def patch(name: str, path: str, value: object, *, op: str = "replace") -> dict[str, Any]:
    """Return a kustomize patch of a CronJob."""
    return {
        "target": {"kind": "CronJob", "name": name},
        "patch": yaml.safe_dump([{"op": op, "path": path, "value": value}]),
    }


@dataclass(frozen=True)
class Done:
    """A program that has ended: its exit code and what it printed."""

    code: int
    stdout: str
    stderr: str


@dataclass(kw_only=True)
class Site:
    """An install.

    Attributes:
        cluster: where it is.
        namespace: of its own.
        mlflow: URI of the tracking server.
        registry: host of the registry of the images.
        environ: settings of a `builder` outside the cluster, as on a laptop.
        overlay: the folder of the kustomization.
    """

    cluster: Cluster
    namespace: str
    mlflow: str
    registry: str
    overlay: Path
    environ: dict[str, str] = field(default_factory=dict)

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """Run kubectl in the namespace."""
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, **options)

    def get(self, *arguments: str) -> Any:
        """Return objects of the namespace."""
        return self.cluster.get(f"--namespace={self.namespace}", *arguments)

    def jobs(self) -> list[dict[str, Any]]:
        """Return the Jobs of versions."""
        found: list[dict[str, Any]] = self.get("jobs", "-l", "app.kubernetes.io/component=publish")
        return found

    def builder(self, *arguments: str, timeout: float = LONG_HANG, **environ: str) -> Done:
        """Run `builder` here, with the administrator's kubeconfig."""
        process = self.start_builder(*arguments, **environ)
        stdout, stderr = process.communicate(timeout=timeout)
        return Done(process.returncode, stdout, stderr)

    def start_builder(self, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        """Start `builder` here."""
        return subprocess.Popen(
            [sys.executable, "-m", "builder", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environ(**{**self.environ, **environ}),
        )

    def sweep(self, name: str = "sweep", *, ends: str = "Complete") -> str:
        """Run the sweep's CronJob now, wait for its end, which is `ends`, and return its log."""
        self.kubectl("create", "job", name, "--from=cronjob/builder-sweep")
        ended = self.ended(name)
        log = self.log_of(name)
        assert ended == ends, log
        self.kubectl("delete", "job", name)
        return log

    def ended(self, job: str) -> str:
        """Wait for the end of a Job, and return how it ended: Complete or Failed."""
        types = "{.status.conditions[-1:].type}"
        return self.cluster.watch(f"job/{job}", types, JOB_ENDED, namespace=self.namespace)

    def pod_of(self, job: str) -> dict[str, Any]:
        """Return the last Pod of a Job, once there is one."""
        select = ("-l", f"batch.kubernetes.io/job-name={job}", "--sort-by=.metadata.creationTimestamp")
        return dict(until(lambda: self.get("pods", *select))[-1])

    def log_of(self, job: str) -> str:
        """Return the log of the last Pod of a Job."""
        return self.kubectl("logs", self.pod_of(job)["metadata"]["name"])

    def phase(self, pod: str, *phases: str) -> str:
        """Wait until a Pod has one of some phases."""
        return self.cluster.watch(f"pod/{pod}", "{.status.phase}", phases, namespace=self.namespace)

    def patch_template(self, method: str, *operations: Mapping[str, Any]) -> None:
        """Change a template, as an operator's overlay would."""
        self.kubectl("patch", "cronjob", f"builder-publish-{method}", "--type=json", "-p", json.dumps(operations))
        wait_for_templates(self.cluster, self.namespace)

    def patch_settings(self, **values: str) -> None:
        """Change settings."""
        self.kubectl("patch", "configmap", "builder-settings", "--type=merge", "-p", json.dumps({"data": values}))


def copy_of(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Job that the sweep makes of a template, a CronJob, for a version."""
    made = copy.deepcopy(template["spec"]["jobTemplate"])
    version = {"builder/model-name": "Modell für Pumpe 7", "builder/model-version": "8"}
    names = {"builder/target": "pltr_foundry", "builder/model": "Modell-fur-Pumpe-7", "builder/version": "8"}
    pod = made["spec"]["template"]["metadata"]
    pod["labels"] |= names
    pod.setdefault("annotations", {}).update(version)
    metadata = {
        "name": template["metadata"]["name"].removeprefix("builder-"),
        "labels": made["metadata"]["labels"] | names,
        "annotations": version
        | {"builder/source-id": "8d1f", "builder/target": "pltr_foundry", "builder/made-by": "sweep"},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": made["spec"]}


def wait_for_templates(cluster: Cluster, namespace: str) -> None:
    """Wait until the policies know the templates as they are: the sweep's copies of them are admitted."""
    here, account = f"--namespace={namespace}", f"--as=system:serviceaccount:{namespace}:builder-sweep"
    refusals = []

    def admitted(job: dict[str, Any]) -> bool:
        try:
            cluster.kubectl(here, "create", "--dry-run=server", account, "-f", "-", documents=[job])
        except KubectlFailed as error:
            if "forbidden" not in str(error):
                raise
            refusals.append(str(error))
            return False
        return True

    for template in cluster.get(here, "cronjobs", "-l", "app.kubernetes.io/component=publish"):
        try:
            until(partial(admitted, copy_of(template)))
        except AssertionError as error:
            raise AssertionError(*refusals[-1:]) from error


def small_requests(overlay: str) -> list[dict[str, Any]]:
    """Return patches with which many Pods fit onto the node of the tests."""
    small = {"cpu": "50m", "memory": "64Mi", "ephemeral-storage": "16Mi"}
    patches = [patch(".*", f"{TEMPLATE_POD}/containers/0/resources/requests", small)]
    if overlay == "dockerfile":
        patches += [
            patch("builder-publish-dockerfile", f"{TEMPLATE_POD}/initContainers/{number}/resources/requests", small)
            for number in range(3)
        ]
    return patches


def pump_files(folder: Path) -> dict[str, bytes]:
    """Return the files of the pump alarm, whose server needs one small wheel."""
    save_pump_model(folder / "mymodel")
    shutil.copytree(HERE / "pump_alarm" / "client", folder / "client")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def register_pump(uri: str, files: Mapping[str, str | bytes], name: str, **tags: str) -> Registered:
    """Register a version of the pump alarm."""
    tags = {"MODEL_ENTRY_POINT": "serve.py", "MODEL_PLATFORMS": native_platform(), **tags}
    return register(uri, files, tags, name=name)


def tagged(new_pump: Callable[..., Registered], site: Site, **tags: str) -> Registered:
    """Register a version that the site's sweep selects."""
    return new_pump(**{site.environ["TARGET_TAG"]: "true", **tags})


def submit(site: Site, version: Registered, *options: str, **environ: str) -> Done:
    """Run `builder submit` for a version."""
    arguments = ("submit", version.name, version.version, "-n", site.namespace)
    return site.builder(*arguments, *options, **environ)


def outcome(site: Site, version: Registered) -> dict[str, str]:
    """Return what was recorded of a version for the site's target."""
    return version.outcome(site.environ["TARGET_TAG"].lower().removeprefix("external_target_"))


def wait_for(lines: Iterable[str] | None, text: str) -> str:
    """Read lines until one has a text, and return that one."""
    read = []
    for line in lines or ():
        if text in line:
            return line
        read.append(line)
    message = f"no line with {text!r} in {''.join(read)}"
    raise AssertionError(message)


def answers(site: Site, image: str) -> Any:
    """Run an image that was published as a Pod of a site, and return what it predicts for the pump alarm's readings."""
    return answer(site.cluster, site.namespace, image, pull_secret="builder-registry-push")


def answer(cluster: Cluster, namespace: str, image: str, *, pull_secret: str) -> Any:
    """Run an image of the pump alarm as a Pod, with a Secret that may pull it, and return what it predicts."""
    context = {
        "runAsUser": 10001,
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "pump",
        "image": image,
        "securityContext": context,
        "readinessProbe": {"httpGet": {"path": "/ping", "port": 8080}, "periodSeconds": 1},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "containers": [container],
        "imagePullSecrets": [{"name": pull_secret}],
        "automountServiceAccountToken": False,
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    name = f"pump-{uuid.uuid4().hex[:6]}"
    cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}, namespace=namespace)
    ready = '{.status.conditions[?(@.type=="Ready")].status}'
    cluster.watch(f"pod/{name}", ready, ("True",), namespace=namespace)
    address = cluster.get(f"--namespace={namespace}", "pod", name)["status"]["podIP"]
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://{address}:8080/invocations", json.dumps(READINGS).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=HANG) as found:
        return json.loads(found.read())
