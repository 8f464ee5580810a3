"""The manifests: valid by Kubernetes' own schema, and in agreement with the program that they start."""

import copy
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from builder import cli
from builder.errors import ExitCode
from builder.settings import BuildSettings, Settings

FOLDER = Path(__file__).parents[1] / "k8s"
# The oldest and the newest release that somebody may run: podFailurePolicy is stable since 1.31.
RELEASES = ("1.31", kubernetes_validate.latest_version())
RETRYABLE = {ExitCode.OK, ExitCode.UNAVAILABLE, ExitCode.TEMPORARY}
# What the image sets by itself: the Dockerfile's variables, and those of the official Kaniko image.
IMAGE = {
    "PATH": "/kaniko/bin:/usr/local/bin:/kaniko",
    "HOME": "/kaniko/tmp",
    "USER": "root",
    "DOCKER_CONFIG": "/kaniko/.docker",
    "DOCKER_CREDENTIAL_GCR_CONFIG": "/kaniko/.config/gcloud/docker_credential_gcr_config.json",
    "SSL_CERT_DIR": "/kaniko/ssl/certs",
}
KANIKO_OWNS = {"Dockerfile", "stages", "bases", "buildcontext", "deps", "layers", "secrets", "swap", "caches"}


SWEEPS = ("cronjob.yaml", "cronjob-wheels.yaml")


def documents(name):
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


def every_document():
    return [
        pytest.param(document, id=f"{path.name}-{document['kind']}-{number}")
        for path in sorted(FOLDER.glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for number, document in enumerate(documents(path.name))
    ]


def job_specs():
    return {
        "job.yaml": documents("job.yaml")[0]["spec"],
        "job-single.yaml": documents("job-single.yaml")[0]["spec"],
        **{name: documents(name)[0]["spec"]["jobTemplate"]["spec"] for name in SWEEPS},
    }


def containers(spec):
    pod = spec["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def config_maps():
    return {document["metadata"]["name"]: document["data"] for document in documents("settings.yaml")}


def environment(container):
    """Return the variables that a container gets, those of its ConfigMaps included."""
    maps = config_maps()
    found = {}
    for source in container["envFrom"]:
        found |= maps[source["configMapRef"]["name"]]
    return found | {entry["name"]: entry["value"] for entry in container.get("env", [])}


def variables(kind):
    return {field.validation_alias for field in kind.model_fields.values() if field.validation_alias}


every_job = pytest.mark.parametrize("name", ["job.yaml", "job-single.yaml", *SWEEPS])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("document", every_document())
def test_valid_by_the_schema_of_kubernetes(document, release):
    kubernetes_validate.validate(document, release, strict=True)


def test_the_schema_refuses_what_is_wrong():
    wrong = copy.deepcopy(documents("job.yaml")[0])
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFilesystem"):
        kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomization_holds_the_sweep_and_what_it_needs():
    rendered = subprocess.run(["kubectl", "kustomize", str(FOLDER)], check=True, capture_output=True, text=True).stdout
    kinds = sorted((document["kind"], document["metadata"]["name"]) for document in yaml.safe_load_all(rendered))
    assert kinds == [
        ("ConfigMap", "builder-network"),
        ("ConfigMap", "builder-settings"),
        ("CronJob", "builder-sweep"),
        ("ServiceAccount", "builder"),
    ]
    for document in yaml.safe_load_all(rendered):
        kubernetes_validate.validate(document, RELEASES[-1], strict=True)


@every_job
def test_commands_exist(name):
    for container in containers(job_specs()[name]):
        (command,) = container["args"]
        assert command in cli.builder.commands
        assert "command" not in container  # the image's entry point


def test_phases_run_in_order():
    assert [container["args"] for container in containers(job_specs()["job.yaml"])] == [["fetch"], ["build"], ["push"]]


@every_job
def test_every_variable_is_a_setting(name):
    for container in containers(job_specs()[name]):
        kind = BuildSettings if container["args"] == ["build"] else Settings
        assert set(environment(container)) <= variables(kind), container["name"]


@every_job
def test_the_settings_of_every_container_can_be_read(name, tmp_path):
    for container in containers(job_specs()[name]):
        kind = BuildSettings if container["args"] == ["build"] else Settings
        require = ("MODEL_NAME", "MODEL_VERSION") if container["args"] in (["fetch"], ["publish"]) else ()
        environ = environment(container) | {"SECRETS_DIR": str(tmp_path)}
        if "DOCKER_CONFIG" in environ:
            # The Secret is not mounted here.
            (tmp_path / "config.json").write_text("{}")
            environ["DOCKER_CONFIG"] = str(tmp_path)
        kind.from_environ(environ, require)


@every_job
def test_only_exit_codes_that_cannot_get_better_end_the_job(name):
    ignore, fail = job_specs()[name]["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"operator": "In", "values": sorted(set(ExitCode) - RETRYABLE)}


@every_job
def test_jobs_are_bounded(name):
    spec = job_specs()[name]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 0
    for container in containers(spec):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}
        assert container["resources"]["limits"].keys() >= {"memory", "ephemeral-storage"}
        assert container["terminationMessagePath"] == Settings.model_fields["termination_log"].default.as_posix()
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_never_overtakes_itself(name):
    assert documents(name)[0]["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_sweep_without_an_engine_may_do_nothing_that_an_engine_needs():
    (sweep,) = containers(job_specs()["cronjob-wheels.yaml"])
    context = sweep["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert environment(sweep)["BUILD_METHOD"] == "wheels"
    assert "TRUST_DOCKERFILE_AUTHORS" not in environment(sweep)


@pytest.mark.parametrize("name", ["job.yaml", "job-single.yaml"])
def test_a_job_can_be_created_again(name):
    metadata = documents(name)[0]["metadata"]
    assert "name" not in metadata
    assert metadata["generateName"]


def test_only_build_is_root():
    for container in containers(job_specs()["job.yaml"]):
        context = container["securityContext"]
        if container["name"] == "build":
            assert context["runAsUser"] == 0
            continue
        assert context["runAsUser"] > 0
        assert context["runAsNonRoot"] is True
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert "add" not in context["capabilities"]


def test_build_sees_no_credential_and_writes_two_things():
    spec = job_specs()["job.yaml"]
    _, build, _ = containers(spec)
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in build["volumeMounts"]} == {"workspace"}
    assert "emptyDir" in volumes["workspace"]
    writable = {mount.get("subPath", "") for mount in build["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"layouts", "result.json"}
    assert "env" not in build
    assert build["envFrom"] == [{"configMapRef": {"name": "builder-network"}}]
    assert not BuildSettings.from_environ(IMAGE | environment(build)).holds_credential


def test_push_writes_nothing_into_the_workspace():
    *_, push = containers(job_specs()["job.yaml"])
    (workspace,) = [mount for mount in push["volumeMounts"] if mount["name"] == "workspace"]
    assert workspace["readOnly"] is True


def test_fetch_and_push_have_credentials_of_their_own():
    fetch, _, push = containers(job_specs()["job.yaml"])
    secrets = {
        volume["name"]: volume["secret"]["secretName"]
        for volume in job_specs()["job.yaml"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    mounted = [
        {secrets[mount["name"]] for mount in container["volumeMounts"] if mount["name"] in secrets}
        for container in (fetch, push)
    ]
    assert mounted == [{"builder-mlflow", "builder-registry-pull"}, {"builder-mlflow", "builder-registry-push"}]


@pytest.mark.parametrize("name", ["job-single.yaml", "cronjob.yaml"])
def test_one_container_says_what_it_gives_up(name):
    (container,) = containers(job_specs()[name])
    assert environment(container)["TRUST_DOCKERFILE_AUTHORS"] == "true"
    assert "What is given up" in (FOLDER / name).read_text()


def test_three_containers_need_no_trust():
    for container in containers(job_specs()["job.yaml"]):
        assert "TRUST_DOCKERFILE_AUTHORS" not in environment(container)


@every_job
def test_nothing_is_mounted_where_kaniko_deletes(name):
    """Kaniko removes some folders below its own after a build, and everything that is neither there nor mounted."""
    for container in containers(job_specs()[name]):
        for mount in container["volumeMounts"]:
            _, root, first, *_ = mount["mountPath"].split("/")
            assert root == "kaniko"
            assert first not in KANIKO_OWNS
