"""What is computed for the cluster without one: names, labels, copies of templates, pauses; and what Pods' statuses mean.

The statuses are those that a kubelet 1.34 wrote, cut to what is read. Real ones are in tests/cluster/.
"""

from __future__ import annotations

import copy
import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.api import (
    BuildFailed,
    Cluster,
    InvalidSettings,
    MissedDeadline,
    ModelVersion,
    Outcome,
    OverBudget,
    PodLost,
    PodNotStarted,
    ServiceUnavailable,
    Settings,
    TryAgain,
    VersionCrashed,
)
from builder.cluster.api_server import lines_of
from builder.cluster.follow import show_line
from builder.cluster.job import job_name, job_of, label
from builder.cluster.pods import ending, exit_code, image_of, not_started, stuck
from builder.cluster.reconcile import next_try
from tests.waiting import HANG

K8S = Path(__file__).parents[1] / "k8s"
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
MODELS = st.text(min_size=1, max_size=300)
VERSIONS = st.integers(1, 10**10 - 1).map(str)
WHEELS = yaml.safe_load((K8S / "base" / "publish-wheels.yaml").read_text())


def version(name="pump", number="3"):
    return ModelVersion(name=name, version=number, created_ms=1, source="runs:/x/mymodel")


@given(target=MODELS, name=MODELS, number=VERSIONS)
def test_names_and_labels_are_such_as_kubernetes_takes(target, name, number):
    found = job_name(target, version(name, number))
    assert NAME.fullmatch(found)
    # A Pod's name has six characters more.
    assert len(found) <= 57
    assert LABEL.fullmatch(label(name))


def test_versions_that_look_alike_have_jobs_of_their_own():
    names = ["pump alarm", "pump-alarm", "Pump alarm", "pump", "p\u00fcmp alarm", "\u30dd\u30f3\u30d7", "\u6a5f\u68b0"]
    found = {job_name(target, version(name, "12")) for name in names for target in ("a", "b")}
    found |= {job_name("a", version("pump1", "2")), job_name("a", version("pump", "12"))}
    assert len(found) == 2 * len(names) + 1


@given(name=MODELS)
def test_a_job_s_pod_is_its_template_s(name):
    template = copy.deepcopy(WHEELS)
    job = job_of(template, version(name), target="pltr_foundry")
    assert template == WHEELS
    there, here = job["spec"], template["spec"]["jobTemplate"]["spec"]
    assert there["template"]["spec"] == here["template"]["spec"]
    assert {key: there[key] for key in there if key != "template"} == {
        key: here[key] for key in here if key != "template"
    }
    added = there["template"]["metadata"]["annotations"].items() - here["template"]["metadata"]["annotations"].items()
    assert dict(added) == {"builder/model-name": name, "builder/model-version": "3"}


def settings(**environ):
    return Settings.from_environ({"MLFLOW_TRACKING_URI": "https://mlflow.test", "REGISTRY_URL": "r.test/x", **environ})


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(0, 300), (1, 300), (2, 600), (3, 1200), (9, 76800), (10, 86400), (99, 86400)]
)
def test_pauses_double_up_to_a_day(attempts, seconds):
    ended = datetime(2026, 11, 1, tzinfo=UTC)
    outcome = Outcome(target="t", state="failed", error="x", attempts=attempts, finished=ended.isoformat())
    found = next_try(settings(SWEEP_ATTEMPTS="100"), outcome)
    assert datetime.fromisoformat(found) == ended + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "facts",
    [{"attempts": 3}, {"error": ""}, {"finished": ""}, {"finished": "yesterday"}, {"finished": "9999-12-31T23:59:59Z"}],
)
def test_without_a_pause_there_is_no_next_try(facts):
    outcome = Outcome(target="t", state="failed", error="x", attempts=1, finished="2026-11-01T00:00:00Z")
    assert next_try(settings(), outcome.model_copy(update=facts)) == ""


def test_what_a_signal_ended_needs_no_pause():
    finished = "2026-11-01T00:00:00Z"
    outcome = Outcome(target="t", state="failed", error="Terminated: by a signal.", attempts=1, finished=finished)
    assert next_try(settings(), outcome) == finished


def pod(*, phase, init=(), main=(), **status):
    def spec(each):
        return [{"name": name} for name, _ in each]

    def statuses(each):
        return [{"name": name, "state": state} for name, state in each]

    return {
        "metadata": {"name": "publish-pump-x", "uid": "u", "creationTimestamp": "2026-11-01T00:00:00Z"},
        "spec": {"initContainers": spec(init), "containers": spec(main)},
        "status": {
            "phase": phase,
            "initContainerStatuses": statuses(init),
            "containerStatuses": statuses(main),
            **status,
        },
    }


def ended(code, reason="Error", message=""):
    return {
        "terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-11-01T00:01:00Z"}
    }


def waits(reason, message=""):
    return {"waiting": {"reason": reason, "message": message}}


INITIALIZING = ("push", waits("PodInitializing"))


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (waits("ImagePullBackOff", 'Back-off pulling image "r.test/b:1"'), "ImagePullBackOff"),
        (waits("CreateContainerConfigError", 'secret "builder-mlflow" not found'), "builder-mlflow"),
        (waits("InvalidImageName", 'couldn\'t parse image name "r.test/B"'), "r.test/B"),
    ],
)
def test_a_container_that_waits_for_what_is_not_there_is_named_with_the_reason(state, named):
    error = not_started([pod(phase="Pending", init=[("fetch", state)], main=[INITIALIZING])], ())
    assert isinstance(error, PodNotStarted)
    assert "fetch" in error.what
    assert named in error.what


def test_a_pod_that_only_begins_is_not_hindered():
    assert not_started([pod(phase="Pending", main=[("publish", waits("ContainerCreating"))])], ()) is None
    assert not_started([pod(phase="Running", main=[("publish", {"running": {}})])], ()) is None
    assert not_started([], ()) is None


def mount(message, count=1):
    return {"reason": "FailedMount", "message": f'MountVolume.SetUp failed for volume "x" : {message}', "count": count}


def test_a_volume_that_a_busy_node_mounts_a_moment_later_is_no_hindrance():
    waiting = [pod(phase="Pending", main=[("publish", waits("ContainerCreating"))])]
    late = "failed to sync configmap cache: timed out waiting for the condition"
    assert not_started(waiting, [mount(late)]) is None
    absent = 'secret "not-there" not found'
    assert absent in not_started(waiting, [mount(absent), mount(late)]).what
    # It lasts.
    assert late in not_started(waiting, [mount(late, count=20)]).what


def test_of_what_a_kubelet_says_of_a_volume_the_cause_is_told():
    waiting = [pod(phase="Pending", main=[("publish", waits("ContainerCreating"))])]
    absent = 'secret "not-there" not found'
    summary = {"reason": "FailedMount", "message": "Unable to attach or mount volumes: unmounted volumes=[registry]"}
    assert absent in not_started(waiting, [mount(absent), summary]).what
    # Where it says nothing else.
    assert "unmounted" in not_started(waiting, [summary]).what


def test_a_configuration_that_a_busy_node_reads_a_moment_later_is_no_hindrance(monkeypatch):
    monkeypatch.setattr("builder.cluster.pods._SOON", HANG)
    late = waits("CreateContainerConfigError", "failed to sync configmap cache: timed out waiting for the condition")
    young, old = (pod(phase="Pending", main=[("publish", late)]) for _ in range(2))
    young["metadata"]["creationTimestamp"] = datetime.now(tz=UTC).isoformat()
    assert not_started([young], ()) is None
    assert "configmap cache" in not_started([old], ()).what


def test_a_quota_and_a_refusal_have_remedies_of_their_own():
    def event(message):
        return [{"reason": "FailedCreate", "message": message}]

    quota = not_started([], event('pods "x" is forbidden: exceeded quota: small, requested: pods=1'))
    security = not_started([], event('pods "x" is forbidden: violates PodSecurity "restricted:latest"'))
    assert "quota" in quota.remedy
    assert "docs/kubernetes.md" in security.remedy


def test_a_pod_whose_next_container_never_comes_is_told_from_one_that_waits():
    killed = pod(
        phase="Pending", init=[("fetch", ended(0, "Completed")), ("build", ended(0, "OOMKilled"))], main=[INITIALIZING]
    )
    assert isinstance(stuck(killed), OverBudget)
    waiting = pod(
        phase="Pending", init=[("fetch", ended(0, "Completed")), ("build", {"running": {}})], main=[INITIALIZING]
    )
    assert stuck(waiting) is None


def job(reason="BackoffLimitExceeded", message="Job has reached the specified backoff limit"):
    condition = {"type": "Failed", "status": "True", "reason": reason, "message": message}
    return {
        "metadata": {"name": "publish-pump", "uid": "u", "creationTimestamp": "2026-11-01T00:00:00Z"},
        "spec": {"activeDeadlineSeconds": 60},
        "status": {"conditions": [condition]},
    }


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (pod(phase="Failed", main=[("publish", ended(137, "OOMKilled"))]), OverBudget),
        (pod(phase="Failed", main=[("publish", ended(137))]), PodLost),
        (pod(phase="Failed", main=[("publish", ended(139))]), VersionCrashed),
        (
            pod(phase="Failed", main=[("publish", ended(69, message='{"error": "ServiceUnavailable: away"}'))]),
            ServiceUnavailable,
        ),
        (pod(phase="Failed", main=[("publish", ended(78, message="not JSON"))]), InvalidSettings),
        (pod(phase="Failed", init=[("build", ended(0))], main=[("push", ended(73))]), BuildFailed),
        (
            pod(
                phase="Failed", reason="Evicted", message='Usage of EmptyDir volume "scratch" exceeds the limit "4Gi".'
            ),
            OverBudget,
        ),
        (
            pod(
                phase="Failed",
                reason="Evicted",
                message='Container publish exceeded its local ephemeral storage limit "1Gi".',
            ),
            OverBudget,
        ),
        (pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."), PodLost),
    ],
)
def test_the_end_of_a_pod_is_typed(found, kind):
    assert type(ending(job(), [found])) is kind


def test_a_sidecar_s_end_says_nothing_of_the_publisher():
    sidecar = [("smoke", ended(77, message='{"error": "PermissionRefused: lies"}'))]
    found = pod(phase="Failed", init=sidecar, main=[("push", ended(65, message='{"error": "SmokeTestFailed: it"}'))])
    found["spec"]["initContainers"][0]["restartPolicy"] = "Always"
    assert exit_code(found) == 65
    assert ending(job(), [found]).what == "it"
    killed = pod(phase="Pending", init=[("smoke", ended(0, "OOMKilled"))], main=[INITIALIZING])
    killed["spec"]["initContainers"][0]["restartPolicy"] = "Always"
    assert stuck(killed) is None


def test_a_run_step_that_kills_its_engine_is_the_version_s_own_fault():
    killed = pod(phase="Failed", init=[("fetch", ended(0)), ("build", ended(75))], main=[INITIALIZING])
    assert type(ending(job(), [killed])) is VersionCrashed
    away = pod(phase="Failed", init=[("fetch", ended(75, message='{"error": "TryAgain: later"}'))], main=[INITIALIZING])
    assert type(ending(job(), [away])) is TryAgain


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"event": "x", "method_name": "y"}', '{"event": "x", "level": "NOTSET"}', '{"event": "x", "level": 5}',
     '{"event": "x", "exc_info": true, "stack": 1, "self": 1, "container": "push"}', '{"event": 1}', "\ud800", ""],
)  # fmt: skip
def test_any_line_of_a_container_is_shown_under_its_name(line, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("builder"), "propagate", True)
    caplog.set_level(logging.INFO, logger="builder")
    show_line(line, container="build")
    (record,) = caplog.records
    assert record.msg["container"] == "build"


def test_a_log_without_lines_comes_in_pieces():
    found = list(lines_of([b"a\nb", b"c\n"] + [b"x" * 1000] * 200))
    assert found[:2] == ["a", "bc"]
    assert "".join(found[2:]) == "x" * 200_000
    assert max(map(len, found)) < 70_000


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "x", "users: 3", "{clusters: [], contexts: [], users: []}", "a: {b: c}"]
)
def test_a_kubeconfig_that_is_none_is_a_matter_of_the_settings(text, tmp_path, monkeypatch):
    path = tmp_path / "config"
    path.write_text(text)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    with pytest.raises(InvalidSettings, match="KUBECONFIG"):
        Cluster()


def test_a_deadline_is_told_before_all_else():
    error = ending(job("DeadlineExceeded", "Job was active longer than specified deadline"), [])
    assert type(error) is MissedDeadline
    assert "60 seconds" in error.what


def test_nobody_believes_what_the_build_container_says():
    lie = '{"image": "r.test/evil@sha256:0", "error": "InvalidVersion: lies"}'
    found = pod(phase="Failed", init=[("build", ended(70, message=lie))], main=[INITIALIZING])
    assert "lies" not in ending(job(), [found]).what
    good = pod(
        phase="Succeeded",
        init=[("build", ended(0, message=lie))],
        main=[("push", ended(0, message='{"image": "r.test/x@y"}'))],
    )
    assert image_of(good) == "r.test/x@y"
    assert exit_code(good) == 0
