"""The wheels method at registries that lose things, refuse things, or are several."""

from __future__ import annotations

import hashlib
import json
import re

import httpx2
import pytest

from builder.clients import Registries
from builder.oci.base_image import base_image
from builder.publish import plan as preview
from builder.publish import publish
from builder.reference import Platform, Reference
from tests.servers.forwarding import forwarding
from tests.servers.registries import PASSWORD, USER
from tests.servers.small import push_base
from tests.waiting import HANG

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY_INDEX = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()


class Kept:
    """The repository of a publisher's wheel layers, as somebody who can write it sees it."""

    def __init__(self, registry, settings):
        self.url = f"{registry.url}/v2/{settings.wheel_layer_repository.path}"

    def tags(self, form):
        found = httpx2.get(f"{self.url}/tags/list", timeout=HANG).json()["tags"]
        chosen = [tag for tag in found if re.fullmatch(form, tag)]
        assert chosen
        return chosen

    def manifest(self, tag):
        accept = {"Accept": f"{MANIFEST}, {INDEX}"}
        return httpx2.get(f"{self.url}/manifests/{tag}", headers=accept, timeout=HANG).json()

    def put(self, tag, content, media_type=MANIFEST):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = {"Content-Type": media_type}
        answer = httpx2.put(f"{self.url}/manifests/{tag}", content=body, headers=kind, timeout=HANG)
        assert answer.status_code == 201, answer.text

    def blob(self, content, media_type):
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        place = httpx2.post(f"{self.url}/blobs/uploads/", timeout=HANG).headers["Location"]
        joined = httpx2.URL(place).copy_merge_params({"digest": digest})
        kind = {"Content-Type": "application/octet-stream"}
        answer = httpx2.put(joined, content=content, headers=kind, timeout=HANG)
        assert answer.status_code == 201
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def forget(self, digest):
        assert httpx2.delete(f"{self.url}/blobs/{digest}", timeout=HANG).status_code == 202


LAYERS, LOCKS, FACTS = r"[0-9a-f]{64}-.*", "lock-.*", "base-.*"


def lose_layers(kept):
    for tag in kept.tags(LAYERS):
        kept.forget(kept.manifest(tag)["layers"][0]["digest"])


def lose_texts(kept):
    for tag in kept.tags(f"{LOCKS}|{FACTS}"):
        kept.forget(kept.manifest(tag)["layers"][0]["digest"])


def indexes_everywhere(kept):
    for tag in kept.tags(".*"):
        kept.put(tag, EMPTY_INDEX, INDEX)


def exchange_layers(kept):
    first, second = kept.tags(LAYERS)
    one, other = kept.manifest(first), kept.manifest(second)
    kept.put(first, other)
    kept.put(second, one)


def exchange_texts(kept):
    (lock,), (facts,) = kept.tags(LOCKS), kept.tags(FACTS)
    one, other = kept.manifest(lock), kept.manifest(facts)
    kept.put(lock, other)
    kept.put(facts, one)


def texts_of(*contents):
    def act(kept):
        for form in (LOCKS, FACTS):
            for tag in kept.tags(form):
                manifest = kept.manifest(tag)
                for content in contents:
                    layer = kept.blob(content, manifest["layers"][0]["mediaType"])
                    kept.put(tag, {**manifest, "layers": [layer]})

    return act


DAMAGE = {
    "layers lost": lose_layers,
    "texts lost": lose_texts,
    "indexes under every tag": indexes_everywhere,
    "layers exchanged": exchange_layers,
    "texts exchanged": exchange_texts,
    "texts that are no text": texts_of(b"\xff\xfe\x00"),
    "texts of an empty object": texts_of(b"{}"),
    "texts without an end": texts_of(b"[" * 100_000),
    "locks of nothing": texts_of(b'lock-version = "1.0"\ncreated-by = "model-image-builder"\n[tool]\n'),
}


# What is told of damage: to layers and texts, to a lock.
MENDED = ("rebuilding it", "resolving again")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_among_what_is_kept_is_seen_and_mended(small, small_settings, registry, crane, damage, caplog):
    model = small()
    settings = small_settings(model)
    first = publish(settings)
    damage(Kept(registry, settings))
    # Another version of the same environment, which has no image yet whose lock it could take.
    other = small(files={"mymodel/weights.txt": "42\n"})
    place = {"REGISTRY_URL": str(settings.registry_url)}
    published = publish(small_settings(other, **place))
    assert any(said in caplog.text for said in MENDED)
    caplog.clear()
    # What was mended is found.
    (step,) = preview(small_settings(other, **place), rebuild=True).platforms
    assert (step.layers.known, step.layers.missing) == (2, ())
    assert publish(settings, rebuild=True).reference == first.reference
    assert not any(said in caplog.text for said in (*MENDED, "reading it again"))
    for reference in (first.reference, published.reference):
        assert "PASS" in crane("validate", "--remote", str(reference))


# -- registries that refuse


def as_upload(asked):
    """Answer a mount with an upload, as a registry may that mounts nothing."""
    return asked.path.partition("?")[0] if "mount=" in asked.path else None


def refusing(status):
    def rule(asked):
        body = b'{"errors": [{"code": "UNSUPPORTED", "message": "mounts are not supported"}]}'
        return (status, {"Content-Type": "application/json"}, body) if "mount=" in asked.path else None

    return rule


def no_artifacts(asked):
    if asked.method == "PUT" and b'"artifactType"' in asked.body:
        body = b'{"errors": [{"code": "MANIFEST_INVALID", "message": "unknown media type"}]}'
        return 415, {"Content-Type": "application/json"}, body
    return None


REFUSALS = {
    "mounts become uploads": as_upload,
    "mounts are not allowed": refusing(405),
    "artifacts are not known": no_artifacts,
}


@pytest.mark.parametrize("rule", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_registry_that_refuses_gets_the_same_image(small, small_settings, registry, crane, rule, caplog):
    model = small()
    with forwarding(registry.host) as proxy:
        place = {"REGISTRY_URL": f"{proxy.host}/{model.name}", "BASE_IMAGE": push_base(proxy.host)}
        whole = publish(small_settings(model, **place))
        proxy.rule = rule
        # Cold, and then with all layers known.
        for namespace in ("one", "two"):
            changes = {
                **place,
                "REGISTRY_URL": f"{proxy.host}/{model.name}-{namespace}",
                "WHEEL_LAYERS": f"{proxy.host}/{model.name}-wheels",
            }
            published = publish(small_settings(model, **changes))
            assert published.reference.digest == whole.reference.digest
            assert "PASS" in crane("validate", "--remote", str(published.reference))
    if rule is no_artifacts:
        assert "does not accept a referrer" in caplog.text
        assert "does not accept a text" in caplog.text


def test_the_lock_is_listed_beside_the_image(small, small_settings, registry, crane):
    published = publish(small_settings(small()))
    repository, digest = published.reference.repository, published.reference.digest
    listed = json.loads(crane("manifest", f"{repository}:sha256-{digest.hex}"))["manifests"]
    (lock,) = [each for each in listed if each["artifactType"] == "application/vnd.modelimage.lock.v1+toml"]
    manifest = json.loads(crane("manifest", f"{repository}@{lock['digest']}"))
    assert manifest["subject"]["digest"] == str(digest)
    text = crane("blob", f"{repository}@{manifest['layers'][0]['digest']}")
    assert "small_lib-1.0-py3-none-any.whl" in text
    assert "127.0.0.1" not in text
    labels = json.loads(crane("config", str(published.reference)))["config"]["Labels"]
    assert labels["io.modelimage.lock-digest"] == manifest["layers"][0]["digest"]


# -- a base somewhere else


@pytest.mark.parametrize("kind", ["tls_registry", "token_registry"])
def test_a_base_of_another_registry_is_copied_once(
    small, small_settings, registry, kind, request, tmp_path, monkeypatch, crane
):
    home = request.getfixturevalue(kind)
    credentials = home.docker_config(tmp_path / "docker")
    changes = {"DOCKER_CONFIG": str(credentials)}
    if home.ca:
        changes["SSL_CERT_FILE"] = str(home.ca)
    models = [small(), small(files={"mymodel/weights.txt": "1\n"})]
    with forwarding(registry.host) as proxy:
        with Registries.from_settings(small_settings(models[0], **changes)) as registries:
            base = push_base(home.host, f"{models[0].name}/python:3.11", registries=registries)
            layers = _layers(registries, base)
        copied = []
        for model in models:
            proxy.seen.clear()
            place = {"REGISTRY_URL": f"{proxy.host}/{models[0].name}", "BASE_IMAGE": base}
            published = publish(small_settings(model, **place, **changes))
            sent = [each for each in proxy.seen if each.method == "PUT" and any(d in each.path for d in layers)]
            copied.append([each.path.split("/blobs/")[0] for each in sent])
            assert "PASS" in crane("validate", "--remote", str(published.reference))
        assert copied == [[f"/v2/{models[0].name}/wheel-layers"], []]


def _layers(registries, base):
    reference = Reference.parse(base)
    found = base_image(registries.for_host(reference.repository.host), reference, Platform("linux", "amd64"))
    return [layer.digest.hex for layer in found.layers]


def test_a_registry_with_a_credential_takes_all_of_it(small, small_settings, basic_registry, crane, tmp_path):
    model = small()
    place = {"REGISTRY_URL": f"{basic_registry.host}/{model.name}", "REGISTRY_USER": USER, "REGISTRY_TOKEN": PASSWORD}
    published = publish(small_settings(model, **place))
    environ = {"DOCKER_CONFIG": str(basic_registry.docker_config(tmp_path / "docker"))}
    assert "PASS" in crane("validate", "--remote", str(published.reference), environ=environ)
