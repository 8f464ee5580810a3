"""An author's image, run on the publisher's machine: what it may not read, and where it may not write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.oci import to_bytes
from builder.oci.base_image import base_image as find_base
from builder.oci.registry import RemoteBlob
from builder.reference import Platform, Reference
from builder.smoke import Candidate, SmokeTestFailed, SmokeTests
from builder.smoke.runtime import Content, Docker, Podman
from scripts.launch import clean_environ
from scripts.machine import native_platform
from tests.waiting import HANG

pytestmark = pytest.mark.usefixtures("alone_with_smoke_tests")
ROOT = Path(__file__).parent.parent.parent
NATIVE = Platform.parse(native_platform())
READ = """\
import os
print([open(f"/run/secrets/{name}").read() for name in os.listdir("/run/secrets")] if os.path.exists("/run/secrets") else "")
raise SystemExit("gone")
"""
WRITE = """\
import sys
for folder in sys.argv[1:]:
    try:
        open(folder + "/x", "w").write("x")
        kind = [line.split()[2] for line in open("/proc/mounts") if line.split()[1] == folder.replace(" ", "\\\\040")]
        print("writes", folder, kind)
    except OSError:
        pass
"""


def test_what_podman_mounts_into_everybody_s_containers_is_not_the_author_s(
    small, small_environ, base_image, podman, tmp_path
):
    """Red Hat's mounts.conf brings the machine's subscription into each container; an administrator's brings more."""
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("of-the-machine")
    mounts = f"{tmp_path}/secrets:/run/secrets\n"
    model = small(files={"client/app.py": READ})
    variables = {"BASE_IMAGE": base_image, "SMOKE_TEST": "auto", "SMOKE_TEST_TIMEOUT": f"{HANG:.0f}"}
    environ = {**clean_environ(), "PYTHONPATH": str(ROOT), **small_environ(model, **variables)}
    argv = [sys.executable, "-m", "builder", "publish"]
    if os.geteuid():
        conf = tmp_path / "home" / ".config" / "containers"
        environ["HOME"] = str(tmp_path / "home")
        shutil.copytree(Path.home() / ".config" / "containers", conf, dirs_exist_ok=True)
    else:
        environ["HOME"] = podman.environ["HOME"]
        conf = shutil.copytree("/etc/containers", tmp_path / "containers")
        within = 'mount --bind "$0" /etc/containers && exec "$@"'
        argv = ["unshare", "--mount", "sh", "-c", within, str(conf), *argv]
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "mounts.conf").write_text(mounts)
    done = subprocess.run(argv, check=False, env=environ, text=True, capture_output=True)
    assert done.returncode == 65, done.stderr
    assert "gone" in model.outcome()["error"]
    assert "of-the-machine" not in done.stderr + str(model.outcome())


@pytest.mark.parametrize("kind", [Podman, Docker])
def test_no_volume_of_an_image_is_on_the_machine_s_disk(
    kind, small, small_environ, base_image, podman, request, tmp_path
):
    """However it is named, and however many there are."""
    from builder.settings import Settings

    environ = podman.environ
    if kind is Docker:
        daemon = request.getfixturevalue("docker_daemon")
        if daemon is None:
            pytest.skip("no Docker daemon answers or can be started")
        environ = daemon.environ
    variables = {name: value for name, value in environ.items() if name in {"HOME", "DOCKER_HOST"}}
    folders = ["/plain", "/trailing/", "/with blank", "/c:o", *(f"/v{number}" for number in range(40))]
    reference = Reference.parse(base_image)
    settings = Settings.from_environ(small_environ(small(), BASE_IMAGE=base_image, SMOKE_TEST="required"))
    with Registries() as registries:
        registry = registries.for_host(reference.repository.host)
        found = find_base(registry, reference, NATIVE)
        command = ["python", "-c", WRITE, *folders]
        config = {
            **found.config,
            "config": {**found.config["config"], "Cmd": command, "Entrypoint": [], "ExposedPorts": {}},
        }
        config["config"]["Volumes"] = {folder: {} for folder in folders}
        layers = [
            (layer, RemoteBlob(registry=registry, repository=reference.repository, descriptor=layer))
            for layer in found.layers
        ]
        content = Content(config=to_bytes(config), layers=layers)
        tests = SmokeTests(settings, runtimes=[kind(variables, NATIVE)])
        with pytest.raises(SmokeTestFailed) as caught:
            tests.run([Candidate(NATIVE, reference.digest, lambda: content)], before="", folder=tmp_path, record=print)
    lines = [line for line in str(caught.value).split(" | ") if "writes" in line]
    assert lines
    assert all("tmpfs" in line for line in lines)
