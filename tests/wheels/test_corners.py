"""What few versions have, and must work nevertheless."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from builder.errors import InvalidSettings
from builder.publish import publish
from builder.settings import Settings
from scripts.certificates import for_loopback, self_signed
from scripts.launch import clean_environ
from tests.package_index.server import make_wheel, running
from tests.servers.forwarding import forwarding
from tests.servers.small import CLIENT, push_base
from tests.versions import MLMODEL
from tests.waiting import HANG
from tests.wheels.test_method import ROOT, run, succeeded


def files_of(crane, reference, folder, platform="linux/amd64"):
    """Return the files of an image by path, without their content."""
    export = folder / "export.tar"
    crane("export", "--platform", platform, str(reference), str(export))
    with tarfile.open(export) as archive:
        return {member.name for member in archive if not member.isdir()}


def test_a_platform_that_uv_has_no_name_for(small, small_settings, registry, crane, tmp_path):
    platforms = ("linux/amd64", "linux/arm/v7")
    base = push_base(registry.host, "base/tiny-with-arm:3.11", platforms=platforms)
    model = small(tags={"MODEL_PLATFORMS": ",".join(platforms)})
    published = publish(small_settings(model, BASE_IMAGE=base))
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    files = files_of(crane, published.reference, tmp_path, "linux/arm/v7")
    assert "opt/model/lib/python3.11/site-packages/small_lib/__init__.py" in files


def test_another_python_than_the_builders(small, small_settings, registry, crane, tmp_path):
    base = push_base(registry.host, "base/tiny-312:3.12", python="3.12")
    model = small(files={"mymodel/MLmodel": MLMODEL.replace("3.11.2", "3.12.1")})
    published = publish(small_settings(model, BASE_IMAGE=base))
    files = files_of(crane, published.reference, tmp_path)
    assert "opt/model/lib/python3.12/site-packages/small_lib/__init__.py" in files
    # Bytecode is of the builder's own Python, and stays away.
    assert not [path for path in files if path.startswith("opt/model") and path.endswith(".pyc")]


def test_a_client_within_the_model(small, small_settings, crane, tmp_path):
    files = {"client/app.py": None, "mymodel/client/app.py": CLIENT}
    model = small(files=files, tags={"MODEL_CLIENT_FOLDER": "mymodel/client"})
    published = publish(small_settings(model))
    assert "app/mymodel/client/app.py" in files_of(crane, published.reference, tmp_path)
    config = json.loads(crane("config", str(published.reference)))
    assert config["config"]["Cmd"] == ["python", "mymodel/client/app.py"]


def test_no_requirements_at_all(small, small_settings, crane):
    published = publish(small_settings(small("", files={"client/app.py": "print(1)\n"})))
    assert "PASS" in crane("validate", "--remote", str(published.reference))


def test_a_wheel_logged_with_the_model_travels_through_the_phases(small, small_environ, crane, tmp_path):
    filename, wheel = make_wheel("of-the-model", "1.0", files={"of_the_model/__init__.py": b"X = 1\n"})
    model = small(f"small-lib\ncode/{filename}\n", files={f"mymodel/code/{filename}": wheel})
    environ = small_environ(model)
    succeeded(environ, "fetch")
    moved = tmp_path / "moved"
    Path(environ["BUILDER_WORKSPACE"]).rename(moved)
    reference = succeeded({**environ, "BUILDER_WORKSPACE": str(moved)}, "push")
    files = files_of(crane, reference, tmp_path)
    assert "opt/model/lib/python3.11/site-packages/of_the_model/__init__.py" in files


def test_a_private_index_with_a_credential_and_an_authority(small, small_environ, crane, tmp_path, registry):
    authority = self_signed(tmp_path / "ca", "Private authority of an index")
    certificate = for_loopback(tmp_path, authority)
    with running(certificate=certificate, credential=("reader", "s3cret-of-the-index")) as index:
        index.add("private-lib", "1.0", files={"private_lib/__init__.py": b""})
        model = small("private-lib\n")
        environ = small_environ(model, UV_DEFAULT_INDEX=index.with_credential, SSL_CERT_FILE=str(authority.path))
        # A machine's own pip.conf may name another bundle, and would win.
        environ |= {"PIP_CONFIG_FILE": "", "PIP_CERT": ""}
        fetched = run(environ, "fetch")
        assert fetched.returncode == 0, fetched.stderr
        handed_over = [path.read_bytes() for path in Path(environ["BUILDER_WORKSPACE"]).rglob("*") if path.is_file()]
        pushed = run(environ, "push")
        assert pushed.returncode == 0, pushed.stderr
        # The registry as well: manifests, configs, locks, facts.
        kept = [path.read_bytes() for path in registry.storage.rglob("data") if path.stat().st_size < 100_000]
        for text in (*handed_over, *kept, fetched.stderr.encode(), pushed.stderr.encode()):
            assert b"s3cret-of-the-index" not in text
        assert "PASS" in crane("validate", "--remote", pushed.stdout.strip())
        # Where no lock is kept the index is asked, and not believed.
        del environ["SSL_CERT_FILE"]
        environ["WHEEL_LAYERS"] = f"{registry.host}/{model.name}-empty"
        environ["MODEL_NAME"] = small("private-lib\n").name
        refused = run(environ, "fetch")
        assert refused.returncode == 78, refused.stderr
        assert "SSL_CERT_FILE" in refused.stderr


def test_the_config_of_the_base_image_is_kept(small, small_settings, registry, crane):
    config = {
        "Env": ["LANG=C.UTF-8", "PATH=/opt/own/bin:/usr/bin", "HOME=/root", "ODD"],
        "Labels": {"of.the.base": "yes"},
        "Entrypoint": ["/entry"],
        "User": "root",
        "OnBuild": ["RUN evil"],
        "ExposedPorts": {"22/tcp": {}},
    }
    base = push_base(registry.host, "base/talkative:3.11", config=config)
    published = publish(small_settings(small(), BASE_IMAGE=base))
    said = json.loads(crane("config", str(published.reference)))["config"]
    environ = dict(entry.partition("=")[::2] for entry in said["Env"])
    assert environ["PATH"] == "/opt/model/bin:/opt/own/bin:/usr/bin"
    assert environ["HOME"] == "/tmp"
    assert said["User"] == "10001:0"
    assert said["Labels"]["of.the.base"] == "yes"
    assert said["Entrypoint"] == ["/entry"]
    assert said["ExposedPorts"] == {"8080/tcp": {}}
    assert "OnBuild" not in said


def test_wheel_layers_are_kept_where_images_go(small, small_environ, registry_v3):
    with pytest.raises(InvalidSettings, match="WHEEL_LAYERS"):
        Settings.from_environ(small_environ(small(), WHEEL_LAYERS=f"{registry_v3.host}/elsewhere"))


@pytest.mark.parametrize("where", ["wheel-layers/manifests/", "wheel-layers/blobs/uploads/"])
def test_asked_to_end_it_ends_and_another_goes_on(small, small_environ, small_settings, registry, crane, where):
    model = small()
    reached, released = threading.Event(), threading.Event()

    def rule(asked):
        if asked.method in {"PUT", "POST"} and where in asked.path:
            reached.set()
            released.wait(HANG)

    with forwarding(registry.host, rule) as proxy:
        environ = {**clean_environ(), **small_environ(model), "PYTHONPATH": str(ROOT)}
        environ["REGISTRY_URL"] = f"{proxy.host}/{model.name}"
        command = [sys.executable, "-m", "builder", "publish"]
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert reached.wait(HANG)
            process.send_signal(signal.SIGTERM)
            released.set()
            out, log = process.communicate(timeout=HANG)
    assert process.returncode == 75, log
    assert out == b""
    published = publish(small_settings(model))
    assert "PASS" in crane("validate", "--remote", str(published.reference))


def test_a_user_without_a_name_and_a_tracking_address_that_can_be_written(small, small_settings, crane):
    served = small("mlflow-skinny==2.9.2\n", files={"client/app.py": None}, tags={"MODEL_ENTRY_POINT": ""})
    with running() as index:
        for name, version in (("mlflow-skinny", "2.9.2"), ("setuptools", "80.9.0"), ("setuptools", "82.0.0")):
            index.add(name, version)
        for name in ("pandas", "flask", "gunicorn"):
            index.add(name, "1.0")
        published = publish(small_settings(served, UV_DEFAULT_INDEX=index.simple))
    config = json.loads(crane("config", str(published.reference)))["config"]
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["USER"] == environment["LOGNAME"] == "model"
    assert environment["MLFLOW_TRACKING_URI"] == "file:///tmp/mlruns"
    # The server of the release in the lock.
    assert config["Cmd"][2:4] == ["gunicorn", "mlflow.pyfunc.scoring_server.wsgi:app"]


def test_packages_are_those_of_the_day_the_model_was_logged(small, small_settings, crane, tmp_path):
    model = small("dated\n", files={"mymodel/MLmodel": MLMODEL + "utc_time_created: '2022-05-01 12:34:56.789'\n"})
    with running() as index:
        index.add("dated", "1.0", uploaded="2022-04-30T00:00:00Z")
        index.add("dated", "2.0", uploaded="2022-05-02T00:00:00Z")
        published = publish(small_settings(model, UV_DEFAULT_INDEX=index.simple))
    assert "opt/model/lib/python3.11/site-packages/dated-1.0.dist-info/METADATA" in files_of(
        crane, published.reference, tmp_path
    )
