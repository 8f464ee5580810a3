"""The builder image without an engine: an ordinary user, a root that is read-only, and still everything published."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from builder.errors import ExitCode
from scripts.base_image import INTERPRETERS
from scripts.certificates import for_loopback, self_signed
from scripts.image_size import MEGABYTE, sizes
from tests.builder_image import PYTHON, ca_bundle, docker, pip_config
from tests.package_index.server import running
from tests.versions import register, seed_layout
from tests.wheels.made import make

WITHOUT_ENGINE = """
import os, ssl, tempfile, mlflow
from pathlib import Path
from builder.dockerfile.kaniko import Kaniko
Path("/kaniko/workspace/x").touch()
tempfile.TemporaryFile().close()
certificates = [path for path in Path(ssl.get_default_verify_paths().capath).iterdir() if path.suffix == ".0"]
print(os.getuid(), Kaniko().available(), len(certificates) > 50)
"""


RESTRICTED = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/kaniko/workspace:mode=1777",
    "--tmpfs=/kaniko/tmp:mode=1777",
)


# Publishes, and then prints the modules whose bytecode the image lacks: each start would compile them again.
WATCHED = """
import json, os, sys
from builder.__main__ import main
sys.argv = ["builder", "publish"]
try:
    main()
finally:
    files = [getattr(module, "__cached__", None) for module in list(sys.modules.values())]
    lacking = sorted(file for file in files if file and file.startswith("/kaniko/") and not os.path.exists(file))
    print("lacking", json.dumps(lacking), file=sys.stderr, flush=True)
"""
# A compressed image without an engine, as a registry keeps it.
MOST_MEGABYTES = 80


def test_the_image_is_small(engineless_image, tmp_path):
    archive = tmp_path / "image.tar"
    docker("save", f"--output={archive}", engineless_image)
    whole, parts = sizes(archive)
    assert whole <= MOST_MEGABYTES * MEGABYTE, parts.most_common(20)
    # An interpreter that only compiles. 10 MB of it are 3 to 5 here.
    assert all(0 < parts[f"compiler {python}"] < 6 * MEGABYTE for python in INTERPRETERS)
    assert not {"aiohttp", "pip", "setuptools", "numpy"} & set(parts)
    assert parts["botocore"] < 3 * MEGABYTE


def test_the_image_says_what_it_is(engineless_image):
    labels = json.loads(docker("image", "inspect", "--format={{json .Config.Labels}}", engineless_image).stdout)
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert labels["title"] == "model-image-builder"
    assert (labels["version"], labels["revision"], labels["licenses"]) == ("1.2.3", "0123abc", "Apache-2.0")


COMPILES = """
import os, sys
from pathlib import Path
from builder.wheels.install import Compiler, WheelLayer
from builder.wheels.wheel import open_wheel
for python in sys.argv[2:]:
    compiler = Compiler.find(python, Path(os.environ["WHEEL_COMPILERS"]))
    layer = WheelLayer(open_wheel(Path(sys.argv[1])), python=python, bytecode=compiler)
    print(compiler.identity, len(b"".join(layer)) > 0, layer.without_bytecode)
"""


def test_the_image_compiles_for_other_pythons_than_its_own(engineless_image, tmp_path):
    wheel = make(tmp_path, {"demo/a.py": b"VALUE = 1\n"})
    tmp_path.chmod(0o755)  # the image's user is another one
    mount = f"--volume={tmp_path}:/kaniko/wheels:ro"
    start = (f"--entrypoint={PYTHON}", engineless_image, "-I", "-c", COMPILES, f"/kaniko/wheels/{wheel.name}")
    lines = docker("run", "--rm", *RESTRICTED, mount, *start, *INTERPRETERS).stdout.splitlines()
    assert len(lines) == len(INTERPRETERS)
    for python, line in zip(INTERPRETERS, lines, strict=True):
        assert line.startswith(f"cpython-{python}.")
        assert line.endswith(" True ()")


def test_without_an_engine_no_root_and_a_read_only_root(engineless_image):
    done = docker("run", "--rm", *RESTRICTED, f"--entrypoint={PYTHON}", engineless_image, "-I", "-c", WITHOUT_ENGINE)
    assert done.stdout == "65532 False True\n"
    assert "Usage: builder" in docker("run", "--rm", *RESTRICTED, engineless_image, "--help").stdout


def test_without_an_engine_it_publishes(engineless_image, mlflow_server, registry, base_image, crane):
    files = {**seed_layout(base_image), "mymodel/requirements.txt": "colorama==0.4.6\n"}
    del files["templates/Dockerfile.template"]
    files["client/app.py"] = "import colorama\nprint(colorama.__version__)\n"
    model = register(mlflow_server.uri, files, {"MODEL_PLATFORMS": "linux/amd64,linux/arm64,linux/arm/v7"})
    environ = {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": registry.host,
        "BASE_IMAGE": base_image,
        "MODEL_NAME": model.name,
        "MODEL_VERSION": model.version,
    }
    mounts = []
    for variable, path in (("SSL_CERT_FILE", ca_bundle()), ("PIP_CONFIG_FILE", pip_config())):
        if path:
            mounts.append(f"--volume={path}:{path}:ro")  # where pip.conf names it
            environ[variable] = str(path)
    variables = [f"--env={name}={value}" for name, value in environ.items()]
    start = (f"--entrypoint={PYTHON}", engineless_image, "-I", "-c", WATCHED)
    done = docker("run", "--rm", "--network=host", *RESTRICTED, *mounts, *variables, *start)
    assert done.stdout.strip() == model.outcome()["image"]
    lacking = json.loads(done.stderr.rpartition("lacking ")[2].partition("\n")[0])
    assert len(lacking) < 10, lacking
    assert model.outcome()["platforms"] == "linux/amd64,linux/arm/v7,linux/arm64"
    crane("validate", "--remote", done.stdout.strip())
    try:
        assert docker("run", "--rm", done.stdout.strip()).stdout.strip() == "0.4.6"
    finally:
        docker("rmi", "--force", done.stdout.strip(), check=False)


@pytest.fixture
def own_authorities(tmp_path):
    """What stands for the image's own authorities, which this machine's registries of packages may not be among."""
    folder = tmp_path / "certs"
    folder.mkdir()
    for path in Path("/etc/ssl/certs").iterdir():
        if path.is_file():
            # What its links lead to: that is outside the folder.
            shutil.copyfile(path, folder / path.name)
    return f"--volume={folder}:/kaniko/ssl/certs:ro"


@pytest.mark.parametrize("platforms", ["linux/amd64", "linux/amd64,linux/arm/v7"], ids=["named", "universal"])
def test_the_authorities_of_the_image_itself_are_enough(
    engineless_image, mlflow_server, registry, base_image, own_authorities, platforms, tmp_path
):
    files = {**seed_layout(base_image), "mymodel/requirements.txt": "colorama==0.4.6\n"}
    del files["templates/Dockerfile.template"]
    model = register(mlflow_server.uri, files, {"MODEL_PLATFORMS": platforms})
    environ = {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "REGISTRY_URL": registry.host,
        "BASE_IMAGE": base_image,
        "MODEL_NAME": model.name,
        "MODEL_VERSION": model.version,
    }
    mounts = [own_authorities]
    if config := pip_config():
        # The machine's index, if it names one, and not the bundle that it may name beside it.
        text = "".join(line for line in Path(config).read_text().splitlines(keepends=True) if "cert" not in line)
        (tmp_path / "pip.conf").write_text(text)
        mounts.append(f"--volume={tmp_path / 'pip.conf'}:/kaniko/pip.conf:ro")
        environ["PIP_CONFIG_FILE"] = "/kaniko/pip.conf"
    variables = [f"--env={name}={value}" for name, value in environ.items()]
    done = docker("run", "--rm", "--network=host", *RESTRICTED, *mounts, *variables, engineless_image, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == model.outcome()["image"]


@pytest.mark.parametrize("trusted", [False, True], ids=["unknown", "own"])
def test_a_certificate_is_judged_by_the_authorities_of_the_image(
    engineless_image, mlflow_server, registry, base_image, tmp_path, trusted
):
    authority = self_signed(tmp_path, "authority")
    folder = tmp_path / "certs"
    folder.mkdir()
    if trusted:
        # As a derived image has it that adds an authority to the image's own.
        name = subprocess.run(
            ["openssl", "x509", "-noout", "-hash", "-in", authority.path], check=True, capture_output=True, text=True
        ).stdout.strip()
        shutil.copyfile(authority.path, folder / f"{name}.0")
    else:
        other = self_signed(tmp_path, "other")
        shutil.copyfile(other.path, folder / "00000000.0")
    files = {**seed_layout(base_image), "mymodel/requirements.txt": "colorama==0.4.6\n"}
    del files["templates/Dockerfile.template"]
    model = register(mlflow_server.uri, files, {"MODEL_PLATFORMS": "linux/amd64"})
    with running(certificate=for_loopback(tmp_path, authority)) as index:
        index.add("colorama", "0.4.6", files={"colorama/__init__.py": b"__version__ = '0.4.6'\n"})
        environ = {
            "MLFLOW_TRACKING_URI": mlflow_server.uri,
            "REGISTRY_URL": registry.host,
            "BASE_IMAGE": base_image,
            "MODEL_NAME": model.name,
            "MODEL_VERSION": model.version,
            "PIP_INDEX_URL": f"{index.url}/simple/",
            "RESOLVE_AS_OF": "now",
        }
        variables = [f"--env={name}={value}" for name, value in environ.items()]
        mounts = [f"--volume={folder}:/kaniko/ssl/certs:ro"]
        done = docker("run", "--rm", "--network=host", *RESTRICTED, *mounts, *variables, engineless_image, check=False)
    assert done.returncode == (0 if trusted else ExitCode.CONFIG), done.stderr
    assert trusted or "SSL_CERT_FILE" in done.stderr
