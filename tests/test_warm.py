"""Layers and locks ahead of time: found by a publish later, and held against what they should be."""

from __future__ import annotations

import gzip
import json

import pytest

from builder.errors import ExitCode, InvalidVersion, UsageError
from builder.images.blob import BytesBlob
from builder.images.layer import Layer
from builder.images.layer_store import LayerStore
from builder.images.registries import Registries
from builder.publish import publish
from builder.reference import Digest, Repository
from builder.warm import warm, warm_requirements
from tests.servers.forwarding import forwarding
from tests.servers.small import REQUIREMENTS


@pytest.fixture
def tagged(small, small_settings, packages):
    """Register a version that alone carries a target tag; return it, and the settings of its target."""

    def make(*, requirements=REQUIREMENTS, **options):
        model = small(requirements, **options)
        tag = f"EXTERNAL_TARGET_{model.name}"
        model.set_tag(tag, "true")
        return model, small_settings(model, TARGET_TAG=tag)

    return make


def test_a_publish_finds_what_was_made_ahead(tagged, packages, crane):
    _, settings = tagged(tags={"MODEL_PLATFORMS": "linux/amd64,linux/arm64"})
    (first,) = warm(settings)
    assert (first.state, first.known, first.made) == ("warm", 0, 2)
    packages.requests.clear()
    published = publish(settings)
    assert packages.requests == []
    assert "PASS" in crane("validate", "--remote", str(published.reference))
    (again,) = warm(settings)
    assert (again.state, again.known, again.made) == ("warm", 2, 0)


def test_requirements_from_a_file(small, small_settings, packages, tmp_path):
    model = small("# none yet\n", files={"client/app.py": "print(1)\n"})
    settings = small_settings(model)
    file = tmp_path / "requirements.txt"
    file.write_text(REQUIREMENTS)
    # A file without a server of its own needs MLflow's, which the small index does not have.
    with pytest.raises(InvalidVersion, match="mlflow-skinny"):
        warm_requirements(settings, file, python="3.11")
    file.write_text("small-app==1.0\ngit+https://example.com/x\n")
    with pytest.raises(InvalidVersion, match=r"line 2"):
        warm_requirements(settings, file, python="3.11")
    with pytest.raises(UsageError, match="No such file"):
        warm_requirements(settings, tmp_path / "nothing.txt", python="3.11")


def test_one_that_fails_keeps_none_from_being_done(small, small_settings, packages):
    models = [small(requirements) for requirements in ("needs-old==1.0\n", "only-amd64==1.0\n", REQUIREMENTS)]
    models.append(small(files={"templates/Dockerfile.template": "FROM scratch\n"}))
    tag = f"EXTERNAL_TARGET_{models[0].name}_all"
    for model in models:
        model.set_tag(tag, "true")
    settings = small_settings(models[0], TARGET_TAG=tag, TARGET_PLATFORMS="linux/amd64,linux/arm64")
    results = list(warm(settings))
    assert [result.state for result in results] == ["failed", "warm", "warm", "passed over"]
    assert results[0].exit_code == ExitCode.DATA
    assert "small-lib" in results[0].detail
    assert "only-amd64 has no wheel for linux/arm64" in results[1].detail


def put(settings, key, content, source):
    """Keep another layer under a key, as somebody could who may write there."""
    blob = BytesBlob(gzip.compress(content, mtime=0))
    layer = Layer(digest=blob.digest, size=blob.size, diff_id=Digest.of(content), uncompressed=len(content))
    with Registries() as registries:
        repository = settings.wheel_layer_repository
        store = LayerStore(registries.for_host(repository.host), repository)
        store.keep(key, layer, blob, source=source, title="not what it says")


def keys(crane, settings):
    listed = crane("ls", str(settings.wheel_layer_repository)).split()
    return [tag for tag in listed if not tag.startswith(("lock-", "base-"))]


def test_a_layer_that_was_exchanged_is_found(tagged, crane):
    _, settings = tagged()
    list(warm(settings))
    (right,) = warm(settings, verify=True)
    assert (right.state, right.known, right.detail, right.exit_code) == ("verified", 2, "", 0)
    key = keys(crane, settings)[0]
    put(settings, key, b"\0" * 1024, key.partition("-")[0])
    (wrong,) = warm(settings, verify=True)
    assert (wrong.state, wrong.known, wrong.exit_code) == ("different", 1, ExitCode.DATA)
    assert key in wrong.detail
    manifest = json.loads(crane("manifest", f"{settings.wheel_layer_repository}:{key}"))
    assert manifest["layers"][0]["digest"] in wrong.detail


def test_content_that_was_exchanged_is_found(tagged, registry, crane):
    _, settings = tagged()
    list(warm(settings))
    manifest = json.loads(crane("manifest", f"{settings.wheel_layer_repository}:{keys(crane, settings)[0]}"))
    digest = manifest["layers"][0]["digest"].partition(":")[2]
    path = registry.storage / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (wrong,) = warm(settings, verify=True)
    finally:
        path.write_bytes(content)  # other tests share the registry
    assert (wrong.state, wrong.exit_code) == ("different", ExitCode.DATA)


def test_a_registry_that_is_away_is_no_layer_that_was_exchanged(tagged, registry, crane):
    _, settings = tagged()
    list(warm(settings))
    manifest = json.loads(crane("manifest", f"{settings.wheel_layer_repository}:{keys(crane, settings)[0]}"))
    layer = manifest["layers"][0]["digest"]

    def rule(asked):
        return (503, {"Retry-After": "0"}, b"") if asked.method == "GET" and asked.path.endswith(layer) else None

    with forwarding(registry.host, rule) as proxy:
        there = settings.registry_url.path
        away = settings.model_copy(update={"registry_url": Repository.parse_prefix(f"{proxy.host}/{there}")})
        (result,) = warm(away, verify=True)
    assert (result.state, result.exit_code) == ("failed", ExitCode.UNAVAILABLE)
    assert "delete" not in result.detail


def test_what_is_not_there_yet_is_not_wrong(tagged):
    _, settings = tagged()
    (result,) = warm(settings, verify=True)
    assert (result.state, result.known, result.detail) == ("verified", 0, "2 layers are not there yet")
