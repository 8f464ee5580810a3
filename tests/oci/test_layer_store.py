"""Layers and texts kept in a real registry, and what happens where something else stands under their tags."""

from __future__ import annotations

import json
import uuid

import pytest

from builder.clients import Registries
from builder.errors import BuilderError
from builder.oci import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, BytesBlob, Descriptor
from builder.oci.layer import LayerWriter, Plain
from builder.oci.manifest import manifest_of
from builder.oci.store import DIFF_ID, EMPTY, EMPTY_CONFIG, SOURCE, UNCOMPRESSED, LayerStore
from builder.reference import Digest, Repository
from tests.servers.forwarding import forwarding

KIND = "application/vnd.modelimage.lock.v1+toml"
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"
WHEEL = "5" * 64


@pytest.fixture
def store(registry):
    with Registries() as registries:
        yield LayerStore(registries.for_host(registry.host), Repository(registry.host, f"store/{uuid.uuid4().hex}"))


def a_layer(content=b"x"):
    writer = LayerWriter()
    chunks = [*writer.file("opt/model/x", Plain(chunks=[content], size=len(content))), *writer.finish()]
    return writer.layer, BytesBlob(b"".join(chunks))


@pytest.fixture
def kept(store):
    """A layer that is kept, and its manifest as it stands in the registry."""
    layer, blob = a_layer()
    store.keep("key", layer, blob, source=WHEEL, title="x-1.0-py3-none-any.whl")
    return layer, json.loads(store.registry.manifest(store.repository.tag("key")).content)


def test_a_layer_comes_back_as_it_was(store, kept, crane):
    layer, _ = kept
    assert store.layer("key", source=WHEEL) == layer
    assert "PASS" in crane("validate", "--remote", f"{store.repository}:key")


def test_an_unknown_key_has_no_layer(store):
    assert store.layer("key", source=WHEEL) is None
    assert store.text("key", kind=KIND) is None


def test_one_request_finds_a_layer(store, kept):
    with forwarding(store.repository.host) as proxy, Registries() as registries:
        seen = LayerStore(registries.for_host(proxy.host), Repository(proxy.host, store.repository.path))
        # The first request of a client asks what the registry is.
        assert seen.layer("nothing", source=WHEEL) is None
        proxy.seen.clear()
        assert seen.layer("key", source=WHEEL)
        assert [each.method for each in proxy.seen] == ["GET"]


def without(manifest, name):
    return {**manifest, "annotations": {key: text for key, text in manifest["annotations"].items() if key != name}}


def noted(manifest, name, text):
    return {**manifest, "annotations": {**manifest["annotations"], name: text}}


def layers(manifest, **changes):
    return {**manifest, "layers": [{**manifest["layers"][0], **changes}]}


GARBAGE = {
    "another wheel's": lambda m: noted(m, SOURCE, "6" * 64),
    "no source": lambda m: without(m, SOURCE),
    "no diff id": lambda m: without(m, DIFF_ID),
    "a diff id that is none": lambda m: noted(m, DIFF_ID, "sha256:short"),
    "a diff id by another hash": lambda m: noted(m, DIFF_ID, f"sha512:{'0' * 128}"),
    "no size": lambda m: without(m, UNCOMPRESSED),
    "a size below nothing": lambda m: noted(m, UNCOMPRESSED, "-1"),
    "a size that is no number": lambda m: noted(m, UNCOMPRESSED, "1e3"),
    "a size in other digits": lambda m: noted(m, UNCOMPRESSED, "\u0661"),
    "a size that no machine has": lambda m: noted(m, UNCOMPRESSED, "9" * 5000),
    "no annotations": lambda m: {key: value for key, value in m.items() if key != "annotations"},
    "no layer": lambda m: {**m, "layers": []},
    "two layers": lambda m: {**m, "layers": m["layers"] * 2},
    "a layer of another kind": lambda m: layers(m, mediaType="application/octet-stream"),
    "Docker's own form": lambda m: {
        **layers(m, mediaType="application/vnd.docker.image.rootfs.diff.tar.gzip"),
        "mediaType": DOCKER,
        "config": {**m["config"], "mediaType": "application/vnd.docker.container.image.v1+json"},
    },
    "an index": lambda m: {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []},
}


@pytest.mark.parametrize("spoil", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_under_a_tag_is_no_layer_and_is_replaced(store, kept, spoil, caplog):
    layer, manifest = kept
    spoilt = spoil(manifest)
    store.registry.put_manifest(store.repository, json.dumps(spoilt).encode(), spoilt["mediaType"], "key")
    assert store.layer("key", source=WHEEL) is None
    assert "the cached layer is invalid" in caplog.text
    store.keep("key", *a_layer(), source=WHEEL, title="again")
    assert store.layer("key", source=WHEEL) == layer


def test_a_layer_whose_content_cannot_be_sent_is_not_found(store):
    layer, _ = a_layer()
    with pytest.raises(BuilderError):
        store.keep("key", layer, BytesBlob(b"another"), source=WHEEL, title="x")
    assert store.layer("key", source=WHEEL) is None or store.registry.has_blob(store.repository, layer.digest)


def test_a_text_comes_back_as_it_was(store):
    store.keep_text("key", b"text", kind=KIND, title="a text")
    assert store.text("key", kind=KIND) == b"text"
    store.keep_text("key", b"another", kind=KIND, title="a text")
    assert store.text("key", kind=KIND) == b"another"


def put(store, manifest, media_type=OCI_MANIFEST):
    store.registry.push_blob(store.repository, EMPTY)
    store.registry.put_manifest(store.repository, manifest, media_type, "key")


def test_a_text_of_another_kind_is_not_found(store):
    store.keep_text("key", b"text", kind="application/vnd.other", title="a text")
    assert store.text("key", kind=KIND) is None


def test_an_index_is_no_text(store):
    put(store, json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode(), OCI_INDEX)
    assert store.text("key", kind=KIND) is None


def test_a_kept_layer_is_no_text(store, kept):
    assert store.text("key", kind=KIND) is None


def test_a_manifest_of_several_texts_is_invalid(store):
    store.keep_text("other", b"text", kind=KIND, title="a text")
    put(store, manifest_of(EMPTY_CONFIG, [Descriptor.of(b"text", KIND)] * 2, {}, kind=KIND))
    assert store.text("key", kind=KIND) is None


def test_a_text_that_says_another_size_is_never_read_past_its_bound(store):
    store.keep_text("other", b"text", kind=KIND, title="a text")
    large = Descriptor(media_type=KIND, digest=Digest.of(b"text"), size=1 << 40)
    put(store, manifest_of(EMPTY_CONFIG, [large], {}, kind=KIND))
    assert store.text("key", kind=KIND) is None


def delete_blob(store, digest):
    answer = store.registry._transport.send(
        "DELETE", f"/v2/{store.repository.path}/blobs/{digest}", until=float("inf"), scopes=frozenset()
    )
    assert answer.status == 202


def test_a_text_that_has_lost_its_content_is_made_again(store, caplog):
    store.keep_text("key", b"text", kind=KIND, title="a text")
    delete_blob(store, Digest.of(b"text"))
    assert store.text("key", kind=KIND) is None
    assert "lost its content" in caplog.text
    store.keep_text("key", b"text", kind=KIND, title="a text")
    assert store.text("key", kind=KIND) == b"text"


def refuses_artifacts(asked):
    if asked.method == "PUT" and b'"artifactType"' in asked.body:
        body = {"errors": [{"code": "MANIFEST_INVALID", "message": "the artifact type is not known here"}]}
        return 400, {"Content-Type": "application/json"}, json.dumps(body).encode()
    return None


def test_a_registry_that_takes_no_artifacts_costs_a_warning(store, caplog):
    with forwarding(store.repository.host, refuses_artifacts) as proxy, Registries() as registries:
        there = LayerStore(registries.for_host(proxy.host), Repository(proxy.host, store.repository.path))
        there.keep_text("key", b"text", kind=KIND, title="a text")
        assert "does not accept a text" in caplog.text
        there.keep("layer", *a_layer(), source=WHEEL, title="x")
    assert store.text("key", kind=KIND) is None
    assert store.layer("layer", source=WHEEL)


def test_the_forms_are_those_that_others_read(store, kept):
    _, manifest = kept
    assert manifest["config"]["mediaType"] == OCI_CONFIG
    assert [layer["mediaType"] for layer in manifest["layers"]] == [f"{OCI_LAYER}+gzip"]
