"""The builder image without an engine: an ordinary user, a root that is read-only, and still everything published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.builder_image import PYTHON, ca_bundle, docker, pip_config
from tests.versions import register, seed_layout

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
    done = docker("run", "--rm", "--network=host", *RESTRICTED, *mounts, *variables, engineless_image)
    assert done.stdout.strip() == model.outcome()["image"]
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
