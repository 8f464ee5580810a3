"""Layers and locks ahead of time: found by a publish later, and held against what they should be."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from builder import batch
from builder.batch.warm import warm, warm_requirements
from builder.clients import Registries
from builder.errors import ExitCode, InvalidVersion, UsageError
from builder.oci import BytesBlob
from builder.oci.layer import Layer
from builder.oci.registry import RemoteBlob
from builder.oci.rootfs import BaseFacts
from builder.oci.store import LayerStore
from builder.publish import publish
from builder.reference import Digest, Repository
from builder.wheels.lock import Lock
from builder.wheels.recipe import FACTS
from builder.wheels.resolve import LOCK_TYPE
from tests.package_index.server import running
from tests.servers.forwarding import forwarding
from tests.servers.small import REQUIREMENTS
from tests.waiting import HANG


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


@pytest.fixture
def serving(packages):
    """An index of small packages, and of what serving a model without a client needs; nothing is served here."""
    with running() as index:
        index.files.update({name: packages.files[name] for name in ("small-app", "small-lib")})
        for name, version in (("mlflow-skinny", "3.17.2"), ("pandas", "2.0"), ("uvicorn", "1.0")):
            index.add(name, version)
        yield index


def test_a_publish_finds_what_was_made_of_a_requirements_file(small, small_settings, serving, tmp_path):
    lines = f"{REQUIREMENTS}mlflow==3.17.2\n"
    file = tmp_path / "common.txt"
    file.write_text(f"# what all of us use\n{lines}")
    model = small(lines, files={"client/app.py": None}, tags={"MODEL_ENTRY_POINT": ""})
    settings = small_settings(model, UV_DEFAULT_INDEX=serving.simple, WHEEL_BYTECODE="false")
    made = warm_requirements(settings, file, python="3.11")
    assert (made.name, made.state, made.known, made.made) == (str(file), "warm", 0, 5)
    serving.requests.clear()
    publish(settings)
    assert downloads(serving) == []
    verified = warm_requirements(settings, file, python="3.11", verify=True)
    assert (verified.state, verified.known, verified.detail) == ("verified", 5, "")


def test_a_lock_made_of_a_requirements_file_is_found_on_the_same_day(
    small, small_settings, serving, tmp_path, monkeypatch
):
    lines = f"{REQUIREMENTS}mlflow==3.17.2\n"
    file = tmp_path / "common.txt"
    file.write_text(lines)
    model = small(lines, files={"client/app.py": None}, tags={"MODEL_ENTRY_POINT": ""})
    created = model.client.get_model_version(model.name, model.version).creation_timestamp / 1000
    morning = datetime.fromtimestamp(created, tz=UTC).replace(hour=0, minute=0, second=1)
    settings = small_settings(model, UV_DEFAULT_INDEX=serving.simple, WHEEL_BYTECODE="false")

    class Morning(datetime):
        @classmethod
        def now(cls, tz=None):
            return morning.astimezone(tz)

    with monkeypatch.context() as early:
        early.setattr("builder.batch.warm.datetime", Morning)
        warm_requirements(settings, file, python="3.11")
    serving.requests.clear()
    publish(settings)
    assert serving.requests == []


def test_requirements_that_cannot_be_used(small, small_settings, tmp_path):
    settings = small_settings(small())
    file = tmp_path / "common.txt"
    # A file without a server of its own needs MLflow's, which the small index does not have.
    file.write_text(REQUIREMENTS)
    with pytest.raises(InvalidVersion, match="mlflow-skinny"):
        warm_requirements(settings, file, python="3.11")
    file.write_text("small-app==1.0\ngit+https://example.com/x\n-r more.txt\n")
    with pytest.raises(InvalidVersion, match=r"common\.txt.* line 2.* line 3") as caught:
        warm_requirements(settings, file, python="3.11")
    assert "register" not in caught.value.remedy
    file.write_bytes(b"#" * (2 << 20))
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        warm_requirements(settings, file, python="3.11")
    with pytest.raises(UsageError, match="No such file"):
        warm_requirements(settings, tmp_path / "nothing.txt", python="3.11")


def test_a_failed_version_does_not_stop_the_others(small, small_settings, packages):
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


@pytest.fixture
def store():
    """Return the store that settings name, as somebody has it who may write there."""
    with Registries() as registries:

        def of(settings):
            repository = settings.wheel_layer_repository
            return LayerStore(registries.for_host(repository.host), repository)

        yield of


def keys(crane, settings, prefix=""):
    listed = sorted(crane("ls", str(settings.wheel_layer_repository)).split())
    return [tag for tag in listed if (tag.startswith(prefix) if prefix else not tag.startswith(("lock-", "base-")))]


def downloads(index):
    """Return the names of the wheels that were downloaded; a resolver looks into wheels, too."""
    return [
        path.rpartition("/")[2]
        for method, path, headers in index.requests
        if path.endswith(".whl") and method == "GET" and headers["User-Agent"].startswith("model-image-builder/")
    ]


def states(result, what):
    return [check.verdict.state for check in result.checks if check.what == what]


def test_a_layer_that_was_exchanged_is_found(tagged, crane, store):
    _, settings = tagged()
    list(warm(settings))
    (right,) = warm(settings, verify=True)
    assert (right.state, right.known, right.detail, right.exit_code) == ("verified", 2, "", 0)
    assert [states(right, what) for what in ("base image", "lock", "layer")] == [["same"], ["same"], ["same", "same"]]
    key = keys(crane, settings)[0]
    content = b"\0" * 1024
    blob = BytesBlob(gzip.compress(content, mtime=0))
    layer = Layer(digest=blob.digest, size=blob.size, diff_id=Digest.of(content), uncompressed=len(content))
    store(settings).keep(key, layer, blob, source=key.partition("-")[0], title="not what it says")
    before = crane("manifest", f"{settings.wheel_layer_repository}:{key}")
    (wrong,) = warm(settings, verify=True)
    assert (wrong.state, wrong.known, wrong.exit_code) == ("different", 1, ExitCode.DATA)
    assert f"{settings.wheel_layer_repository}:{key}" in wrong.detail
    assert f"its digest is {blob.digest} and should be sha256:" in wrong.detail
    # What was found stays for whoever looks into it.
    assert crane("manifest", f"{settings.wheel_layer_repository}:{key}") == before


def test_a_layer_that_lies_about_its_content_is_found(tagged, crane, store):
    _, settings = tagged()
    list(warm(settings))
    key = keys(crane, settings)[0]
    source = key.partition("-")[0]
    honest = store(settings).layer(key, source=source)
    lying = replace(honest, diff_id=Digest.of(b"something else"))
    held = RemoteBlob(store(settings).registry, store(settings).repository, honest.descriptor)
    store(settings).keep(key, lying, held, source=source, title="")
    (wrong,) = warm(settings, verify=True)
    assert wrong.state == "different"
    assert f"its diff id is {lying.diff_id} and should be {honest.diff_id}" in wrong.detail
    assert "its digest" not in wrong.detail


@pytest.mark.parametrize(
    "change", [lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: content[:-10]],
    ids=["other bytes", "fewer bytes"],
)  # fmt: skip
@pytest.mark.usefixtures("impatient")
def test_content_that_was_exchanged_is_found(tagged, registry, crane, change):
    _, settings = tagged()
    list(warm(settings))
    manifest = json.loads(crane("manifest", f"{settings.wheel_layer_repository}:{keys(crane, settings)[0]}"))
    digest = manifest["layers"][0]["digest"].partition(":")[2]
    path = registry.storage / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
    content = path.read_bytes()
    try:
        path.write_bytes(change(content))
        (wrong,) = warm(settings, verify=True)
    finally:
        path.write_bytes(content)  # other tests share the registry
    assert (wrong.state, wrong.known, wrong.exit_code) == ("different", 1, ExitCode.DATA)
    assert digest in wrong.detail


def test_a_layer_of_a_wheel_that_no_index_has_hides_no_other(tagged, packages):
    packages.add("withdrawn", "1.0")
    _, settings = tagged(requirements=f"{REQUIREMENTS}withdrawn\n")
    list(warm(settings))
    del packages.files["withdrawn"]
    (result,) = warm(settings, verify=True)
    assert (result.state, result.known, result.exit_code) == ("unproven", 2, ExitCode.CANNOT_CREATE)
    assert sorted(states(result, "layer")) == ["not derivable", "same", "same"]
    assert "withdrawn-1.0-py3-none-any.whl" in result.detail


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


def test_facts_of_a_base_image_that_were_exchanged_are_found(tagged, crane, store):
    _, settings = tagged()
    list(warm(settings))
    (key,) = keys(crane, settings, "base-")
    facts = BaseFacts(interpreters={"3.11": "/usr/bin/other"}, glibc=(2, 99), musl=False, occupied=False)
    store(settings).keep_text(key, facts.to_json(), kind=FACTS, title="")
    (wrong,) = warm(settings, verify=True)
    assert (wrong.state, wrong.exit_code) == ("different", ExitCode.DATA)
    assert f"{settings.wheel_layer_repository}:{key}" in wrong.detail
    assert "/usr/bin/other" in wrong.detail
    assert states(wrong, "layer") == []


def test_a_lock_that_was_exchanged_is_told(tagged, crane, store):
    _, settings = tagged()
    list(warm(settings))
    (key,) = keys(crane, settings, "lock-")
    lock = Lock.from_text(store(settings).text(key, kind=LOCK_TYPE))
    other = lock.model_copy(update={"wheels": lock.wheels[:1]})
    store(settings).keep_text(key, other.to_text().encode(), kind=LOCK_TYPE, title="")
    (result,) = warm(settings, verify=True)
    assert (result.state, states(result, "lock"), result.exit_code) == ("verified", ["not derivable"], 0)
    assert f"{settings.wheel_layer_repository}:{key}" in result.detail
    assert f"the indexes now give {lock.wheels[1].filename} in place of nothing" in result.detail


def test_what_versions_share_is_made_again_once(small, small_settings, packages, monkeypatch):
    # What is not answered in time would be asked for once more.
    patient = f"\nimport builder.http, httpx2; builder.http._TIMEOUT = httpx2.Timeout({HANG})\nmain("
    monkeypatch.setattr(batch, "_START", batch._START.replace("\nmain(", patient))
    models = [small(), small()]
    tag = f"EXTERNAL_TARGET_{models[0].name}_shared"
    for model in models:
        model.set_tag(tag, "true")
    settings = small_settings(models[0], TARGET_TAG=tag)
    list(warm(settings))
    packages.requests.clear()
    assert [(result.state, result.known) for result in warm(settings, verify=True)] == [("verified", 2)] * 2
    assert sorted(downloads(packages)) == sorted(f"{name}-1.0-py3-none-any.whl" for name in ("small_app", "small_lib"))


def test_missing_layers_are_no_verification_failure(tagged, packages):
    _, settings = tagged()
    packages.requests.clear()
    (result,) = warm(settings, verify=True)
    assert (result.state, result.known, result.detail) == ("verified", 0, "2 layers are not there yet")
    assert states(result, "base image") == ["missing"]
    assert downloads(packages) == []
