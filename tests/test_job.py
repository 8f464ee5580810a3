"""k8s/job.yaml, run as it is: its containers one after another, each with its user, environment and mounts.

What the kubelet would do is done with Docker: an emptyDir is a folder, a Secret a folder of files, fsGroup their group.
"""

import json
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
import yaml

from builder.errors import ExitCode
from tests.builder_image import docker
from tests.versions import DOCKERFILE, register, seed_layout

pytestmark = pytest.mark.kaniko

FOLDER = Path(__file__).parents[1] / "k8s"
TOKEN = "mlflow-token-of-nobody"
PHASES = ("preflight", "fetch", "build", "push")
COPIES = "FROM {base}\nCOPY $model_folder /app/$model_folder\nUSER 10001\n"

# What a stranger may try from a RUN step, which is root in the build phase's container.
LOOK = """\
import os
marks = [bytes.fromhex(mark) for mark in {marks!r}]  # so that it does not find itself
def look(path):
    try:
        with open(path, "rb") as file:
            content = file.read(1 << 20)
    except OSError:
        return
    for number, mark in enumerate(marks):
        if mark in content:
            print("FOUND", number, path)
for number in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline"):
        look(f"/proc/{{number}}/{{name}}")
for folder, folders, names in os.walk("/"):
    folders[:] = [name for name in folders if folder + name not in ("/proc", "/sys", "/dev")]
    for name in names:
        look(os.path.join(folder, name))
workspace = "/kaniko/workspace"
for path in ("plan.json", "context/Dockerfile", "context/mymodel/MLmodel", "new", "context/new"):
    try:
        with open(f"{{workspace}}/{{path}}", "a") as file:
            file.write("x")
        print("WROTE", path)
    except OSError as error:
        print("refused", path, error.strerror)
for path in ("plan.json", "result.json", "context", "layouts"):
    try:
        os.rename(f"{{workspace}}/{{path}}", f"{{workspace}}/moved")
        print("MOVED", path)
    except OSError as error:
        print("refused", path, error.strerror)
os.makedirs(f"{{workspace}}/layouts/linux-arm64/blobs")
with open(f"{{workspace}}/result.json", "w") as file:
    file.write("not a result")
print("looked everywhere")
"""
# Outlives Kaniko and its step, and puts a link in the place of what push will open.
LINK = """\
import os, time
index = "/kaniko/workspace/layouts/linux-amd64/index.json"
if os.fork() == 0:
    os.setsid()
    while not os.path.islink(index):
        try:
            if os.path.getsize(index):
                os.remove(index)
                os.symlink("/kaniko/credentials/registry/config.json", index)
        except OSError:
            pass
"""


class Pod:
    """The Pod of job.yaml, with its volumes as folders."""

    def __init__(self, image, folder, maps, secrets, model):
        self.image, self.folder, self.model = image, folder, model
        template = yaml.safe_load((FOLDER / "job.yaml").read_text())["spec"]["template"]
        self.spec, self.annotations = template["spec"], template["metadata"]["annotations"]
        self.maps = {}
        for path in (FOLDER / "base" / "settings.yaml", FOLDER / "dockerfile" / "settings.yaml"):
            for document in yaml.safe_load_all(path.read_text()):
                self.maps.setdefault(document["metadata"]["name"], {}).update(document["data"])
        for name, settings in maps.items():
            self.maps[name] |= settings
        self.uid = str(uuid.uuid4())
        self.group = self.spec["securityContext"]["fsGroup"]
        self.secrets = secrets
        self.start()

    def start(self):
        """Be a Pod that has just been made, with empty folders."""
        self.volumes = {volume["name"]: self._volume(volume) for volume in self.spec["volumes"]}
        self.messages = {}

    def _volume(self, volume):
        folder = self.folder / volume["name"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chown(folder, 0, self.group)
        if "emptyDir" in volume:
            folder.chmod(0o2777)
            return folder
        keys = {item["key"]: item["path"] for item in volume["secret"].get("items", [])}
        for key, value in self.secrets[volume["secret"]["secretName"]].items():
            path = folder / keys.get(key, key)
            path.write_text(value)
            os.chown(path, 0, self.group)
            path.chmod(volume["secret"]["defaultMode"])
        return folder

    def run(self, name):
        """Run one container to its end, as its manifest says."""
        (container,) = [
            each for each in (*self.spec["initContainers"], *self.spec["containers"]) if each["name"] == name
        ]
        context = container["securityContext"]
        options = [f"--user={context['runAsUser']}:{context['runAsGroup']}", f"--group-add={self.group}"]
        options += [f"--cap-drop={each}" for each in context["capabilities"]["drop"]]
        options += [f"--cap-add={each}" for each in context["capabilities"].get("add", [])]
        options += ["--security-opt=no-new-privileges"] if context["allowPrivilegeEscalation"] is False else []
        options += ["--read-only"] if context.get("readOnlyRootFilesystem") else []
        environ = {}
        for source in container["envFrom"]:
            environ |= self.maps[source["configMapRef"]["name"]]
        fields = self._fields()
        for entry in container.get("env", []):
            given = entry.get("value")
            environ[entry["name"]] = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]] if given is None else given
        options += [f"--env={variable}={value}" for variable, value in environ.items()]
        for mount in container["volumeMounts"]:
            source = self.volumes[mount["name"]] / mount.get("subPath", "")
            assert source.exists(), f"{source} is not there, and the kubelet would make a folder of it"
            options.append(f"--volume={source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}")
        message = self.folder / f"{name}.message"
        message.touch()
        message.chmod(0o666)
        options.append(f"--volume={message}:{container['terminationMessagePath']}")
        done = docker("run", "--rm", "--network=host", *options, self.image, *container["args"], check=False)
        self.messages[name] = json.loads(message.read_text() or "{}")
        return done

    def _fields(self):
        """Return what the Downward API gives: the annotations of the Pod, and the identity of its Job."""
        version = {"builder/model-name": self.model.name, "builder/model-version": self.model.version}
        assert version.keys() <= self.annotations.keys()
        annotations = {"builder/force": "", "builder/rebuild": ""} | self.annotations | version
        return {
            "metadata.labels['batch.kubernetes.io/controller-uid']": self.uid,
            **{f"metadata.annotations['{name}']": value for name, value in annotations.items()},
        }

    def publish(self):
        """Run all phases, and return how each ended; what fails ends it, as it does in a Pod."""
        ended = {}
        for name in PHASES:
            ended[name] = self.run(name)
            if ended[name].returncode:
                break
        return ended


@pytest.fixture
def pod(builder_image, mlflow_server, token_registry, base_image, tmp_path):
    def make(dockerfile, files=None, **options):
        model = register(mlflow_server.uri, seed_layout(base_image, dockerfile) | (files or {}), **options)
        maps = {
            "builder-settings": {
                "MLFLOW_TRACKING_URI": mlflow_server.uri,
                "REGISTRY_URL": f"{token_registry.host}/job",
            }
        }

        def config(*, pull_only):
            folder = token_registry.docker_config(tmp_path / f"config-{pull_only}", pull_only=pull_only)
            return {".dockerconfigjson": (folder / "config.json").read_text()}

        secrets = {
            "builder-mlflow": {"MLFLOW_TRACKING_TOKEN": TOKEN},
            "builder-registry-pull": config(pull_only=True),
            "builder-registry-push": config(pull_only=False),
        }
        return Pod(builder_image, tmp_path / "pod", maps, secrets, model)

    return make


@pytest.fixture
def marks(token_registry, tmp_path):
    """What a credential looks like: the token, and the registry's passwords as Docker's config has them."""

    def auth(*, pull_only):
        folder = token_registry.docker_config(tmp_path / f"mark-{pull_only}", pull_only=pull_only)
        config = json.loads((folder / "config.json").read_text())
        return config["auths"][token_registry.host]["auth"]

    return [TOKEN, token_registry.password, auth(pull_only=True), auth(pull_only=False)]


def repositories(token_registry):
    """Return the repositories that hold anything; preflight's upload, opened and cancelled, leaves an empty one."""
    root = token_registry.storage / "docker/registry/v2/repositories/job"
    return (
        sorted(path.name for path in root.iterdir() if any((path / "_layers").rglob("link"))) if root.exists() else []
    )


def tags_of(token_registry, model):
    return (token_registry.storage / "docker/registry/v2/repositories/job" / model.name / "_manifests/tags").iterdir()


def output(ended):
    return "".join(done.stdout + done.stderr for done in ended.values())


@pytest.fixture
def copied(token_registry, registry, tmp_path):
    """Copy what was published into the anonymous registry: crane refuses a token server on the loopback interface."""

    def copy(reference):
        path = str(reference).partition("/")[2].partition("@")[0].partition(":")[0]
        target = f"{registry.host}/{path}:copied"
        subprocess.run(
            [
                "skopeo",
                "copy",
                "--quiet",
                "--all",
                "--preserve-digests",
                f"--src-authfile={token_registry.docker_config(tmp_path / 'skopeo')}/config.json",
                "--src-tls-verify=false",
                "--dest-tls-verify=false",
                f"docker://{reference}",
                f"docker://{target}",
            ],
            check=True,
        )
        return target

    return copy


def test_two_platforms_of_the_seed_s_layout(pod, token_registry, crane, marks, copied):
    job = pod(COPIES, tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    ended = job.publish()
    assert [done.returncode for done in ended.values()] == [0] * 4, output(ended)
    reference = ended["push"].stdout.strip()
    assert reference.startswith(f"{token_registry.host}/job/{job.model.name}@sha256:")
    copy = copied(reference)
    crane("validate", "--remote", copy)
    manifests = json.loads(crane("manifest", copy))["manifests"]
    assert [manifest["platform"]["architecture"] for manifest in manifests] == ["amd64", "arm64"]
    assert job.model.outcome()["state"] == "published"
    assert job.messages["push"]["image"] == reference
    assert [ended[name].stdout for name in PHASES[:-1]] == [""] * 3
    assert not [mark for mark in marks if mark in output(ended)]


def test_an_unchanged_version_is_left_alone(pod, token_registry):
    job = pod(COPIES)
    first = job.publish()
    before = job.model.tags()
    job.start()
    again = job.publish()
    assert [done.returncode for done in again.values()] == [0] * 4, output(again)
    assert again["push"].stdout == first["push"].stdout
    assert job.model.tags() == before


def test_a_stranger_finds_no_credential_and_changes_nothing_that_push_believes(pod, token_registry, marks):
    control = "not-a-credential"
    searched = [mark.encode().hex() for mark in (control, *marks)]
    files = {"client/look.py": LOOK.format(marks=searched), "client/control.txt": control}
    job = pod(DOCKERFILE.replace("USER 10001", "RUN python3 /app/client/look.py\nUSER 10001"), files)
    before = repositories(token_registry)
    fetched = job.run("fetch")
    assert fetched.returncode == 0, fetched.stderr
    workspace = job.volumes["workspace"]
    kept = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file() and path.name != "result.json"}
    built = job.run("build")
    assert built.returncode == 0, built.stderr
    assert "looked everywhere" in built.stderr
    assert "WROTE" not in built.stderr
    assert "MOVED" not in built.stderr
    assert "FOUND 0 /app/client/control.txt" in built.stderr
    assert not re.findall("FOUND [1-9].*", built.stderr)
    assert {path: path.read_bytes() for path in kept} == kept
    pushed = job.run("push")
    assert pushed.returncode == 0, pushed.stderr
    assert sorted(set(repositories(token_registry)) - set(before)) == [job.model.name]
    assert sorted(path.name for path in tags_of(token_registry, job.model)) == [f"v{job.model.version}"]
    assert job.model.outcome()["platforms"] == "linux/amd64"


def test_a_link_in_a_layout_leads_nowhere(pod, token_registry, marks):
    files = {"client/link.py": LINK}
    # It has to come between the engine's end and the container's; on a busy machine, it may come too late.
    for _ in range(10):
        job = pod(DOCKERFILE.replace("USER 10001", "RUN python3 /app/client/link.py\nUSER 10001"), files)
        before = repositories(token_registry)
        ended = job.publish()
        linked = (job.volumes["workspace"] / "layouts" / "linux-amd64" / "index.json").is_symlink()
        if linked:
            break
    assert linked
    assert ended["push"].returncode == ExitCode.CANNOT_CREATE, output(ended)
    assert not [mark for mark in marks if mark in output(ended) or mark in json.dumps(job.model.tags())]
    assert repositories(token_registry) == before
    assert job.model.outcome()["state"] == "failed"


def test_a_build_that_failed_is_recorded_by_push(pod):
    job = pod(DOCKERFILE + "RUN echo broken; exit 3\n")
    ended = job.publish()
    assert [done.returncode for done in ended.values()] == [0, 0, 0, ExitCode.CANNOT_CREATE], output(ended)
    assert "broken" in (job.volumes["workspace"] / "result.json").read_text()
    outcome = job.model.outcome()
    assert outcome["state"] == "failed"
    assert "broken" in outcome["error"]
    assert job.messages["push"]["exit_code"] == ExitCode.CANNOT_CREATE


def test_a_version_that_is_not_there_ends_the_job(pod, mlflow_server):
    job = pod(COPIES)
    job.model = type(job.model)(job.model.client, job.model.name, "99", "")
    ended = job.publish()
    assert {name: done.returncode for name, done in ended.items()} == {"preflight": ExitCode.NO_INPUT}
