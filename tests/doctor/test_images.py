"""Registries: the credential and where it comes from, the right to push, mounts, the base image."""

import json
import os

import pytest

from builder.publish import publish
from builder.reference import Reference
from tests.servers.registries import PASSWORD, USER, run_registry


def content_of(storage):
    """Return every link and blob that a registry keeps; of a cancelled upload it keeps the state of a hash alone."""
    return sorted(str(path.relative_to(storage)) for path in storage.rglob("*") if path.name in {"link", "data"})


def helper(folder, name, script):
    """Put a credential helper into a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return folder


def config(folder, **content):
    """Write a Docker config.json, and return its folder as a setting."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def test_a_push_is_tried_and_leaves_nothing_behind(look, registry, tmp_path):
    with_model = {"MODEL_NAME": "a model of mine"}
    before = content_of(registry.storage)
    found = look("push", REGISTRY_URL=f"{registry.host}/{tmp_path.name}", **with_model)
    assert found.state == "ok", found
    assert f"{registry.host}/{tmp_path.name}/a-model-of-mine" in found.found
    assert f"{registry.host}/{tmp_path.name}/wheel-layers" in found.found
    assert content_of(registry.storage) == before


def test_a_wrong_password_is_refused_and_a_right_one_is_not(look, basic_registry):
    where = {"REGISTRY_URL": f"{basic_registry.host}/doctor", "REGISTRY_USER": USER}
    found = look("push", REGISTRY_TOKEN="wrong", **where)
    assert (found.state, found.exit_code) == ("fail", 77), found
    assert look("push", REGISTRY_TOKEN=PASSWORD, **where).state == "ok"


def test_a_registry_that_cannot_be_pushed_to(look, read_only_registry):
    found = look("push", REGISTRY_URL=f"{read_only_registry.host}/doctor")
    assert (found.state, found.exit_code) == ("fail", 77), found


def test_the_listener_s_pod_has_no_credential_and_says_what_has(look, basic_registry, tiny_base, dead_port):
    where = {"REGISTRY_URL": f"{basic_registry.host}/doctor"}
    assert look("push", **where).state == "fail"
    for name in ("push", "mount"):
        found = look(name, in_pod=True, **where)
        assert found.state == "skipped", found
        assert "operations.md" in found.remedy
    away = {"REGISTRY_URL": f"127.0.0.1:{dead_port}/doctor", "BASE_IMAGE": f"127.0.0.1:{dead_port}/base:1"}
    assert look("base image", in_pod=True, **away).state == "skipped"
    # With a credential it has to work.
    broken = look("push", in_pod=True, REGISTRY_USER=USER, REGISTRY_TOKEN="wrong", **where)
    assert broken.state == "fail"


def test_a_registry_that_is_away(look, dead_port):
    found = look("push", REGISTRY_URL=f"127.0.0.1:{dead_port}/doctor")
    assert (found.state, found.exit_code) == ("fail", 69), found


@pytest.fixture
def published(small, small_settings, mlflow_server, registry):
    """A version that is published by its wheels, and the environment that it was published with."""
    model = small(tags={"EXTERNAL_TARGET_MOUNTED": "true"})
    namespace = f"{registry.host}/{model.name}"
    publish(small_settings(model, TARGET_TAG="EXTERNAL_TARGET_MOUNTED", SMOKE_TEST="off"))
    yield {"MODEL_NAME": model.name, "REGISTRY_URL": namespace, "TARGET_TAG": "EXTERNAL_TARGET_MOUNTED"}
    model.client.delete_model_version(model.name, model.version)


def test_a_mount_is_tried_with_a_layer_that_is_there_and_changes_nothing(look, registry, published):
    before = content_of(registry.storage)
    found = look("mount", **published)
    assert found.state == "ok", found
    assert f"{published['REGISTRY_URL']}/wheel-layers" in found.found
    assert content_of(registry.storage) == before


def test_a_registry_that_does_not_mount(look, registry, published, tmp_path):
    from tests.servers.forwarding import forwarding

    # As registries do that know no mounts: an upload is begun instead.
    def rule(asked):
        return asked.path.partition("?")[0] if "mount=" in asked.path else None

    with forwarding(registry.host, rule) as proxy:
        url = published["REGISTRY_URL"].replace(registry.host, proxy.host)
        found = look("mount", **{**published, "REGISTRY_URL": url})
    assert found.state == "warn", found
    assert "sends its layers again" in found.found


def test_nothing_published_is_nothing_to_mount(look):
    assert look("mount", TARGET_TAG="NOBODY_HAS_THIS").state == "skipped"
    assert look("mount", BUILD_METHOD="dockerfile").state == "skipped"


def test_a_base_image_for_each_platform(look, tiny_base):
    found = look("base image", TARGET_PLATFORMS="linux/amd64,linux/arm64")
    assert found.state == "ok", found
    assert "linux/amd64, linux/arm64" in found.found
    assert "sha256:" in found.found
    lacking = look("base image", TARGET_PLATFORMS="linux/amd64,linux/s390x")
    assert (lacking.state, lacking.exit_code) == ("fail", 78), lacking
    assert "linux/s390x" in lacking.found
    missing = look("base image", BASE_IMAGE=tiny_base.replace("tiny", "missing"))
    assert (missing.state, missing.exit_code) == ("fail", 78), missing


def test_the_base_image_is_the_one_of_this_program_s_python(look, tiny_base):
    found = look("base image", BASE_IMAGE=f"{tiny_base.rpartition(':')[0]}:{{python_version}}")
    import sys

    assert f"tiny:{sys.version_info.major}.{sys.version_info.minor}" in found.found


def test_no_credential_is_none_to_check(look):
    found = look("credential")
    assert found.state == "skipped"
    assert "anonymous" in found.found


@pytest.mark.parametrize(
    ("script", "state", "code", "says"),
    [
        ('echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"a secret of it\\"}"', "ok", 0, "docker-credential-mine"),
        ("echo rubbish", "fail", 77, "docker-credential-mine"),
        ("echo 'it is broken' >&2; exit 3", "fail", 77, "it is broken"),
        ("echo 'credentials not found in native keychain'; exit 1", "skipped", 0, "docker-credential-mine has none"),
        (None, "fail", 78, "docker-credential-mine"),
    ],
)
def test_a_credential_helper(look, registry, tmp_path, monkeypatch, script, state, code, says):
    if script is not None:
        helpers = helper(tmp_path / "bin", "mine", script)
        monkeypatch.setenv("PATH", f"{helpers}:{os.environ['PATH']}")
    folder = config(tmp_path / "docker", credHelpers={registry.host: "mine"})
    found = look("credential", DOCKER_CONFIG=folder)
    assert (found.state, found.exit_code) == (state, code), found
    assert says in found.found
    assert "a secret of it" not in found.found


def test_where_a_credential_comes_from(look, registry, tmp_path):
    assert "REGISTRY_USER" in look("credential", REGISTRY_USER="u", REGISTRY_TOKEN="a token of mine").found
    folder = config(tmp_path / "docker", auths={registry.host: {"username": "u", "password": "a word of mine"}})
    assert "config.json" in look("credential", DOCKER_CONFIG=folder).found


def test_a_registry_of_its_own_is_left_empty(look, launcher, tmp_path):
    with run_registry(launcher, tmp_path) as server:
        assert look("push", REGISTRY_URL=f"{server.host}/doctor").state == "ok"
        assert content_of(server.storage) == []


@pytest.mark.parametrize("lie", [{"image": "no reference at all"}, {"platforms": "??"}])
def test_tags_that_lie_about_an_image_are_no_failure(look, small, registry, tiny_base, lie):
    elsewhere = Reference.parse(tiny_base).repository
    model = small(tags={"EXTERNAL_TARGET_LIE": "true"})
    told = {"state": "published", "image": f"{elsewhere}@sha256:{'a' * 64}", "platforms": "linux/amd64", **lie}
    for name, value in told.items():
        model.set_tag(f"publish.lie.{name}", value)
    found = look("mount", TARGET_TAG="EXTERNAL_TARGET_LIE", REGISTRY_URL=f"{registry.host}/lie")
    model.client.delete_model_version(model.name, model.version)
    assert found.state == "skipped", found
