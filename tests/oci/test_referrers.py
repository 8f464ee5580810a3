"""What is kept beside an image: found by the registry's own list, or by the tag that stands in for it."""

from __future__ import annotations

import json
import uuid

import httpx2
import pytest

from builder.clients import Registries
from builder.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, BytesBlob, Descriptor, to_bytes
from builder.oci.store import attach
from builder.reference import Repository
from tests.servers.forwarding import forwarding
from tests.waiting import HANG

KIND = "application/vnd.modelimage.lock.v1+toml"


@pytest.fixture(params=["registry", "registry_v3"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def client(server):
    with Registries() as registries:
        yield registries.for_host(server.host)


@pytest.fixture
def repository(server):
    return Repository(server.host, f"referrers/{uuid.uuid4().hex}")


@pytest.fixture
def subject(client, repository):
    """An image, as small as can be."""
    config = b"{}"
    client.push_blob(repository, BytesBlob(config))
    content = to_bytes(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": Descriptor.of(config, OCI_CONFIG).to_json(),
            "layers": [],
        }
    )
    found = Descriptor.of(content, OCI_MANIFEST)
    client.put_manifest(repository, content, OCI_MANIFEST, found.digest)
    return found


def listed(client, repository, subject):
    fetched = client.manifest(repository.tag(f"sha256-{subject.digest.hex}"))
    return json.loads(fetched.content)["manifests"] if fetched else []


def test_a_registry_without_the_list_gets_a_tag(client, server, repository, subject, crane):
    tag = attach(client, repository, subject, b"lock", kind=KIND, title="pylock.toml")
    # Neither of the distribution project's registries has the API; the answer says so.
    url = f"{server.url}/v2/{repository.path}/referrers/{subject.digest}"
    assert httpx2.get(url, timeout=HANG).status_code == 404
    (entry,) = listed(client, repository, subject)
    assert entry["digest"] == str(tag.digest)
    assert entry["artifactType"] == KIND
    assert entry["size"] == tag.size
    manifest = json.loads(crane("manifest", f"{repository}@{tag.digest}"))
    assert manifest["subject"] == {
        "mediaType": OCI_MANIFEST, "digest": str(subject.digest), "size": subject.size
    }  # fmt: skip
    assert crane("blob", f"{repository}@{manifest['layers'][0]['digest']}") == "lock"


def test_attached_twice_it_is_listed_once(client, repository, subject):
    for content in (b"lock", b"lock", b"another", b"lock"):
        attach(client, repository, subject, content, kind=KIND, title="pylock.toml")
    entries = listed(client, repository, subject)
    assert len(entries) == len({entry["digest"] for entry in entries}) == 2


def test_what_others_attached_stays(client, repository, subject):
    theirs = {"mediaType": OCI_MANIFEST, "digest": str(subject.digest), "size": subject.size, "artifactType": "a/b"}
    index = to_bytes({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [theirs]})
    client.put_manifest(repository, index, OCI_INDEX, f"sha256-{subject.digest.hex}")
    attach(client, repository, subject, b"lock", kind=KIND, title="pylock.toml")
    assert [entry["artifactType"] for entry in listed(client, repository, subject)] == ["a/b", KIND]


def test_something_else_under_the_tag_is_replaced(client, repository, subject):
    content = client.manifest(repository.digest(subject.digest)).content
    client.put_manifest(repository, content, OCI_MANIFEST, f"sha256-{subject.digest.hex}")
    assert attach(client, repository, subject, b"lock", kind=KIND, title="pylock.toml")
    assert len(listed(client, repository, subject)) == 1


def test_a_registry_that_lists_by_itself_needs_no_tag(server, client, repository, subject):
    says = {"OCI-Subject": str(subject.digest)}
    with forwarding(server.host, adds=says) as proxy, Registries() as registries:
        there = Repository(proxy.host, repository.path)
        assert attach(registries.for_host(proxy.host), there, subject, b"lock", kind=KIND, title="pylock.toml")
    assert listed(client, repository, subject) == []


@pytest.mark.parametrize("status", [400, 404, 405, 415])
def test_a_registry_that_takes_no_artifacts_costs_a_warning(server, repository, subject, status, caplog):
    def rule(asked):
        refused = asked.method == "PUT" and b'"artifactType"' in asked.body
        return (status, {"Content-Type": "application/json"}, b'{"errors": []}') if refused else None

    with forwarding(server.host, rule) as proxy, Registries() as registries:
        there = Repository(proxy.host, repository.path)
        assert attach(registries.for_host(proxy.host), there, subject, b"x", kind=KIND, title="pylock.toml") is None
    assert "does not accept a referrer" in caplog.text
