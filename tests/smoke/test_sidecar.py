"""The smoke test in a Pod: its containers are processes here, and the sidecar is a container of podman's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from builder.clients import Registries
from builder.errors import InvalidSettings, PermissionRefused, TryAgain
from builder.oci import from_bytes
from builder.publish import run_preflight, run_push
from builder.reference import Digest, Platform, Reference
from builder.settings import Settings
from builder.smoke import Candidate, SmokeTests, sidecar
from builder.smoke.runtime import ContainerRuntime, Content, Ended, listening
from scripts.launch import clean_environ
from scripts.machine import native_platform
from tests.servers.forwarding import forwarding
from tests.servers.relay import relayed
from tests.smoke.test_smoke import LISTEN, NO_CLIENT, SERVER
from tests.versions import MLMODEL, register, seed_layout
from tests.waiting import HANG, growing

ROOT = Path(__file__).parents[2]
NATIVE = Platform.parse(native_platform())
ENVIRON = {"MLFLOW_TRACKING_URI": "https://mlflow.example.com", "REGISTRY_URL": "registry.example.com/models"}
ASSEMBLERS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}


class Pod:
    """The containers of one Pod, each started as the kubelet does.

    Attributes:
        model: the version that it publishes.
        environ: the environment of the builder's containers.
        candidate: the tag that the sidecar is pulled from.
    """

    def __init__(self, model, environ, podman, folder):
        self.model = model
        self.environ = environ
        self.candidate = Reference.parse(environ["SMOKE_TEST_CANDIDATE"])
        self._podman = podman
        self._folder = folder

    def run(self, *command, prefix=()):
        everything = {**clean_environ(), "PYTHONPATH": str(ROOT), **self.environ}
        argv = [*prefix, sys.executable, "-m", "builder", *command]
        return subprocess.run(argv, check=False, capture_output=True, text=True, env=everything)

    def prepare(self, *options):
        for command in (["fetch", *options], ["candidate"]):
            done = self.run(*command)
            assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def sidecar(self):
        with contextlib.ExitStack() as stack:
            removed = ["podman", "rmi", "--force", str(self.candidate)]
            stack.callback(subprocess.run, removed, check=False, capture_output=True)
            container = stack.enter_context(self._podman.started(self.candidate))
            form = "--format={{.State.Pid}}"
            argv = ["podman", "inspect", form, container.name]
            pid = subprocess.run(argv, check=True, text=True, capture_output=True).stdout.strip()
            within = ["nsenter", f"--net=/proc/{pid}/ns/net"]
            ports = {urlsplit(self.environ["MLFLOW_TRACKING_URI"]).port, urlsplit(f"//{self.candidate}").port}
            with relayed([str(port) for port in ports], within, self._folder):
                yield within

    def push(self):
        with self.sidecar() as within:
            return self.run("push", prefix=within)

    def digest(self, reference):
        reference = Reference.parse(str(reference))
        with Registries() as registries:
            found = registries.for_host(reference.repository.host).manifest(reference)
        return found.digest if found else None

    @property
    def tag(self):
        return f"{self.environ['REGISTRY_URL']}/{self.model.name}:v1"


@pytest.fixture
def pod(small_environ, base_image, podman, alone_with_smoke_tests):
    """Return the Pod of a version."""
    if os.geteuid():
        pytest.skip("only root may enter a container's network")
    # A socket's path must be short.
    with tempfile.TemporaryDirectory() as folder:

        def make(model, **changes):
            settings = {"BASE_IMAGE": base_image, "SMOKE_TEST": "required", "SMOKE_TEST_TIMEOUT": f"{HANG:.0f}"}
            environ = small_environ(model, **{**settings, **changes})
            candidate = f"{environ['REGISTRY_URL']}/candidates:wheels"
            return Pod(model, {**environ, "SMOKE_TEST_CANDIDATE": candidate}, podman, Path(folder))

        yield make


def test_a_client_that_listens_is_published(small, pod):
    pod = pod(small(files={"client/app.py": LISTEN}))
    pod.prepare()
    assert pod.digest(pod.tag) is None
    done = pod.push()
    assert done.returncode == 0, done.stderr
    digest = pod.digest(pod.tag)
    assert done.stdout.strip() == f"{pod.tag.removesuffix(':v1')}@{digest}"
    outcome = pod.model.outcome()
    assert outcome["state"] == "published"
    assert outcome["smoke_test"].startswith(f"passed: {NATIVE} {digest} runs, with its port open after ")


def test_a_client_that_ends_at_once_is_refused_with_its_exit_code(small, pod):
    pod = pod(small(files={"client/app.py": "raise SystemExit(3)"}))
    pod.prepare()
    done = pod.push()
    assert done.returncode == 65, done.stderr
    assert pod.digest(pod.tag) is None
    outcome = pod.model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["smoke_test"].startswith(f"failed: {NATIVE} sha256:")
    assert "its container ended with exit code 3 before it opened a port; its log: kubectl logs " in outcome["error"]


def test_a_client_that_opens_another_port_is_refused(small, pod):
    model = small(files={"client/app.py": LISTEN.replace("8080", "9090")})
    for seconds in growing(3):
        tried = pod(model, SMOKE_TEST_TIMEOUT=str(seconds))
        tried.prepare()
        assert tried.push().returncode == 65
        error = model.outcome()["error"]
        assert "no port is open that the image exposes (8080)" in error
        if "open is 9090" in error:
            break


@pytest.mark.parametrize(
    ("post", "code", "said"),
    [
        ("self.answer(200, b'{}') if b'dataframe_split' in body else self.answer(400, b'what?')", 0, "answers its "),
        ("self.answer(400, b'\\x1b]0;no scale here')", 65, r"status 400: \x1b]0;no scale here"),
        ("os._exit(3)", 65, "exit code 3 before it answered"),
    ],
)
def test_a_server_is_sent_the_example_of_its_model(mlflow_server, server_packages, pod, post, code, said):
    files = {
        "mymodel/MLmodel": MLMODEL,
        "mymodel/requirements.txt": "mlflow==3.1.0\n",
        "mymodel/server.py": SERVER.replace("{post}", post),
        "mymodel/input_example.json": '{"columns": ["a"], "data": [[1]]}',
    }
    model = register(mlflow_server.uri, files, NO_CLIENT)
    pod = pod(model, UV_DEFAULT_INDEX=server_packages.simple)
    pod.prepare()
    done = pod.push()
    assert done.returncode == code, done.stderr
    outcome = model.outcome()
    assert said in outcome["smoke_test"] + outcome.get("error", "")
    assert bool(pod.digest(pod.tag)) == (not code)


@pytest.mark.parametrize("client", [LISTEN, "raise SystemExit(3)"])
def test_another_candidate_s_answer_decides_nothing(small, pod, client):
    pod = pod(small(files={"client/app.py": client}))
    pod.prepare()
    ours = pod.digest(pod.candidate)
    with pod.sidecar() as within:
        # Another Pod's, of the same image even: its name is in it.
        command = [sys.executable, "-m", "builder", "candidate"]
        environ = {**clean_environ(), "PYTHONPATH": str(ROOT), **pod.environ}
        other = ["unshare", "--uts", "sh", "-c", 'hostname another && exec "$@"', "sh", *command]
        subprocess.run(other, check=True, env=environ, capture_output=True)
        assert pod.digest(pod.candidate) != ours
        done = pod.run("push", prefix=within)
    assert done.returncode == 75, done.stderr
    assert pod.digest(pod.tag) is None
    outcome = pod.model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["error"].startswith("TryAgain: Another candidate took the place of this one at ")
    assert outcome["attempts"] == "0"


class Replaced(ContainerRuntime):
    """A sidecar whose command runs on or ends, and whose candidate is replaced after it was asked."""

    name = "the Pod"

    def __init__(self, ended):
        super().__init__({}, NATIVE)
        self._ended = ended

    def available(self):
        return True

    def check(self):
        return True

    def load(self, content, name, folder):
        pass

    def start(self, name, limits):
        pass

    def sweep(self, now):
        pass

    def remove(self, name):
        pass

    def log(self, name):
        return []

    def open_ports(self, name):
        return frozenset({8080})

    def ended(self, name, *, within=0):
        return self._ended

    def confirm(self):
        message = "Another candidate took its place."
        raise TryAgain(message)


@pytest.mark.parametrize("ended", [None, Ended(code=3, of_memory=False)])
def test_no_answer_counts_if_the_candidate_was_replaced_while_it_was_asked(ended, tmp_path):
    config = {"os": "linux", "architecture": NATIVE.architecture, "config": {"ExposedPorts": {"8080/tcp": {}}}}
    content = Content(config=json.dumps(config).encode(), layers=[])
    recorded = []
    tests = SmokeTests(Settings.from_environ({**ENVIRON, "SMOKE_TEST": "auto"}), runtimes=[Replaced(ended)])
    with pytest.raises(TryAgain):
        tests.run(
            [Candidate(NATIVE, Digest.of(b""), lambda: content)], before="", folder=tmp_path, record=recorded.append
        )
    assert recorded == []


def test_with_nothing_to_do_the_sidecar_rests(small, pod, podman):
    pod = pod(small(files={"client/app.py": LISTEN}))
    pod.prepare()
    first = pod.push()
    assert first.returncode == 0, first.stderr
    tags = pod.model.tags()
    pod.prepare()
    assert size(pod.candidate) < 20_000
    again = pod.push()
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert pod.model.tags() == tags
    # The same image again: it has passed.
    pod.prepare("--rebuild")
    assert size(pod.candidate) < 20_000


def size(reference):
    """Return the bytes that a first pull of an image moves."""
    with Registries() as registries:
        manifest = registries.for_host(reference.repository.host).manifest(reference)
    return sum(layer["size"] for layer in json.loads(manifest.content)["layers"])


def test_a_failed_build_ends_the_pod_at_the_candidate(mlflow_server, base_image, pod):
    from builder.workspace import BuildResult, Workspace

    model = register(mlflow_server.uri, seed_layout(base_image, "FROM {base}\nCOPY $model_folder /app\nUSER 10001\n"))
    pod = pod(model)
    assert pod.run("fetch").returncode == 0
    result = BuildResult(failure="BuildFailed", what="pip found no wheel.", remedy="Name one.")
    Workspace(Path(pod.environ["BUILDER_WORKSPACE"])).write_result(result)
    done = pod.run("candidate")
    assert done.returncode == 73, done.stderr
    assert model.outcome()["error"] == "BuildFailed: pip found no wheel. Name one."
    assert pod.digest(pod.candidate) is None


SERVES = """\
FROM {base}
COPY $model_folder /app/$model_folder
EXPOSE 8080
USER %s
CMD ["python", "-m", "http.server", "8080"]
"""
ROOT_USER = "its user is not a number other than 0, and the sidecar may not run as root"


@pytest.mark.parametrize(
    ("user", "mode", "code", "said"),
    [
        ("10001", "required", 0, f"passed: {NATIVE} sha256:"),
        ("root", "auto", 0, f"not possible: {ROOT_USER}"),
        ("root", "required", 65, f"not possible: {ROOT_USER}"),
    ],
)
def test_an_author_s_image_is_run_as_its_own_user(mlflow_server, base_image, pod, user, mode, code, said):
    model = register(mlflow_server.uri, seed_layout(base_image, SERVES % user))
    # Foundry takes no image of root's at all.
    pod = pod(model, SMOKE_TEST=mode, TARGET_TAG="EXTERNAL_TARGET_OTHER")
    for command in ("fetch", "build", "candidate"):
        done = pod.run(command)
        assert done.returncode == 0, done.stderr
    done = pod.push()
    assert done.returncode == code, done.stderr
    assert model.outcome("other")["smoke_test"].startswith(said)
    assert bool(pod.digest(pod.tag)) == (not code)


def test_an_image_for_other_machines_is_published_untested(small, pod):
    other = "linux/arm64" if str(NATIVE) == "linux/amd64" else "linux/amd64"
    pod = pod(small(), SMOKE_TEST="auto", TARGET_PLATFORMS=other, TARGET_TAG="EXTERNAL_TARGET_OTHER")
    pod.prepare()
    done = pod.push()
    assert done.returncode == 0, done.stderr
    said = f"not possible: this machine runs {NATIVE}, and the image is for {other}"
    assert pod.model.outcome("other")["smoke_test"] == said


def test_a_pod_without_the_sidecar_is_misconfigured(small, pod, small_settings, monkeypatch):
    pod = pod(small(files={"client/app.py": LISTEN}))
    pod.prepare()
    monkeypatch.setattr(sidecar, "_STARTING", 0)
    with pytest.raises(InvalidSettings, match="no container of that image runs in this Pod"):
        run_push(Settings.from_environ(pod.environ))
    assert pod.digest(pod.tag) is None


def test_a_credential_that_may_not_push_candidates_is_refused_before_the_build(small, small_environ, registry):
    def refuses_candidates(asked):
        denied = json.dumps({"errors": [{"code": "DENIED"}]}).encode()
        return (403, {"Content-Type": "application/json"}, denied) if "/candidates/blobs/" in asked.path else None

    with forwarding(registry.host, refuses_candidates) as proxy:
        model = small()
        url = f"{proxy.host}/{model.name}"
        variables = {"REGISTRY_URL": url, "SMOKE_TEST_CANDIDATE": f"{url}/candidates:x"}
        with pytest.raises(PermissionRefused, match="candidates"):
            run_preflight(Settings.from_environ(small_environ(model, **variables)))
    assert model.outcome()["error"].startswith("PermissionRefused: ")


def test_what_the_plan_says(small, pod):
    pod = pod(small())
    done = pod.run("plan")
    assert done.returncode == 0, done.stderr
    assert f" runs in the Pod as {pod.candidate}, for the node's platform" in done.stdout


@pytest.mark.parametrize("architecture", ASSEMBLERS)
def test_the_first_process_is_its_source(architecture, tmp_path):
    tools = [f"{ASSEMBLERS[architecture]}-{name}" for name in ("as", "objcopy")]
    if not all(map(shutil.which, tools)):
        pytest.skip(f"binutils for {architecture} are not installed")
    source = ROOT / "builder" / "smoke" / f"first_process.{architecture}.s"
    subprocess.run([tools[0], source, "-o", tmp_path / "object"], check=True)
    argv = [tools[1], "-O", "binary", "-j", ".text", tmp_path / "object", tmp_path / "code"]
    subprocess.run(argv, check=True)
    assert (tmp_path / "code").read_bytes() == sidecar._PROGRAMS[architecture][1]


@pytest.mark.parametrize(
    ("command", "paths", "open_port"),
    [
        (["sh", "-c", "exit 3"], ["/nowhere/sh", "/bin/sh"], sidecar.ENDED + 3),
        (["sh", "-c", "kill -KILL $$"], ["/bin/sh"], sidecar.ENDED + 128 + 9),
        (["nothing"], ["/nowhere/nothing"], sidecar.ENDED + 127),
        ([], [], sidecar.ENDED + 127),
        (["sh", "-c", "trap '' TERM; (exit 3); echo $WORD; read line"], ["/bin/sh"], sidecar.RUNNING),
    ],
)
@pytest.mark.parametrize("architecture", ASSEMBLERS)
def test_the_first_process_tells_how_its_child_ended_and_ends_when_told_to(
    architecture, command, paths, open_port, tmp_path
):
    if os.geteuid():
        pytest.skip("only root may make a network of its own")
    emulator = (
        [] if NATIVE.architecture == architecture else [shutil.which(f"qemu-{ARCHITECTURE[architecture]}-static")]
    )
    if None in emulator:
        pytest.skip(f"no emulator for {architecture}")
    program = tmp_path / "program"
    program.write_bytes(sidecar.first_process(architecture, bytes([127, 1, 2, 3]), paths, command))
    program.chmod(0o755)
    line = " ".join(map(str, [*emulator, program]))
    # It opens the port RUNNING before it starts its child, whose first words are looked for there.
    running = open_port == sidecar.RUNNING
    heard = f"until grep -q heard {tmp_path}/out; do :; done;" if running else ""
    look = f"until grep -q ':{open_port:04X} 00000000:0000 0A' /proc/net/tcp; do :; done; {heard} cat /proc/net/tcp"
    pipes = f"<>{tmp_path}/in >{tmp_path}/out"
    script = (
        f"ip link set lo up; mkfifo {tmp_path}/in; WORD=heard {line} {pipes} & {look}; kill $!; wait $!; echo ended $?"
    )
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "sh", "-c", script],
        check=True,
        text=True,
        capture_output=True,
        timeout=HANG,
    )
    lines = done.stdout.splitlines()
    assert listening(lines) == {open_port}
    assert any(line.split()[1:2] == [f"0302017F:{open_port:04X}"] for line in lines)
    assert lines[-1] == "ended 0"
    assert (tmp_path / "out").read_text().splitlines() == ["heard"] * running


ARCHITECTURE = {"amd64": "x86_64", "arm64": "aarch64"}


def test_what_a_candidate_is():
    runtime = {
        "User": "10001",
        "Entrypoint": ["serve"],
        "Cmd": ["--port", "1"],
        "Env": ["PATH=/a:/b", "A=1"],
        "WorkingDir": "/app",
        "Volumes": {"/data": {}},
        "ExposedPorts": {"1/tcp": {}},
    }
    config = {"os": "linux", "architecture": "amd64", "config": runtime, "rootfs": {"type": "layers", "diff_ids": []}}
    content = Content(config=json.dumps(config).encode(), layers=[])
    image, layer = sidecar.candidate_of(content, Platform("linux", "amd64"), "pod-1")
    made = from_bytes(image.config)
    assert made["config"] == {
        **{name: runtime[name] for name in ("User", "Env", "WorkingDir", "ExposedPorts")},
        "Entrypoint": ["/.model-image-first-process"],
        "Labels": {"io.modelimage.candidate-of": "pod-1"},
    }
    assert made["rootfs"]["diff_ids"] == [str(layer.digest)]
    assert b"/a/serve\0/b/serve\0" in layer.content
    assert b"serve\0--port\x001\0" in layer.content
    assert sidecar.candidate_of(content, Platform("linux", "amd64"), "pod-2")[0].descriptor != image.descriptor


@pytest.mark.parametrize(
    ("user", "fit"),
    [("10001:0", True), ("65532", True), ("0", False), ("00:5", False), ("", False), ("app", False), (7, False)],
)
def test_an_image_of_root_or_of_a_name_is_not_run(user, fit):
    assert bool(sidecar.unfit(Platform("linux", "amd64"), {"config": {"User": user}})) is not fit


def test_an_author_can_have_no_file_but_the_example_sent(tmp_path):
    found = sidecar.Sidecar(None, None, NATIVE, pod="pod")
    found._context = tmp_path / "workspace" / "context"
    model = found._context / "mymodel"
    model.mkdir(parents=True)
    (model / "MLmodel").touch()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "MLmodel").touch()
    (found._context / "link").symlink_to(tmp_path / "secrets")
    assert found.path("/app/mymodel") == str(model)
    for path in (f"{tmp_path}/secrets", "/app/../../../secrets", "/app/link", "/app/other", "", "/", "//"):
        assert found.path(path) == "/nonexistent", path
    (model / "input_example.json").symlink_to(tmp_path / "secrets" / "MLmodel")
    assert found.path("/app/mymodel") == "/nonexistent"


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        ("other.example.com/models/candidates:wheels", "layers can be mounted only within one registry"),
        ("registry.example.com/models:wheels", "REGISTRY_URL is the same or below it"),
        ("registry.example.com/models/wheel-layers:x", "the repository of the wheel layers"),
        ("registry.example.com/models/candidates@sha256:" + "0" * 64, "a reference with a tag"),
    ],
)
def test_a_candidate_is_in_a_repository_of_its_own(candidate, problem):
    with pytest.raises(InvalidSettings, match=problem):
        Settings.from_environ({**ENVIRON, "SMOKE_TEST_CANDIDATE": candidate})


def test_no_model_has_the_repository_of_candidates():
    assert Settings.from_environ(ENVIRON).component_of("candidates") == "candidates"
    settings = Settings.from_environ(
        {**ENVIRON, "SMOKE_TEST_CANDIDATE": "registry.example.com/models/candidates:wheels"}
    )
    assert settings.component_of("candidates").startswith("candidates--x")
