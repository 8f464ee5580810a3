"""The builder image: the real Kaniko in it, and what it is made of.

To unpack a base image takes seconds, so one container builds many Dockerfiles, and each test looks at some of it.
"""

import json
import subprocess
from pathlib import Path

import pytest

from builder.dockerfile.engine import machine_platform
from builder.errors import ExitCode
from scripts.launch import clean_environ
from tests.builder_image import PYTHON, ca_bundle, docker
from tests.waiting import until

pytestmark = pytest.mark.kaniko

NATIVE = str(machine_platform())
# A usual apt-get section: it fails under Kaniko where the context lies below /tmp.
APT = """\
RUN echo 'Acquire::Retries "10";' > /etc/apt/apt.conf.d/retries
RUN apt-get update \\
    && apt-get upgrade --yes \\
    && apt-get install -y --no-install-suggests --no-install-recommends \\
    hello \\
    && apt-get clean \\
    && rm -rf /var/lib/apt/lists/*
"""
MARK = "corporate-mark"
SEE = "RUN cat /etc/pip.conf /etc/uv/uv.toml && pip config list && env && head -c 27 $(sed -n 's/^cert = //p' /etc/pip.conf)"
# Those that k8s/dockerfile gives to the build phase.
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETFCAP", "SETGID", "SETUID", "SYS_CHROOT")


def image(layout: Path) -> dict:
    """Return the manifest of a layout's one image, and its config."""
    (descriptor,) = json.loads((layout / "index.json").read_text())["manifests"]

    def blob(digest):
        return json.loads((layout / "blobs" / digest.replace(":", "/")).read_text())

    manifest = blob(descriptor["digest"])
    return {"manifest": manifest, "config": blob(manifest["config"]["digest"])}


def push(layout: Path, reference: str) -> str:
    subprocess.run(
        ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{reference}"],
        check=True,
        env=clean_environ(),
    )
    return reference


def run(reference: str, *command: str) -> str:
    try:
        return docker("run", "--rm", f"--entrypoint={command[0]}", reference, *command[1:]).stdout
    finally:
        docker("rmi", "--force", reference, check=False)


class Builds:
    """What became of named Dockerfiles, built one after another in one container."""

    def __init__(self, container, jobs, *options):
        self.names = list(jobs)
        self.container = container
        self.outcomes = dict(zip(jobs, container.build(*jobs.values(), options=options), strict=True))

    def __getitem__(self, name):
        return self.outcomes[name]

    def layout(self, name):
        return self.container.layouts / str(self.names.index(name))

    def lines(self, name):
        outcome = self.outcomes[name]
        assert not outcome["error"], outcome
        return outcome["lines"]


@pytest.fixture(scope="module")
def builds(containers, base_image, registry):
    """One container with Docker's default capabilities and seccomp profile."""
    bundle = ca_bundle()
    network = {
        "ca_bundle": "/etc/machine.pem" if bundle else None,
        "proxies": {"NO_PROXY": f"{MARK}.example"},
        "index_variables": {
            "PIP_EXTRA_INDEX_URL": f"https://user:pass@{MARK}.invalid/simple",
            "UV_DEFAULT_INDEX": f"https://{MARK}.invalid/uv",
        },
    }
    start = f"FROM {base_image}\n"
    repeatable = (
        start + 'RUN ls -A / > /made && rm /made && echo x > /made\nCOPY Dockerfile /copied/\nCMD ["cat", "/made"]\n'
    )
    jobs = {
        "seed": {"dockerfile": f"{start}{APT}COPY Dockerfile /copied/\nUSER 1000\nRUN echo user $(id -u)\n"},
        "arm64": {"dockerfile": f"{start}COPY Dockerfile /copied/\n", "platform": "linux/arm64"},
        "arm": {"dockerfile": f"{start}COPY Dockerfile /copied/\n", "platform": "linux/arm/v7"},
        "network": {"dockerfile": f"{start}{SEE}\nUSER 1000\n{SEE}\n", **network},
        "timeout": {"dockerfile": f"{start}RUN touch /secret; sleep 6000 & sleep 6001\n", "timeout": 15},
        "after": {"dockerfile": f"{start}RUN ls -A / /etc /kaniko\n"},
        "once": {"dockerfile": repeatable},
        "twice": {"dockerfile": repeatable},
        "step": {"dockerfile": f"{start}RUN echo one; echo two >&2; exit 3\n"},
        "syntax": {"dockerfile": f"{start}RNU true\n"},
        "no base": {"dockerfile": f"FROM {registry.host}/nothing/here\n"},
        "away": {"dockerfile": "FROM 127.0.0.1:1/base\n"},
        "copy": {"dockerfile": "FROM scratch\nCOPY nothing /\n"},
        "program": {"dockerfile": 'FROM scratch\nRUN ["/nothing"]\n'},
    }
    options = [f"--volume={bundle}:/etc/machine.pem:ro"] if bundle else []
    return Builds(containers(), jobs, "--env=REGISTRY_TOKEN=hunter2hunter2", *options)


def test_an_apt_get_section_builds(builds, registry):
    assert "user 1000" in builds.lines("seed")
    reference = push(builds.layout("seed"), f"{registry.host}/kaniko/seed:1")
    assert run(reference, "/usr/bin/hello") == "Hello, world!\n"


@pytest.mark.parametrize(("name", "platform"), [("seed", NATIVE), ("arm64", "linux/arm64"), ("arm", "linux/arm")])
def test_several_platforms_in_one_container(builds, registry, crane, name, platform):
    config = image(builds.layout(name))["config"]
    assert f"{config['os']}/{config['architecture']}" == platform
    reference = push(builds.layout(name), f"{registry.host}/kaniko/{name}:2")
    crane("validate", "--remote", reference)


def test_the_base_s_layers_stay_as_they_are(builds, base_image, crane):
    base = json.loads(crane("manifest", f"--platform={NATIVE}", base_image))["layers"]
    made = image(builds.layout("once"))["manifest"]["layers"]
    assert [layer["digest"] for layer in made[: len(base)]] == [layer["digest"] for layer in base]
    assert len(made) == len(base) + 2


def test_the_same_context_gives_the_same_image(builds):
    assert image(builds.layout("once")) == image(builds.layout("twice"))


def test_network_settings_are_seen_by_every_user(builds):
    said = "\n".join(builds.lines("network"))
    assert said.count(f"\nextra-index-url = https://user:pass@{MARK}.invalid/simple\n") == 2
    assert said.count(f'\nindex-url = "https://{MARK}.invalid/uv"\n') == 2
    assert said.count(f"\nno_proxy={MARK}.example") == 2
    assert said.count("BEGIN CERTIFICATE") == (2 if ca_bundle() else 0)


def test_network_settings_are_not_in_the_image(builds, registry):
    # The history has the RUN step's text, and nothing of the values.
    assert MARK not in json.dumps(image(builds.layout("network")))
    reference = push(builds.layout("network"), f"{registry.host}/kaniko/network:1")
    assert run(reference, "sh", "-c", "cat /etc/pip.conf /etc/uv/uv.toml 2>/dev/null; ls -d /kaniko || true") == ""


def test_run_steps_see_nothing_of_the_builder_s_environment(builds):
    assert "hunter2hunter2" not in json.dumps(builds.outcomes)


def test_a_timeout_leaves_no_process_and_no_file(builds):
    assert "took longer than 15 seconds" in builds["timeout"]["error"]
    assert builds["timeout"]["processes"] == []
    seen = builds.lines("after")
    assert not {"secret", "stages", "layers", "deps", "pip.conf"} & set(seen)


def test_nothing_of_a_build_stays(builds):
    (before, *_, after) = (outcome["kaniko"] for outcome in builds.outcomes.values())
    assert after == before
    assert not [name for name in after if name.startswith("run-")]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("syntax", "BuildFailed", "unknown instruction: RNU"),
        ("no base", "BuildFailed", "after FROM"),
        ("away", "ServiceUnavailable", "connection refused"),
        ("copy", "BuildFailed", "no such file or directory"),
        ("program", "BuildFailed", "/nothing: no such file or directory"),
        ("step", "BuildFailed", "the step 'RUN echo one; echo two >&2; exit 3' failed: two (exit status 3)"),
    ],
)
def test_failed_builds_are_explained(builds, name, kind, words):
    assert builds[name]["type"] == kind
    assert words in builds[name]["error"]


def test_the_capabilities_of_the_manifest_are_enough(containers, base_image, registry, tmp_path):
    """With a mounted pip.conf, and with a cache that may only be read."""
    mounted = tmp_path / "pip.conf"
    mounted.write_text("[global]\ntimeout = 77\n")
    cache = f"{registry.host}/kaniko/cache"
    text = (
        f"FROM {base_image}\nRUN useradd --uid 1000 model && pip config list\nRUN chown 1000 /opt; chmod u+s /bin/true\n"
        "USER model\nRUN echo user $(id -u); sleep 6000 &\n"
    )
    job = {"dockerfile": text, "pip_config": "/etc/pip.conf", "cache": cache}
    builds = Builds(
        containers(),
        {"job": job},
        "--cap-drop=ALL",
        *(f"--cap-add={name}" for name in CAPABILITIES),
        "--security-opt=no-new-privileges",
        f"--volume={mounted}:/etc/pip.conf:ro",
    )
    assert {"global.timeout='77'", "user 1000"} <= set(builds.lines("job"))
    assert builds["job"]["processes"] == []
    # It was asked, and had nothing.
    until(lambda: any("/v2/kaniko/cache/" in line and '" 4' in line for line in registry.log().splitlines()))
    assert not (registry.storage / "docker/registry/v2/repositories/kaniko/cache/_manifests").exists()
    reference = push(builds.layout("job"), f"{registry.host}/kaniko/mounted:1")
    assert run(reference, "sh", "-c", "cat /etc/pip.conf 2>/dev/null || true") == ""


def test_a_foreign_platform_is_a_clear_error(containers):
    # A shell for a machine that no emulator is registered for, whatever this machine can emulate.
    program = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xfe\xca" + bytes(44)
    container = containers()
    context = container.folder / "context"
    (context / "bin").mkdir(parents=True)
    (context / "bin" / "sh").write_bytes(program)
    (context / "bin" / "sh").chmod(0o755)
    (context / "Dockerfile").write_text("FROM scratch\nCOPY bin /bin\nRUN true\n")
    (outcome,) = container.build(
        {"context": "/kaniko/workspace/foreign", "platform": "linux/mips64le"},
        options=(f"--volume={context}:/kaniko/workspace/foreign:ro",),
    )
    assert outcome["type"] == "BuildFailed"
    assert "linux/mips64le" in outcome["error"]
    assert "MODEL_PLATFORMS" in outcome["error"]


def test_a_private_base_behind_a_private_ca(containers, tls_registry, base_image, crane, tmp_path):
    private = f"{tls_registry.host}/private/python:1"
    config = tls_registry.docker_config(tmp_path / "config")
    environ = {"DOCKER_CONFIG": str(config), "SSL_CERT_FILE": str(tls_registry.ca)}
    crane("copy", f"--platform={NATIVE}", base_image, private, environ=environ)
    job = {"dockerfile": f"FROM {private}\nENV X=1\n"}
    trusted = job | {"ca_bundle": "/etc/private.pem"}
    builds = Builds(
        containers(),
        {"plain": job, "trusted": trusted, "allowed": trusted | {"docker_config": "/etc/pull"}},
        f"--volume={tls_registry.ca}:/etc/private.pem:ro",
        f"--volume={config}:/etc/pull:ro",
    )
    assert "SSL_CERT_FILE" in builds["plain"]["error"]
    assert "BUILD_DOCKER_CONFIG" in builds["trusted"]["error"]
    assert builds["allowed"]["error"] == ""
    assert tls_registry.password not in json.dumps(builds.outcomes)


EVERY_MODULE = """
import importlib, pkgutil, builder, cryptography, mlflow
for module in pkgutil.walk_packages(builder.__path__, "builder."):
    importlib.import_module(module.name)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(len(mapped) > 5, sorted(path for path in mapped if not path.startswith("/kaniko/")))
"""


def test_everything_stands_below_kaniko_s_folder(builder_image):
    done = docker("run", "--rm", f"--entrypoint={PYTHON}", builder_image, "-I", "-c", EVERY_MODULE)
    assert done.stdout == "True []\n"


def test_the_build_stage_s_files_are_not_in_the_image(builder_image):
    code = "import os; print(sorted(os.listdir('/kaniko')), os.path.exists('/build'), os.path.exists('/etc/pip.conf'))"
    done = docker("run", "--rm", f"--entrypoint={PYTHON}", builder_image, "-I", "-c", code)
    assert done.stdout.endswith("False False\n")


def test_starts_as_documented(builder_image):
    done = docker("run", "--rm", "--env=MODEL_NAME=x", "--env=MODEL_VERSION=1", builder_image, check=False)
    assert done.returncode == ExitCode.CONFIG
    assert "MLFLOW_TRACKING_URI" in done.stderr
    assert done.stdout == ""
    assert "Usage: builder" in docker("run", "--rm", builder_image, "--help").stdout


def test_kaniko_beside_a_credential_has_to_be_allowed(builder_image):
    settings = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "REGISTRY_URL": "127.0.0.1:1",
        "MODEL_NAME": "x",
        "MODEL_VERSION": "1",
        "REGISTRY_USER": "a",
        "REGISTRY_TOKEN": "hunter2hunter2",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    options = [f"--env={name}={value}" for name, value in settings.items()]
    done = docker("run", "--rm", *options, builder_image, check=False)
    assert done.returncode == ExitCode.CONFIG
    assert "TRUST_DOCKERFILE_AUTHORS" in done.stderr
    allowed = docker("run", "--rm", *options, "--env=TRUST_DOCKERFILE_AUTHORS=true", builder_image, check=False)
    assert allowed.returncode == ExitCode.UNAVAILABLE
