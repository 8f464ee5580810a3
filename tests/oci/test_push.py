"""Images against real registries; crane is the judge of what arrived."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.errors import BuildFailed, InvalidSettings, PermissionRefused, ServiceUnavailable, TryAgain
from builder.http import RetryPolicy
from builder.oci import OCI_INDEX, OCI_MANIFEST, BytesBlob, LayoutBlob
from builder.oci.authn import Credential, Credentials
from builder.oci.base_image import find_image
from builder.oci.manifest import SOURCE_ID, Image, finished_image, index, open_layout
from builder.oci.registry import Registry, move_tag, published, push_image
from builder.reference import Digest, Platform, Reference, Repository
from scripts.launch import clean_environ
from tests.oci.layouts import make_layout, tar
from tests.servers.registries import RegistryServer, run_registry
from tests.waiting import HANG

AMD64, ARM64, ARM = Platform("linux", "amd64"), Platform("linux", "arm64"), Platform("linux", "arm", "v7")
QUICK = RetryPolicy(attempts=3, first=0.01, longest=0.05, deadline=HANG)
CREATED = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
SOURCE = "ab" * 32
KINDS = ["registry", "registry_v3", "basic_registry", "token_registry", "tls_registry"]


def registries_for(server: RegistryServer, *, pull_only: bool = False) -> Registries:
    user, password = (server.pull_user, server.pull_password) if pull_only else (server.user, server.password)
    credentials = Credentials(explicit=server.host, credential=Credential(user, password)) if user else Credentials()
    return Registries(credentials, ca_bundle=server.ca, policy=QUICK)


def new_repository(server: RegistryServer) -> Repository:
    return Repository(server.host, f"models/{uuid.uuid4().hex}")


def make(folder: Path, platform: Platform, *, source: str = SOURCE, content: bytes = b"x") -> tuple[Image, object]:
    layers = [tar("same", b"the same for all"), tar("own", content)]
    made = make_layout(
        folder, layers=layers, os=platform.os, architecture=platform.architecture, variant=platform.variant
    )
    layout = open_layout(made.folder, platform)
    annotations = {SOURCE_ID: source}
    return finished_image(layout, labels=annotations, annotations=annotations, created=CREATED), layout


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> RegistryServer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def judged(registry: RegistryServer, crane, tmp_path: Path):
    """Validate a reference and give the configs of its platforms."""

    def judge(server: RegistryServer, tag: Reference, digest: Digest, platforms: list[Platform]) -> list[dict]:
        environ = {"DOCKER_CONFIG": str(server.docker_config(tmp_path / "docker"))}
        if server.ca:
            environ["SSL_CERT_FILE"] = str(server.ca)
        if server.tokens:
            # crane takes no token from a server on a loopback address; skopeo does, and copies digest by digest.
            copy = new_repository(registry).tag("copy")
            login = ["--src-creds", f"{server.user}:{server.password}"]
            flags = ["--quiet", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
            subprocess.run(
                ["skopeo", "copy", *flags, *login, f"docker://{tag}", f"docker://{copy}"],
                check=True,
                env=clean_environ(),
            )
            tag = copy
        assert crane("digest", str(tag), environ=environ).strip() == str(digest)
        crane("validate", "--remote", str(tag), environ=environ)
        return [json.loads(crane("config", "--platform", str(each), str(tag), environ=environ)) for each in platforms]

    return judge


def test_an_index_of_two_platforms_arrives_whole(server: RegistryServer, tmp_path: Path, judged) -> None:
    repository = new_repository(server)
    tag = repository.tag("v1")
    with registries_for(server) as registries:
        registry = registries.for_host(server.host)
        registry.check_push(repository)
        assert published(registry, tag) is None
        pushed = []
        for platform in (AMD64, ARM):
            image, layout = make(tmp_path / platform.folder, platform)
            pushed.append(push_image(registry, repository, layout, image))
        assert published(registry, tag) is None, "a tag is moved last, and by a call of its own"
        content = index(pushed, annotations={SOURCE_ID: SOURCE})
        digest = move_tag(registry, tag, content, OCI_INDEX, None)
        there = published(registry, tag)
    assert there is not None
    assert (there.digest, there.source_id, there.media_type) == (digest, SOURCE, OCI_INDEX)
    assert set(there.platforms) == {AMD64, ARM}
    for config in judged(server, tag, digest, [AMD64, ARM]):
        assert config["config"]["Labels"] == {SOURCE_ID: SOURCE}
        assert config["created"] == "2024-05-06T07:08:09Z"


def test_a_second_push_sends_nothing(registry: RegistryServer, tmp_path: Path) -> None:
    image, layout = make(tmp_path / "layout", AMD64, content=uuid.uuid4().bytes)
    repository = new_repository(registry)
    sent: list[int] = []
    with registries_for(registry) as registries:
        for _ in range(2):
            push_image(
                registries.for_host(registry.host), repository, layout, image, progress=lambda _, n: sent.append(n)
            )
    assert all(sent[:2])
    assert sent[2:] == [0, 0]


@pytest.mark.parametrize("kind", ["registry", "registry_v3", "token_registry"])
def test_layers_of_another_repository_are_mounted(kind: str, tmp_path: Path, request) -> None:
    server: RegistryServer = request.getfixturevalue(kind)
    first, second, empty = new_repository(server), new_repository(server), new_repository(server)
    image, layout = make(tmp_path / "layout", AMD64, content=uuid.uuid4().bytes)
    sent: list[int] = []
    with registries_for(server) as registries:
        registry = registries.for_host(server.host)
        push_image(registry, first, layout, image)
        elsewhere = Repository("registry.invalid", "never/asked")
        push_image(
            registry,
            second,
            layout,
            image,
            mount_from=[elsewhere, empty, first],
            progress=lambda _, size: sent.append(size),
        )
        layer = layout.layers[0].digest
        assert registry.mount_blob(new_repository(server), layer, first)
        assert not registry.mount_blob(new_repository(server), layer, empty)
        assert published(registry, second.digest(image.descriptor.digest)) is not None
    assert sent == [0, 0]


def test_a_single_image_is_read_back_with_the_platform_of_its_config(token_registry, tmp_path: Path) -> None:
    image, layout = make(tmp_path / "layout", ARM)
    tag = new_repository(token_registry).tag("v2")
    with registries_for(token_registry) as registries:
        registry = registries.for_host(token_registry.host)
        push_image(registry, tag.repository, layout, image)
        move_tag(registry, tag, image.manifest, OCI_MANIFEST, None)
        there = published(registry, tag)
        base = find_image(registry, tag, ARM)
    assert there is not None
    assert there.platforms == {ARM: image.descriptor}
    assert (there.source_id, there.media_type) == (SOURCE, OCI_MANIFEST)
    assert base is not None
    assert (base.digest, base.diff_ids) == (image.descriptor.digest, layout.diff_ids)


def test_a_base_is_resolved_for_each_of_its_platforms(base_image: str, registry: RegistryServer) -> None:
    reference = Reference.parse(base_image)
    with registries_for(registry) as registries:
        client = registries.for_host(registry.host)
        bases = {platform: find_image(client, reference, platform) for platform in (AMD64, ARM64, ARM)}
        assert find_image(client, reference.repository.tag("no-such-tag"), AMD64) is None
        with pytest.raises(Exception, match=r"no image for linux/s390x; it has linux/amd64, .*linux/arm64"):
            find_image(client, reference, Platform("linux", "s390x"))
    assert len({base.digest for base in bases.values()}) == 1, "the index is what the reference names"
    assert len({base.diff_ids for base in bases.values()}) == 3


def test_a_tag_that_somebody_else_moved_is_left_alone(registry: RegistryServer, tmp_path: Path) -> None:
    tag = new_repository(registry).tag("v1")
    ours, our_layout = make(tmp_path / "ours", AMD64)
    theirs, their_layout = make(tmp_path / "theirs", AMD64, source="cd" * 32)
    with registries_for(registry) as registries:
        client = registries.for_host(registry.host)
        for image, layout in ((ours, our_layout), (theirs, their_layout)):
            push_image(client, tag.repository, layout, image)
        move_tag(client, tag, theirs.manifest, OCI_MANIFEST, None)
        with pytest.raises(TryAgain, match=r"not there when the plan was made"):
            move_tag(client, tag, ours.manifest, OCI_MANIFEST, None)
        with pytest.raises(TryAgain):
            move_tag(client, tag, ours.manifest, OCI_MANIFEST, Digest.of(b"another"))
        assert published(client, tag).digest == theirs.descriptor.digest
        # What is there already is no race that was lost.
        assert move_tag(client, tag, theirs.manifest, OCI_MANIFEST, None) == theirs.descriptor.digest
        moved = move_tag(client, tag, ours.manifest, OCI_MANIFEST, theirs.descriptor.digest)
        assert published(client, tag).digest == moved == ours.descriptor.digest


@pytest.mark.parametrize("kind", ["basic_registry", "token_registry"])
@pytest.mark.parametrize(
    ("credential", "remedy"),
    [(None, "Set REGISTRY_USER"), (Credential("publisher", "wrong-secret"), "is right")],
    ids=["none", "wrong"],
)
def test_a_refused_credential_is_never_an_absent_image(kind: str, credential, remedy: str, request) -> None:
    server: RegistryServer = request.getfixturevalue(kind)
    credentials = Credentials(explicit=server.host, credential=credential)
    repository = new_repository(server)
    with Registries(credentials, policy=QUICK) as registries:
        registry = registries.for_host(server.host)
        for act in (
            lambda: registry.manifest(repository.tag("v1")),
            lambda: registry.check_push(repository),
            lambda: registry.has_blob(repository, Digest.of(b"")),
        ):
            with pytest.raises(PermissionRefused, match=remedy) as caught:
                act()
            assert "wrong-secret" not in caught.value.one_line()


def test_a_credential_that_may_only_pull_may_not_push(token_registry: RegistryServer) -> None:
    repository = new_repository(token_registry)
    with registries_for(token_registry, pull_only=True) as registries:
        registry = registries.for_host(token_registry.host)
        assert registry.manifest(repository.tag("v1")) is None
        with pytest.raises(PermissionRefused, match="what it may"):
            registry.check_push(repository)


def test_a_token_is_asked_for_once_by_many_threads(token_registry: RegistryServer) -> None:
    repository = new_repository(token_registry)
    before = len(token_registry.tokens.asked)
    with registries_for(token_registry) as registries:
        registry = registries.for_host(token_registry.host)
        threads = [
            threading.Thread(target=registry.has_blob, args=(repository, Digest.of(str(n).encode()))) for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    asked = token_registry.tokens.asked[before:]
    assert asked == [(token_registry.user, (f"repository:{repository.path}:pull,push",))]


def test_a_registry_that_is_read_only_says_so(read_only_registry: RegistryServer) -> None:
    repository = new_repository(read_only_registry)
    with registries_for(read_only_registry) as registries:
        registry = registries.for_host(read_only_registry.host)
        assert registry.manifest(repository.tag("v1")) is None
        with pytest.raises(PermissionRefused, match="read-only"):
            registry.check_push(repository)


def test_an_untrusted_certificate_names_host_and_setting(tls_registry: RegistryServer) -> None:
    with Registries(policy=QUICK) as registries, pytest.raises(InvalidSettings) as caught:
        registries.for_host(tls_registry.host).manifest(new_repository(tls_registry).tag("v1"))
    assert tls_registry.host in str(caught.value)
    assert "SSL_CERT_FILE" in str(caught.value)


def test_a_registry_that_is_away_is_tried_again_and_then_named() -> None:
    waits: list[float] = []
    policy = RetryPolicy(attempts=4, first=0.01, sleep=waits.append)
    with (
        Registries(policy=policy) as registries,
        pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:9"),
    ):
        registries.for_host("127.0.0.1:9").manifest(Repository("127.0.0.1:9", "x").tag("v1"))
    assert len(waits) == 3


def test_a_blob_that_changes_after_the_check_is_not_accepted(registry: RegistryServer, tmp_path: Path) -> None:
    image, layout = make(tmp_path / "layout", AMD64, content=uuid.uuid4().bytes * 1000)
    target = layout.layers[1]
    path = tmp_path / "layout/blobs/sha256" / target.digest.hex
    content = path.read_bytes()
    repository = new_repository(registry)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with registries_for(registry) as registries:
        client = registries.for_host(registry.host)
        with pytest.raises(BuildFailed, match=str(target.digest)):
            push_image(client, repository, layout, image)
        assert not client.has_blob(repository, target.digest)
        assert client.manifest(repository.digest(image.descriptor.digest)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.unlink(),
        lambda path: (path.rename(path.with_name("kept")), path.symlink_to("kept")),
    ],
    ids=["longer", "shorter", "gone", "a link"],
)
def test_a_blob_file_that_is_swapped_is_not_accepted(registry: RegistryServer, tmp_path: Path, change) -> None:
    content = uuid.uuid4().bytes * 100_000
    layout = make_layout(tmp_path / "layout")
    layout.blob(content)
    blob = LayoutBlob(layout=layout.folder, digest=Digest.of(content), size=len(content))
    change(layout.folder / "blobs/sha256" / blob.digest.hex)
    repository = new_repository(registry)
    with registries_for(registry) as registries:
        client = registries.for_host(registry.host)
        with pytest.raises(BuildFailed):
            client.push_blob(repository, blob)
        assert not client.has_blob(repository, blob.digest)


@dataclass(frozen=True)
class Zeros:
    """A large blob that is nowhere as a whole."""

    size: int

    @property
    def digest(self) -> Digest:
        state = hashlib.sha256()
        for chunk in self.stream():
            state.update(chunk)
        return Digest(f"sha256:{state.hexdigest()}")

    def stream(self) -> Iterator[bytes]:
        for _ in range(self.size >> 20):
            yield bytes(1 << 20)


def test_a_large_blob_is_never_in_memory_as_a_whole(registry: RegistryServer) -> None:
    blob = Zeros(64 << 20)
    repository = new_repository(registry)
    with registries_for(registry) as registries:
        client = registries.for_host(registry.host)
        client.check_push(repository)
        tracemalloc.start()
        try:
            assert client.push_blob(repository, blob) == blob.size
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("kind", ["registry", "registry-v3"])
def test_a_registry_whose_disk_is_full_says_so(kind: str, launcher, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with run_registry(launcher, tmp_path, kind=kind, storage=disk) as server, registries_for(server) as registries:
            repository = new_repository(server)
            with pytest.raises(ServiceUnavailable, match="disk is full") as caught:
                registries.for_host(server.host).push_blob(repository, Zeros(4 << 20))
        assert caught.value.retryable
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_empty_blob_can_be_pushed(server: RegistryServer) -> None:
    repository = new_repository(server)
    with registries_for(server) as registries:
        registry = registries.for_host(server.host)
        registry.push_blob(repository, BytesBlob(b""))
        assert registry.has_blob(repository, Digest.of(b""))


def test_one_client_for_each_host(registry: RegistryServer) -> None:
    with Registries() as registries:
        assert registries.for_host("a.example") is registries.for_host("a.example")
        assert isinstance(registries.for_host("b.example"), Registry)
        with pytest.raises(ValueError, match="is not at"):
            registries.for_host("a.example").manifest(Repository("b.example", "x").tag("v1"))
