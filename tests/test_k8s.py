"""The manifests: valid by Kubernetes' own schema, and in agreement with the program that they start."""

import copy
import os
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from builder import cli
from builder.errors import ExitCode
from builder.listener.server import GRACE
from builder.settings import BuildSettings, ListenSettings, Settings
from scripts import manifests

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
# What the Downward API gives: from the annotations that `submit` and `sweep` write, and from the Job's identity.
ANNOTATIONS = {
    "metadata.annotations['builder/model-name']": "Modell für Pumpe 7",
    "metadata.annotations['builder/model-version']": "8",
    "metadata.annotations['builder/force']": "",
    "metadata.annotations['builder/rebuild']": "true",
    "metadata.labels['batch.kubernetes.io/controller-uid']": "0b6f1a5e-6c0e-4b43-8b0c-3d1c6a1f3f6d",
}
WHEELS, DOCKERFILE, SWEEP, JOB = (
    "base/publish-wheels.yaml",
    "dockerfile/publish-dockerfile.yaml",
    "base/sweep.yaml",
    "job.yaml",
)
WARM, LISTENER = "warm/warm.yaml", "base/listener.yaml"
EVERY = (WHEELS, DOCKERFILE, SWEEP, JOB, WARM)
THREE_PHASES = (DOCKERFILE, JOB)
# Those that use the Kubernetes API.
WITH_TOKEN = (SWEEP, LISTENER)

every_job = pytest.mark.parametrize("name", EVERY)
every_pod = pytest.mark.parametrize("name", [*EVERY, LISTENER])
three_phases = pytest.mark.parametrize("name", THREE_PHASES)


def documents(name):
    return [document for document in yaml.safe_load_all((FOLDER / name).read_text()) if document]


def kustomizations():
    """Return every kustomization below k8s/, by its folder."""
    found = sorted(FOLDER.rglob("kustomization.yaml"))
    return {path.parent.relative_to(FOLDER).as_posix(): yaml.safe_load(path.read_text()) for path in found}


def every_document():
    """Return the documents of every file that a kustomization lists as a resource, and of the files for themselves."""
    names = {
        (Path(folder) / resource).as_posix()
        for folder, kustomization in kustomizations().items()
        for resource in kustomization.get("resources", [])
        if resource.endswith(".yaml")
    }
    return [
        pytest.param(document, id=f"{name}-{document['kind']}-{document['metadata'].get('name', '')}")
        for name in sorted(names | {"job.yaml", "cronjob.yaml"})
        for document in documents(name)
        # The operator's own kinds are not Kubernetes'; promtool reads the rules in tests/listener.
        if not document["apiVersion"].startswith("monitoring.coreos.com/")
    ]


def job_spec(name):
    """Return the spec of a Job, or of the Deployment."""
    document = next(each for each in documents(name) if "template" in str(each["spec"]))
    return document["spec"]["jobTemplate"]["spec"] if document["kind"] == "CronJob" else document["spec"]


def containers(spec):
    pod = spec["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def config_maps(name):
    """Return the ConfigMaps that a manifest's containers find."""
    maps = {document["metadata"]["name"]: document["data"] for document in documents("base/settings.yaml")}
    if name in THREE_PHASES:
        for document in documents("dockerfile/settings.yaml"):
            maps[document["metadata"]["name"]] |= document["data"]
    return maps


def environment(name, container):
    """Return the variables that a container gets, those of its ConfigMaps and of the Downward API included."""
    maps = config_maps(name)
    found = {}
    for source in container["envFrom"]:
        found |= maps[source["configMapRef"]["name"]]
    for entry in container.get("env", []):
        found[entry["name"]] = (
            entry["value"] if "value" in entry else ANNOTATIONS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        )
    return found


def variables(kind):
    return {field.validation_alias for field in kind.model_fields.values() if field.validation_alias}


def settings_of(container):
    return {"build": BuildSettings, "listen": ListenSettings}.get(container["args"][0], Settings)


def secrets_of(spec, container):
    """Return the Secrets that a container mounts."""
    secrets = {
        volume["name"]: {volume["secret"]["secretName"]}
        if "secret" in volume
        else {source["secret"]["name"] for source in volume["projected"]["sources"]}
        for volume in spec["template"]["spec"]["volumes"]
        if "secret" in volume or "projected" in volume
    }
    mounted = [secrets.get(mount["name"], set()) for mount in container["volumeMounts"]]
    return set().union(*mounted)


def selects(selector, labels):
    """Return whether a selector of Pods selects some labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    one_of = (
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )
    return wanted and all(one_of)


def assert_confined(container):
    context = container["securityContext"]
    assert context["runAsUser"] > 0
    assert context["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("document", every_document())
def test_valid_by_the_schema_of_kubernetes(document, release):
    kubernetes_validate.validate(document, release, strict=True)


def test_the_schema_refuses_what_is_wrong():
    (wrong,) = copy.deepcopy(documents(JOB))
    wrong["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRootFilesystem"):
        kubernetes_validate.validate(wrong, RELEASES[-1], strict=True)


def rendered(folder):
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], check=True, capture_output=True, text=True)
    found = [document for document in yaml.safe_load_all(done.stdout) if document]
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")


@needs_kubectl
@pytest.mark.parametrize(
    "folder", sorted(name for name, each in kustomizations().items() if each["kind"] == "Kustomization")
)
def test_every_overlay_is_valid_and_names_an_image_with_a_tag(folder):
    for document in rendered(folder).values():
        kubernetes_validate.validate(document, RELEASES[-1], strict=True)
        if document["kind"] == "CronJob":
            for container in containers(document["spec"]["jobTemplate"]["spec"]):
                _, _, tag = container["image"].partition(":")
                assert tag not in ("", "latest")


@needs_kubectl
def test_cronjob_yaml_is_the_base():
    single_file = {(document["kind"], document["metadata"]["name"]): document for document in documents("cronjob.yaml")}
    assert single_file == rendered("base") == rendered(".")


@needs_kubectl
def test_job_yaml_is_a_copy_of_the_template():
    (job,) = documents(JOB)
    template = rendered("dockerfile")["CronJob", "builder-publish-dockerfile"]["spec"]["jobTemplate"]
    version = {"builder/model-name": "pltr_foundry_model", "builder/model-version": "8"}
    template["spec"]["template"]["metadata"]["annotations"] |= version
    assert job["spec"] == template["spec"]
    assert job["metadata"]["labels"] == template["metadata"]["labels"]


def test_the_files_for_themselves_are_those_of_the_base():
    assert (FOLDER / "job.yaml").read_text() == manifests.job()
    assert (FOLDER / "cronjob.yaml").read_text() == manifests.cronjob()


@every_pod
def test_commands_exist(name):
    for container in containers(job_spec(name)):
        command, *options = container["args"]
        assert "command" not in container  # the image's entry point
        assert command in cli.builder.commands
        known = {option for each in cli.builder.commands[command].params for option in each.opts}
        assert set(options) <= known


@three_phases
def test_phases_run_in_order(name):
    phases = [container["args"] for container in containers(job_spec(name))]
    assert phases == [["preflight"], ["fetch"], ["build"], ["push"]]


def test_wheels_need_one_container():
    (publish,) = containers(job_spec(WHEELS))
    assert publish["args"] == ["publish"]
    assert environment(WHEELS, publish)["BUILD_METHOD"] == "wheels"


@every_pod
def test_every_variable_is_a_setting(name):
    for container in containers(job_spec(name)):
        known = variables(settings_of(container))
        assert set(environment(name, container)) <= known, container["name"]


@every_pod
def test_the_settings_of_every_container_can_be_read(name, tmp_path):
    for container in containers(job_spec(name)):
        require = (
            () if container["args"][0] in ("build", "push", "sweep", "listen") else ("MODEL_NAME", "MODEL_VERSION")
        )
        environ = environment(name, container) | {"SECRETS_DIR": str(tmp_path)}
        if "DOCKER_CONFIG" in environ:
            # The Secret is not mounted here.
            (tmp_path / "config.json").write_text("{}")
            environ["DOCKER_CONFIG"] = str(tmp_path)
        settings_of(container).from_environ(environ, require)


@every_job
def test_only_exit_codes_that_cannot_get_better_end_the_job(name):
    ignore, fail = job_spec(name)["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"operator": "In", "values": sorted(set(ExitCode) - RETRYABLE)}


@every_job
def test_jobs_are_bounded(name):
    spec = job_spec(name)
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 0
    for container in containers(spec):
        assert container["resources"]["requests"].keys() >= {"cpu", "memory", "ephemeral-storage"}
        assert container["resources"]["limits"].keys() >= {"memory", "ephemeral-storage"}
        assert container["terminationMessagePath"] == Settings.model_fields["termination_log"].default.as_posix()
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


@every_pod
def test_only_the_sweep_and_the_listener_have_a_token(name):
    pod = job_spec(name)["template"]["spec"]
    assert pod["automountServiceAccountToken"] is (name in WITH_TOKEN)
    assert pod["serviceAccountName"] == ("builder-sweep" if name in WITH_TOKEN else "builder-publish")
    for document in documents("base/accounts.yaml"):
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False


@every_pod
def test_the_labels_and_the_default_container_of_pods(name):
    metadata = job_spec(name)["template"]["metadata"]
    labels = metadata["labels"]
    assert labels["app.kubernetes.io/name"] == labels["app.kubernetes.io/part-of"] == "builder"
    component = {SWEEP: "sweep", LISTENER: "listener", WARM: "warm"}.get(name, "publish")
    assert labels["app.kubernetes.io/component"] == component
    methods = {WHEELS: "wheels", SWEEP: None, LISTENER: None, WARM: "warm"}
    assert labels.get("builder/method") == methods.get(name, "dockerfile")
    default = metadata["annotations"]["kubectl.kubernetes.io/default-container"]
    assert default == containers(job_spec(name))[-1]["name"]


@pytest.mark.parametrize("name", [WHEELS, DOCKERFILE, WARM])
def test_a_template_never_starts_by_itself(name):
    (template,) = documents(name)
    assert template["spec"]["suspend"] is True
    assert template["spec"]["schedule"] == "0 0 31 2 *"
    assert template["metadata"]["labels"]["builder/method"] == template["metadata"]["name"].rpartition("-")[2]


def test_a_sweep_never_overtakes_itself_and_keeps_its_last_runs():
    (sweep,) = documents(SWEEP)
    assert sweep["spec"]["concurrencyPolicy"] == "Forbid"
    assert sweep["spec"]["successfulJobsHistoryLimit"] == sweep["spec"]["failedJobsHistoryLimit"] == 3


@pytest.mark.parametrize(
    ("name", "secrets"), [(SWEEP, {"builder-mlflow"}), (LISTENER, {"builder-mlflow", "builder-listener"})]
)
def test_who_makes_jobs_holds_no_registry_credential(name, secrets):
    spec = job_spec(name)
    (container,) = containers(spec)
    assert secrets_of(spec, container) == secrets
    assert "DOCKER_CONFIG" not in environment(name, container)


def test_the_listener_is_asked_where_it_answers():
    service = next(each for each in documents(LISTENER) if each["kind"] == "Service")
    spec = job_spec(LISTENER)
    (listener,) = containers(spec)
    settings = ListenSettings.model_fields
    ports = {port["name"]: port["containerPort"] for port in listener["ports"]}
    assert ports == {"http": settings["listen_port"].default, "metrics": settings["metrics_port"].default}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports.keys()
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert {listener[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "liveness", "readiness")} == {"metrics"}
    pause = listener["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > pause + 2 * GRACE


def test_a_warm_job_differs_from_a_publish_in_what_it_does():
    publish, warm = (copy.deepcopy(job_spec(name)["template"]["spec"]) for name in (WHEELS, WARM))
    assert warm.pop("priorityClassName") == documents("warm/priority/priority.yaml")[0]["metadata"]["name"]
    (one,), (other,) = publish.pop("containers"), warm.pop("containers")
    assert publish == warm
    written = {entry["name"] for entry in one.pop("env")} - {entry["name"] for entry in other.pop("env")}
    assert written == {"PUBLISH_FORCE", "PUBLISH_REBUILD", "ATTEMPT_ID"}
    assert (one.pop("name"), one.pop("args")) == ("publish", ["publish"])
    assert (other.pop("name"), other.pop("args")) == ("warm", ["warm"])
    assert one == other


@pytest.mark.parametrize("name", [WHEELS, SWEEP, LISTENER, WARM])
def test_nothing_of_the_base_is_root(name):
    for container in containers(job_spec(name)):
        assert_confined(container)
        assert environment(name, container)["BUILD_METHOD"] == "wheels"
        assert "TRUST_DOCKERFILE_AUTHORS" not in environment(name, container)


def test_the_sweep_s_account_may_do_what_is_listed_and_no_more():
    (role,) = [document for document in documents("base/accounts.yaml") if document["kind"] == "Role"]
    allowed = {
        (group, resource, verb): rule.get("resourceNames")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == {
        ("batch", "cronjobs", "get"): ["builder-publish-wheels", "builder-publish-dockerfile", "builder-warm"],
        **{("batch", "jobs", verb): None for verb in ("create", "get", "list", "watch", "delete")},
        # What marks those whom the policies hold to copies; there is no such resource.
        ("builder", "template-copies", "create"): None,
        **{("", "pods", verb): None for verb in ("get", "list", "watch")},
        ("", "pods/log", "get"): None,
        **{("", "events", verb): None for verb in ("create", "get", "list", "watch")},
    }


def test_a_job_can_be_created_again():
    metadata = documents(JOB)[0]["metadata"]
    assert "name" not in metadata
    assert metadata["generateName"]


@three_phases
def test_only_build_is_root(name):
    for container in containers(job_spec(name)):
        if container["name"] == "build":
            assert container["securityContext"]["runAsUser"] == 0
        else:
            assert_confined(container)


@three_phases
def test_build_sees_no_credential_and_writes_two_things(name):
    spec = job_spec(name)
    (build,) = [container for container in containers(spec) if container["name"] == "build"]
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in build["volumeMounts"]} == {"workspace"}
    assert "emptyDir" in volumes["workspace"]
    writable = {mount.get("subPath", "") for mount in build["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"layouts", "result.json"}
    assert "env" not in build
    assert build["envFrom"] == [{"configMapRef": {"name": "builder-network"}}]
    assert not BuildSettings.from_environ(IMAGE | environment(name, build)).holds_credential


@three_phases
def test_push_writes_nothing_into_the_workspace(name):
    *_, push = containers(job_spec(name))
    (workspace,) = [mount for mount in push["volumeMounts"] if mount["name"] == "workspace"]
    assert workspace["readOnly"] is True


@three_phases
def test_each_phase_has_credentials_of_its_own(name):
    spec = job_spec(name)
    assert {container["name"]: secrets_of(spec, container) for container in containers(spec)} == {
        "preflight": {"builder-mlflow", "builder-registry-push"},
        "fetch": {"builder-mlflow", "builder-registry-pull"},
        "build": set(),
        "push": {"builder-mlflow", "builder-registry-push"},
    }


@three_phases
def test_three_phases_need_no_trust(name):
    for container in containers(job_spec(name)):
        assert "TRUST_DOCKERFILE_AUTHORS" not in environment(name, container)


@every_pod
def test_nothing_is_mounted_where_kaniko_deletes(name):
    """Kaniko removes some folders below its own after a build, and everything that is neither there nor mounted."""
    for container in containers(job_spec(name)):
        for mount in container["volumeMounts"]:
            _, root, first, *_ = mount["mountPath"].split("/")
            assert root == "kaniko"
            assert first not in KANIKO_OWNS


def test_a_policy_for_every_account_and_nothing_without_one():
    policies = {each["metadata"]["name"]: each["spec"] for each in documents("base/network-policies.yaml")}
    deny = policies.pop("builder-default-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    every = (WHEELS, DOCKERFILE, SWEEP, LISTENER, WARM)
    pods = {name: job_spec(name)["template"]["metadata"]["labels"] for name in every}

    def reached(name):
        return {policy for policy, spec in policies.items() if selects(spec["podSelector"], pods[name])}

    ingress = policies.pop("builder-listener")
    assert ingress["policyTypes"] == ["Ingress"]
    assert {name for name in every if selects(ingress["podSelector"], pods[name])} == {LISTENER}
    assert {port["port"] for rule in ingress["ingress"] for port in rule["ports"]} == {8080, 9090}
    assert reached(SWEEP) == reached(LISTENER) == {"builder-dns", "builder-mlflow", "builder-api-server"}
    publish = {"builder-dns", "builder-mlflow", "builder-registry", "builder-package-index"}
    assert reached(WHEELS) == reached(WARM) == publish
    policies |= {each["metadata"]["name"]: each["spec"] for each in documents("dockerfile/network-policies.yaml")}
    assert reached(WHEELS) == publish
    assert reached(DOCKERFILE) == publish | {"builder-package-mirrors"}
    for spec in policies.values():
        assert spec["policyTypes"] == ["Egress"]
        assert "ingress" not in spec
        for rule in spec["egress"]:
            assert rule["ports"]
            for block in (peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer):
                assert block["cidr"] != "0.0.0.0/0" or "169.254.0.0/16" in block["except"]


# ---- the component warm beside others


def installed(folder, overlaid, *components, **more):
    """Return the documents of an install with components, by their kind and name."""
    folder.mkdir(exist_ok=True)
    document = {
        "resources": [os.path.relpath(FOLDER / overlaid, folder.resolve())],
        "components": [os.path.relpath(FOLDER / component, folder.resolve()) for component in components],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return rendered(folder)


def pod_template(found, name):
    return found["CronJob", name]["spec"]["jobTemplate"]["spec"]["template"]


@needs_kubectl
@pytest.mark.parametrize("cloud", ["aks", "gke", "eks"])
def test_a_warm_pod_has_the_identity_of_one_that_publishes(tmp_path, cloud):
    found = installed(tmp_path, "base", "warm", cloud)
    publish, warm = (pod_template(found, name) for name in ("builder-publish-wheels", "builder-warm"))
    assert warm["spec"]["serviceAccountName"] == publish["spec"]["serviceAccountName"]
    of_azure = "azure.workload.identity/use"
    assert warm["metadata"]["labels"].get(of_azure) == publish["metadata"]["labels"].get(of_azure)
    of_google = {"name": "GCE_METADATA_HOST", "value": "169.254.169.254"}
    assert [of_google in pod["spec"]["containers"][0]["env"] for pod in (publish, warm)] == [cloud == "gke"] * 2
    for document in found.values():
        kubernetes_validate.validate(document, RELEASES[-1], strict=True)


def test_google_s_metadata_is_reached_by_pods_without_a_dockerfile_alone():
    (policy,) = documents("gke/network-policies.yaml")
    every = (WHEELS, DOCKERFILE, SWEEP, LISTENER, WARM)
    labels = {name: job_spec(name)["template"]["metadata"]["labels"] for name in every}
    assert {name for name in every if selects(policy["spec"]["podSelector"], labels[name])} == {WHEELS, WARM}


@needs_kubectl
@pytest.mark.parametrize("cloud", ["aks", "gke"])
def test_a_cloud_s_component_needs_no_warm(tmp_path, cloud):
    assert ("CronJob", "builder-warm") not in installed(tmp_path, "base", cloud)


@needs_kubectl
def test_a_warm_pod_has_the_image_and_the_secrets_of_the_install_below(tmp_path):
    found = installed(tmp_path, "domino", "warm", namespace="domino-compute")
    publish, warm = (pod_template(found, name)["spec"] for name in ("builder-publish-wheels", "builder-warm"))
    (one,), (other,) = publish["containers"], warm["containers"]
    assert other["image"] == one["image"] == "registry.example.com/builder:0.1.0"
    volumes, wanted = ({volume["name"]: volume for volume in each["volumes"]} for each in (warm, publish))
    assert volumes["registry-push"]["secret"]["secretName"] == "domino-kaniko-secret"
    assert volumes == wanted
    assert found["CronJob", "builder-warm"]["metadata"]["namespace"] == "domino-compute"


@needs_kubectl
def test_two_targets_with_warm_share_one_priority_class(tmp_path):
    k8s = tmp_path / "k8s"
    shutil.copytree(FOLDER, k8s)
    for path, key, value in (
        ("targets/pltr-foundry", "components", "../../warm"),
        ("targets/second", "components", "../../warm"),
        ("targets", "resources", "../warm/priority"),
    ):
        file = k8s / path / "kustomization.yaml"
        kustomization = yaml.safe_load(file.read_text())
        kustomization.setdefault(key, []).append(value)
        file.write_text(yaml.safe_dump(kustomization))
    done = subprocess.run(["kubectl", "kustomize", str(k8s / "targets")], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [each for each in yaml.safe_load_all(done.stdout) if each]
    warm = [
        each["metadata"]["namespace"]
        for each in found
        if each["metadata"]["name"] == "builder-warm" and each["kind"] == "CronJob"
    ]
    assert sorted(warm) == ["builder-pltr-foundry", "builder-second"]
    assert [each["metadata"]["name"] for each in found if each["kind"] == "PriorityClass"] == ["builder-warm"]
