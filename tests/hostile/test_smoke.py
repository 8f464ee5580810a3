"""An author's image, run on the publisher's machine: what it may not read, and where it may not write."""

from __future__ import annotations

import pytest

from builder.images.base import base_image as find_base
from builder.images.descriptor import to_bytes
from builder.images.registries import Registries
from builder.images.registry import RemoteBlob
from builder.reference import Platform, Reference
from builder.smoke.command_line import Docker, Podman
from builder.smoke.content import Content
from builder.smoke.policy import Candidate, SmokeTests
from builder.smoke.trial import SmokeTestFailed
from scripts.machine import native_platform

NATIVE = Platform.parse(native_platform())
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
