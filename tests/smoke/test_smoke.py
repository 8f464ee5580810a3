"""The smoke test as its users see it: images that serve are published, images that do not are refused, nothing stays."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.errors import InvalidSettings, InvalidVersion
from builder.oci import to_bytes
from builder.oci.base_image import base_image as find_base
from builder.oci.registry import RemoteBlob
from builder.publish import publish
from builder.reference import Platform, Reference
from builder.smoke import Answer, Candidate, Question, SmokeTestFailed, SmokeTests, ask, last_words, runtime
from builder.smoke.runtime import PREFIX, Content, Docker, Podman, listening
from scripts.launch import clean_environ
from scripts.machine import native_platform, pip_configuration
from tests.versions import MLMODEL, register
from tests.waiting import HANG, growing

pytestmark = pytest.mark.usefixtures("alone_with_smoke_tests")
ROOT = Path(__file__).parents[2]
NATIVE = Platform.parse(native_platform())
NO_CLIENT = {"MODEL_ENTRY_POINT": ""}
LISTEN = """\
import http.server
http.server.HTTPServer(("0.0.0.0", 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
# What MLflow's server is started as runs the model's own server.py: an author may bring such a wheel.
SERVER = """\
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, b"\\n")
    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        {post}
HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
"""


@pytest.fixture
def environ(small_environ, base_image, podman):
    """The environment of a publisher that runs what it publishes."""

    def make(model, **changes):
        # No image that is refused waits for that long.
        longest = {"SMOKE_TEST_TIMEOUT": f"{HANG:.0f}"}
        tested = {"BASE_IMAGE": base_image, "SMOKE_TEST": "auto", **longest, **podman.environ}
        kept = {name: tested[name] for name in ("BASE_IMAGE", "SMOKE_TEST", "SMOKE_TEST_TIMEOUT", "HOME")}
        return small_environ(model, **{**kept, **changes})

    return make


@pytest.fixture
def tested(environ, podman):
    """Return the settings of `environ`; no container and no image is left behind by a test that asks for it."""
    from builder.settings import Settings

    before = leftovers("podman", podman.environ)
    yield lambda model, **changes: Settings.from_environ(environ(model, **changes))
    assert leftovers("podman", podman.environ) <= before


@pytest.fixture
def served(mlflow_server, server_packages):
    """Register a version without a client, whose server is server.py; return it and what finds its packages."""

    def make(post, **files):
        model = {
            "mymodel/MLmodel": MLMODEL,
            "mymodel/requirements.txt": "mlflow==3.1.0\n",
            "mymodel/server.py": SERVER.replace("{post}", post),
            **files,
        }
        return register(mlflow_server.uri, model, NO_CLIENT), {"UV_DEFAULT_INDEX": server_packages.simple}

    return make


def leftovers(tool, environ):
    containers = [tool, "ps", "--all", "--format={{.Names}}"]
    images = [tool, "images", "--format={{.Repository}}:{{.Tag}}"]
    lines = [
        line
        for argv in (containers, images)
        for line in subprocess.run(argv, check=True, text=True, capture_output=True, env=environ).stdout.splitlines()
    ]
    # podman's storage is the machine's: what others have left there, or are running now, is none of a test's business.
    return {line for line in lines if PREFIX in line}


def has_tag(settings, model):
    with Registries() as registries:
        reference = Reference.parse(f"{settings.registry_url}/{model.name}:v{model.version}")
        return registries.for_host(reference.repository.host).manifest(reference) is not None


def refused(settings, model):
    with pytest.raises(SmokeTestFailed) as caught:
        publish(settings)
    assert caught.value.exit_code == 65
    assert not has_tag(settings, model)
    outcome = model.outcome()
    assert outcome["state"] == "failed"
    assert outcome["smoke_test"].startswith(f"failed: {NATIVE} sha256:")
    return outcome["error"]


def test_a_client_that_listens_is_published_and_run_once(small, tested, caplog):
    caplog.set_level("INFO", "builder.smoke")
    model = small(files={"client/app.py": LISTEN})
    published = publish(tested(model))
    passed = f"passed: {NATIVE} {published.reference.digest} runs, with its port open after "
    recorded = model.outcome()["smoke_test"]
    assert recorded.startswith(passed)
    assert float(recorded.removeprefix(passed).removesuffix(" s")) > 0
    before = created()
    # The same bits, and then another platform beside them.
    assert publish(tested(model), rebuild=True).reference == published.reference
    model.set_tag("MODEL_PLATFORMS", "linux/amd64,linux/arm64")
    publish(tested(model))
    assert publish(tested(model)).changed is False
    assert created() == before
    assert model.outcome()["smoke_test"] == recorded


def created():
    """Return how many containers of smoke tests were ever made here."""
    argv = ["podman", "events", "--stream=false", "--filter=event=create", "--format={{.Name}}"]
    return subprocess.run(argv, check=True, text=True, capture_output=True).stdout.count(PREFIX)


def test_a_client_that_ends_is_refused_with_its_last_lines(small, tested):
    model = small(files={"client/app.py": "import sys\nsys.exit('\\x1b[31mno \\u202e model: \\x00 here')\n"})
    error = refused(tested(model), model)
    assert error.startswith("SmokeTestFailed: The image does not serve: its container ended with exit code 1 before")
    assert r"its last lines: \x1b[31mno \u202e model: \x00 here" in error


def test_a_client_that_opens_no_port_is_refused(small, tested):
    model = small(files={"client/app.py": LISTEN.replace("8080", "9090")})
    for seconds in growing(3):
        error = refused(tested(model, SMOKE_TEST_TIMEOUT=str(seconds)), model)
        assert "no port is open that the image exposes (8080)" in error
        if "open is 9090" in error:
            break


def test_the_time_that_a_busy_machine_needs_to_start_a_container_is_not_the_model_s(
    small, tested, monkeypatch, tmp_path
):
    slow, podman = tmp_path / "podman", shutil.which("podman")
    monkeypatch.setattr(runtime, "_PATH", f"{tmp_path}:{runtime._PATH}")
    model = small(files={"client/app.py": f"import time\ntime.sleep(2)\n{LISTEN}"})
    for seconds in growing(8):
        before = f'case " $* " in *" --detach "*) sleep {seconds + 1};; esac'
        slow.write_text(f'#!/bin/sh\n{before}\nexec {podman} "$@"\n')
        slow.chmod(0o755)
        try:
            publish(tested(model, SMOKE_TEST_TIMEOUT=str(seconds)))
        except SmokeTestFailed as error:
            # The model had too little time itself.
            assert "no port is open" in str(error)  # noqa: PT017
            continue
        assert "runs, with its port open" in model.outcome()["smoke_test"]
        break


HOSTILE = """\
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for name, value in os.environ.items():
    print(name, value)
print("caps", [line for line in open("/proc/self/status") if line.startswith(("CapEff", "CapBnd", "NoNewPrivs"))])
print("networks", sorted(os.listdir("/sys/class/net")))
for folder in ("/", "/app", "/var", "/run", "/tmp"):
    try:
        open(folder + "/x", "w").write("x")
        print("writes", folder)
    except OSError:
        pass
sys.stdout.flush()
if os.fork() == 0:
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.01)
while True:
    os.write(1, b"flood " * 1000 + b"\\n")
"""


def test_a_hostile_client_is_bounded_and_removed(small, tested):
    model = small(files={"client/app.py": HOSTILE})
    error = refused(tested(model, SMOKE_TEST_TIMEOUT="3", SMOKE_TEST_MEMORY="512"), model)
    assert "no port is open" in error or "needs more than 512 MB" in error
    assert len(error) <= 1000


def test_what_a_container_may_do(small, tested, caplog):
    caplog.set_level("INFO", "builder.smoke")
    secret = "wBy-0123456789"
    model = small(files={"client/app.py": HOSTILE.partition("if os.fork")[0]})
    refused(tested(model, HTTP_PROXY=f"http://u:{secret}@127.0.0.1:1", NO_PROXY="127.0.0.1,localhost"), model)
    said = caplog.text
    assert "networks ['lo']" in said
    assert "writes /tmp" in said
    assert said.count("writes") == 1
    assert all(re.search(fact, said) for fact in (r"CapEff:\\+t0{16}\\", r"CapBnd:\\+t0{16}\\", r"NoNewPrivs:\\+t1\\"))
    assert secret not in said
    assert "proxy" not in said.lower()


def test_a_server_answers_its_example(served, tested):
    post = "self.answer(200, b'{\"predictions\": [1]}') if b'dataframe_split' in body else self.answer(400, b'what?')"
    example = {"mymodel/input_example.json": '{"columns": ["a"], "data": [[1]]}'}
    model, packages = served(post, **example)
    publish(tested(model, **packages))
    assert " answers its input_example.json after " in model.outcome()["smoke_test"]


@pytest.mark.parametrize(
    ("post", "said"),
    [
        ("self.answer(400, b'\\x1b]0;no scale here')", r"status 400: \x1b]0;no scale here"),
        ("self.send_response(200); self.end_headers()\n        while True: self.wfile.write(b'1' * 9999)", "more than"),
        ("self.send_response(200); self.end_headers()\n        time.sleep(1000)", "no answer: "),
        ("os._exit(3)", "exit code 3 before it answered"),
    ],
)
def test_a_server_that_answers_wrongly_is_refused(served, tested, post, said):
    model, packages = served(post, **{"mymodel/serving_input_example.json": '{"inputs": [[1]]}'})
    for seconds in growing(4):
        error = refused(tested(model, **packages, SMOKE_TEST_TIMEOUT=str(seconds)), model)
        if said in error:
            break
        # It had not begun to answer.
        assert "within" in error or "no answer" in error


def test_scikit_learn_answers(mlflow_server, registry, base_image, podman, tmp_path):
    before = leftovers("podman", podman.environ)
    program = (
        "import mlflow, numpy, sys; from sklearn.linear_model import LinearRegression as M; from mlflow import sklearn\n"
        "m = M().fit(numpy.array([[1.], [2.]]), [1., 2.])\n"
        "sklearn.save_model(m, sys.argv[1], input_example=numpy.array([[3.]]))\n"
    )
    folder = tmp_path / "mymodel"
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, env=clean_environ())
    files = {f"mymodel/{path.name}": path.read_bytes() for path in folder.iterdir()}
    model = register(mlflow_server.uri, files, NO_CLIENT)
    environ = {
        **clean_environ(**pip_configuration()),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/flavors",
        "BASE_IMAGE": base_image,
        "SMOKE_TEST": "required",
    }
    argv = [sys.executable, "-m", "builder", "publish", model.name, model.version]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stderr
    assert " answers its serving_input_example.json after " in model.outcome()["smoke_test"]
    assert leftovers("podman", podman.environ) <= before


def test_a_loader_that_misses_a_module_is_refused(mlflow_server, registry, base_image, podman, tmp_path):
    before = leftovers("podman", podman.environ)
    files = {
        "mymodel/MLmodel": "flavors:\n  python_function:\n    loader_module: ours\n    code: code\n    python_version: 3.11.2\n",
        "mymodel/requirements.txt": "mlflow\n",
        "mymodel/code/ours.py": "import absent_module\n",
    }
    model = register(mlflow_server.uri, files, NO_CLIENT)
    environ = {
        **clean_environ(**pip_configuration()),
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": f"{registry.host}/flavors",
        "BASE_IMAGE": base_image,
        "SMOKE_TEST": "auto",
    }
    argv = [sys.executable, "-m", "builder", "publish", model.name, model.version]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 65, done.stderr
    assert "No module named 'absent_module'" in model.outcome()["error"]
    assert leftovers("podman", podman.environ) <= before


def test_a_publisher_that_is_asked_to_end_leaves_nothing(small, environ, podman):
    before = leftovers("podman", podman.environ)
    model = small(files={"client/app.py": "import time\ntime.sleep(1000)\n"})
    argv = [sys.executable, "-m", "builder", "publish"]
    everything = {**clean_environ(), "PYTHONPATH": str(ROOT), **environ(model)}
    events = ["podman", "events", f"--since={time.time():.0f}", "--filter=event=start", "--format={{.Name}}"]
    with (
        subprocess.Popen(events, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as starts,
        subprocess.Popen(argv, text=True, stderr=subprocess.PIPE, env=everything) as publisher,
    ):
        try:
            while PREFIX not in starts.stdout.readline():
                assert publisher.poll() is None
            publisher.send_signal(signal.SIGTERM)
            assert publisher.wait(HANG) == 75
        finally:
            publisher.kill()
            starts.kill()
    assert leftovers("podman", podman.environ) <= before
    assert model.outcome()["state"] == "failed"


def test_what_a_killed_publisher_left_is_removed(small, tested, podman, base_image):
    before = leftovers("podman", podman.environ)
    name = f"{PREFIX}-1000000000-abc"
    subprocess.run(["podman", "tag", base_image, f"localhost/{name}"], check=True)
    line = [*podman.runner, "--detach", f"--name={name}", "--network=none", base_image, "sleep", "1000"]
    subprocess.run(line, check=True, capture_output=True)
    assert len(leftovers("podman", podman.environ) - before) == 2
    publish(tested(small(files={"client/app.py": LISTEN})))


def test_docker_runs_images_too(small, tested, base_image, registry, docker_daemon, tmp_path):
    if docker_daemon is None:
        pytest.skip("no Docker daemon answers or can be started")
    variables = {name: value for name, value in docker_daemon.environ.items() if name in {"HOME", "DOCKER_HOST"}}
    for client, outcome in ((LISTEN, "passed: "), ("raise SystemExit('gone')", "failed: ")):
        model = small(files={"client/app.py": client})
        reference = publish(tested(model, SMOKE_TEST="off")).reference
        assert model.outcome()["smoke_test"] == "off"
        recorded = []
        tests = SmokeTests(tested(model, SMOKE_TEST="required"), runtimes=[Docker(variables, NATIVE)])
        tests.refuse([NATIVE], asked_by_version=False)
        expected = pytest.raises(SmokeTestFailed, match="its last lines: gone")
        with Registries() as registries, expected if "gone" in client else nullcontext():
            candidate = candidate_of(registries, reference)
            tests.run([candidate], before="", folder=tmp_path, record=recorded.append)
        (text,) = recorded
        assert text.startswith(outcome)
        assert leftovers("docker", docker_daemon.environ) == set()


def candidate_of(registries, reference):
    registry = registries.for_host(reference.repository.host)

    def content():
        image = find_base(registry, reference, NATIVE)
        layers = [
            (layer, RemoteBlob(registry=registry, repository=reference.repository, descriptor=layer))
            for layer in image.layers
        ]
        return Content(config=to_bytes(image.config), layers=layers)

    return Candidate(NATIVE, reference.digest, content)


def test_required_is_refused_before_anything_is_made(small, tested, tmp_path):
    other = "linux/arm64" if str(NATIVE) == "linux/amd64" else "linux/amd64"
    model = small()
    with pytest.raises(InvalidSettings, match=f"this machine runs {NATIVE}, and the image is for {other}"):
        publish(tested(model, SMOKE_TEST="required", TARGET_PLATFORMS=other, TARGET_TAG="EXTERNAL_TARGET_PLTR_OTHER"))
    model.set_tag("MODEL_PLATFORMS", other)
    with pytest.raises(InvalidVersion, match=f"this machine runs {NATIVE}"):
        publish(tested(model, SMOKE_TEST="required", TARGET_TAG="EXTERNAL_TARGET_PLTR_OTHER"))
    assert not (tmp_path / "workspace" / "context").exists()
    with pytest.raises(InvalidSettings, match="neither podman nor Docker is here"):
        SmokeTests(tested(model, SMOKE_TEST="required"), runtimes=[]).refuse([NATIVE], asked_by_version=False)


def test_what_cannot_be_run_is_published_and_says_so(small, tested, caplog):
    other = "linux/arm64" if str(NATIVE) == "linux/amd64" else "linux/amd64"
    model = small()
    publish(tested(model, TARGET_PLATFORMS=other, TARGET_TAG="EXTERNAL_TARGET_OTHER"))
    outcome = model.outcome("other")
    assert outcome["state"] == "published"
    assert outcome["smoke_test"] == f"not possible: this machine runs {NATIVE}, and the image is for {other}"


def test_a_runtime_that_runs_nothing_is_no_fault_of_the_image(small, tested, tmp_path, podman):
    class Broken(Podman):
        """A machine whose kernel lets nobody run a container."""

        def _ways(self):
            return [("--runtime=/nonexistent",)]

    reference = publish(tested(small(files={"client/app.py": LISTEN}), SMOKE_TEST="off")).reference
    recorded = []
    settings = tested(small(), SMOKE_TEST="auto")
    tests = SmokeTests(settings, runtimes=[Broken(settings.container_variables, NATIVE)])
    with Registries() as registries:
        tests.run([candidate_of(registries, reference)], before="", folder=tmp_path, record=recorded.append)
    assert recorded[0].startswith("not possible: podman runs no container here: ")


@pytest.mark.parametrize(
    ("example", "release", "bodies"),
    [
        ({"columns": ["a"], "data": [[1]]}, 3, [{"dataframe_split": {"columns": ["a"], "data": [[1]]}}]),
        ({"data": [[1]]}, 2, [{"dataframe_split": {"data": [[1]]}}]),
        ({"columns": ["a"], "data": [[1]]}, 1, [{"columns": ["a"], "data": [[1]]}] * 2),
        (
            {"inputs": {"data": [[1]]}, "params": {"k": 1}},
            3,
            [{"dataframe_split": {"data": [[1]]}, "params": {"k": 1}}],
        ),
        ({"inputs": [[1.0]]}, 2, [{"inputs": [[1.0]]}, {"inputs": {"inputs": [[1.0]]}}]),
        ([[1.0]], 3, [{"inputs": [[1.0]]}]),
        ([{"a": 1}], 3, [{"inputs": [{"a": 1}]}, {"dataframe_records": [{"a": 1}]}]),
        ([{"a": 1}], 1, [[{"a": 1}]]),
        ({"data": [1], "indices": [0], "indptr": [0, 1], "shape": [1, 1]}, 2, []),
        ("text", 3, [{"inputs": "text"}]),
    ],
)
def test_the_forms_of_an_example(example, release, bodies):
    assert [body for body, _ in ask.requests_for(example, release)] == bodies


def test_bad_answers_are_explained():
    assert ask.complaint_about(200, b'{"predictions": [1, NaN]}') == ""
    assert ask.complaint_about(200, b"<html>") == "the answer is not JSON: <html>"
    assert ask.complaint_about(200, b"[" * 100_000).startswith("the answer is not JSON")
    assert ask.complaint_about(200, b"1" * (ask.LARGEST_ANSWER + 1)).startswith("the answer has more than")
    assert ask.complaint_about(500, b"no" * 9000).startswith("status 500: no")


def test_what_a_stranger_says_is_bounded():
    assert Answer.read(["{" * 9000, "[" * 3000, '{"event": ' + "[" * 3000, "null", '"ping"']) == Answer()
    assert Answer.read(['{"event": "answer", "problem": ""}']).finished is False
    long = json.dumps({"event": "answer", "example": "x\n" * 90, "problem": "\x1b" * 500})
    answer = Answer.read(['{"event": "ping"}', long])
    assert answer.finished
    assert len(answer.problem) <= 500
    assert answer.problem.startswith("\\x1b")
    assert listening(["  0: 0100007F:1F90 00000000:0000 0A 0", "  1: 0100007F:1F91 00000000:0000 01 0", "x"]) == {8080}
    assert len(last_words(["x" * 5000] * 100)) <= 1000


def test_what_an_image_is_asked_is_read_from_its_config():
    serves = {
        "Env": ["A=1", "__pyfunc_model_path__=/app/m"],
        "Cmd": ["python", "-m", "uvicorn", "mlflow.pyfunc.scoring_server.app:app", "--port", "8080"],
        "ExposedPorts": {"5000/tcp": {}, "8080/tcp": {}},
    }
    assert Question.of({"config": serves}) == Question(ports=(8080,), model="/app/m")
    assert Question.of({"config": {**serves, "Cmd": ["python", "client/app.py"]}}) == Question(ports=(5000, 8080))
    bound = ["python", "-m", "gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app", "--bind", "0.0.0.0:8080"]
    assert Question.of({"config": {**serves, "Cmd": bound}}) == Question(ports=(8080,), model="/app/m")
    odd = {
        "Env": 7,
        "Cmd": "x",
        "ExposedPorts": {"1/udp": {}, "99999": {}, "90-95/tcp": {}},
        "Volumes": {"/d": {}, "/a:rw": {}, "/../x": {}},
    }
    assert Question.of({"config": odd}) == Question(ports=(90, 91, 92, 93, 94, 95), volumes=("/d",))
    assert Question.of({"config": [1]}) == Question(ports=())
