"""What registries answer when something is wrong, from a server that answers as it is told."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from builder.clients import Registries
from builder.errors import BuilderError, InvalidSettings, InvalidVersion, PermissionRefused, ServiceUnavailable
from builder.http import RetryPolicy, retry_after
from builder.oci import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, BytesBlob, Descriptor
from builder.oci.authn import Credential, Credentials
from builder.oci.base_image import find_image
from builder.oci.manifest import finished_image, index, open_layout
from builder.oci.registry import Registry, published, push_image
from builder.reference import Digest, Platform, Repository
from builder.settings import BuildSettings, Settings
from tests.oci.fake import Asked, Fake, Reply, Reset, serve
from tests.oci.layouts import make_layout, tar
from tests.waiting import HANG

MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
FOUND = Reply(200, {"Content-Type": OCI_INDEX}, MANIFEST)
SECRET = "s3cr3t-of-the-registry"
ABSENT = Reply(404)
BLOB = BytesBlob(b"content")


@pytest.fixture
def fake():
    with serve() as server:
        yield server


@pytest.fixture
def other():
    with serve() as server:
        yield server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def registries(fake: Fake, waits: list[float]):
    policy = RetryPolicy(attempts=4, first=0.01, longest=30, deadline=HANG, sleep=waits.append)
    credentials = Credentials(explicit=fake.host, credential=Credential("user", SECRET))
    with Registries(credentials, policy=policy) as registries:
        yield registries


@pytest.fixture
def registry(registries: Registries, fake: Fake) -> Registry:
    return registries.for_host(fake.host)


@pytest.fixture
def repository(fake: Fake) -> Repository:
    return Repository(fake.host, "models/one")


# -- trying again


@pytest.mark.parametrize(
    ("failures", "least", "most"),
    [
        ([Reply.error(429, "TOOMANYREQUESTS", **{"Retry-After": "7"})], 7, 7),
        ([Reply(429, {"Retry-After": "3600"})], 30, 30),
        (
            [Reply(429, {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(hours=9), usegmt=True)})],
            30,
            30,
        ),
        ([Reply(503), Reply(502)], 0.01, 0.06),
        ([Reply(500)], 0.01, 0.03),
        ([Reset(), Reset(), Reset()], 0.01, 0.06),
    ],
    ids=["seconds", "capped", "a date", "gateway", "error", "resets"],
)
def test_transient_failures_are_retried(*, fake, registry, repository, waits, failures, least, most) -> None:
    fake.answers = [*failures, FOUND]
    assert registry.manifest(repository.tag("v1")).digest == Digest.of(MANIFEST)
    assert len(waits) == len(failures)
    assert all(least <= wait <= most for wait in waits)


@pytest.mark.parametrize("status", [400, 404, 405, 408, 409, 416, 418, 501])
def test_permanent_failures_are_not_retried(fake, registry, repository, waits, status) -> None:
    fake.answers = [Reply(status)]
    with pytest.raises(BuilderError, match=str(status)):
        registry.manifest(repository.tag("v1"))
    assert (len(fake.asked), waits) == (1, [])


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Reply.error(503, "UNAVAILABLE", "in\nmaintenance"), r"503 \(UNAVAILABLE in maintenance\)"),
        (Reply.error(507, "UNKNOWN"), "disk is full"),
        (Reply.error(500, "UNKNOWN", "write /var/lib: no space left on device"), "disk is full"),
        (Reply.error(500, "UNKNOWN", f"write /{'long' * 100}: no space left on device"), "disk is full"),
        (Reply.error(429, "TOOMANYREQUESTS"), "limits the rate"),
        (Reply(502, {"Content-Type": "text/html"}, b"<html>Bad Gateway"), "a web page"),
        (Reset(), "cannot be reached"),
    ],
    ids=["away", "507", "full", "full, after a long path", "limited", "gateway page", "resets"],
)
def test_a_persistent_failure_is_an_error_after_all_retries(fake, registry, repository, failure, message) -> None:
    fake.answer = lambda _: failure
    with pytest.raises(ServiceUnavailable, match=message) as caught:
        registry.manifest(repository.tag("v1"))
    assert len(fake.asked) == 4
    assert fake.host in str(caught.value)
    assert caught.value.retryable


def test_an_upload_that_breaks_begins_anew(fake, registry, repository) -> None:
    fake.answers = [
        ABSENT,
        Reply(202, {"Location": "/upload/1"}),
        Reply(503),
        Reply(204),
        Reply(202, {"Location": "/upload/2"}),
        Reply(201),
    ]
    assert registry.push_blob(repository, BLOB) == 7
    assert [(each.method, each.path.partition("?")[0]) for each in fake.asked[1:]] == [
        ("POST", "/v2/models/one/blobs/uploads/"),
        ("PUT", "/upload/1"),
        ("DELETE", "/upload/1"),
        ("POST", "/v2/models/one/blobs/uploads/"),
        ("PUT", "/upload/2"),
    ]


def test_an_answer_that_trickles_is_given_up(fake, repository) -> None:
    fake.answer = lambda _: Reply(200, {"Content-Type": OCI_INDEX}, MANIFEST * 100, slowly=True)
    policy = RetryPolicy(deadline=2)
    with Registries(policy=policy) as registries, pytest.raises(ServiceUnavailable, match="timed out"):
        registries.for_host(fake.host).manifest(repository.tag("v1"))
    assert len(fake.asked) == 1


def test_waiting_ends_with_the_deadline(fake, repository, waits) -> None:
    fake.answer = lambda _: Reply(429, {"Retry-After": "20"})
    policy = RetryPolicy(deadline=10, sleep=waits.append)
    with Registries(policy=policy) as registries, pytest.raises(ServiceUnavailable, match="429"):
        registries.for_host(fake.host).manifest(repository.tag("v1"))
    assert waits == [], "a wait that leads past the deadline is not begun"


@pytest.mark.parametrize(
    ("value", "expected"), [("5", 5.0), ("0", 0.0), ("", None), ("-1", None), ("soon", None), ("²", None)]
)
def test_retry_after(value: str, expected: float | None) -> None:
    assert retry_after(value) == expected


def test_a_retry_after_in_the_past_is_no_wait() -> None:
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


# -- there, not there, cannot tell


@pytest.mark.parametrize(
    "reply",
    [
        Reply.error(404, "MANIFEST_UNKNOWN"),
        Reply.error(404, "NAME_UNKNOWN"),
        Reply.error(404, "NOT_FOUND"),
        Reply(404, {"Docker-Distribution-Api-Version": "registry/2.0"}),
    ],
)
def test_an_absent_manifest_is_none(fake, registry, repository, reply) -> None:
    fake.answers = [reply]
    assert published(registry, repository.tag("v1")) is None


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(404), ServiceUnavailable),
        (Reply(404, {"Content-Type": "text/html"}, b"<html>Not found"), ServiceUnavailable),
        (
            Reply(404, {"Content-Type": "text/html", "Docker-Distribution-Api-Version": "registry/2.0"}, b"<html>"),
            ServiceUnavailable,
        ),
        (Reply.error(404, "SOMETHING"), ServiceUnavailable),
        (Reply.error(400, "MANIFEST_UNKNOWN"), ServiceUnavailable),
        (Reply.error(403, "DENIED"), PermissionRefused),
        (Reply.error(403, "NAME_UNKNOWN"), PermissionRefused),
        (Reply.error(401, "UNAUTHORIZED"), PermissionRefused),
        (Reply.error(401, "NAME_UNKNOWN"), PermissionRefused),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>Please log in"), ServiceUnavailable),
        (Reply(200, {"Content-Type": OCI_INDEX}, b"not JSON"), ServiceUnavailable),
        (Reply(200, {"Content-Type": OCI_INDEX}, b"[]"), ServiceUnavailable),
        (Reply(200, {"Content-Type": OCI_INDEX}, b"[" * 100_000), ServiceUnavailable),
        (Reply(200, {"Content-Type": OCI_MANIFEST}, MANIFEST), ServiceUnavailable),
        (Reply(200, {"Content-Type": OCI_INDEX}, b" " * (4 << 20) + MANIFEST), ServiceUnavailable),
        (
            Reply(200, {"Content-Type": OCI_INDEX, "Docker-Content-Digest": str(Digest.of(b""))}, MANIFEST),
            ServiceUnavailable,
        ),
        (Reply(302, {"Location": "ftp://127.0.0.1/"}), ServiceUnavailable),
        (Reply(302, {"Location": "http://[::1/"}), ServiceUnavailable),
        (Reply(302, {"Location": "http://127.0.0.1:port/"}), ServiceUnavailable),
        (Reply(302), ServiceUnavailable),
        (Reply(204), ServiceUnavailable),
    ],
)
def test_an_unclear_answer_is_an_error_and_never_absence(fake, registry, repository, reply, error) -> None:
    fake.answer = lambda _: reply
    with pytest.raises(error) as caught:
        published(registry, repository.tag("v1"))
    assert "\n" not in caught.value.one_line()
    assert str(caught.value)


def test_another_content_than_the_digest_names_is_refused(fake, registry, repository) -> None:
    fake.answers = [FOUND]
    with pytest.raises(ServiceUnavailable, match="content of"):
        registry.manifest(repository.digest(Digest.of(b"another")))


@pytest.mark.parametrize("content", [b"another", b"conten", b"content and more"])
def test_a_blob_of_other_content_is_refused(fake, registry, repository, content) -> None:
    fake.answers = [Reply(200, content=content)]
    with pytest.raises(ServiceUnavailable):
        registry.blob_bytes(repository, Descriptor.of(BLOB.content, OCI_CONFIG), 100)


def test_a_blob_that_promises_too_much_is_not_asked_for(fake, registry, repository) -> None:
    with pytest.raises(ServiceUnavailable, match="more than 6"):
        registry.blob_bytes(repository, Descriptor.of(BLOB.content, OCI_CONFIG), 6)
    assert fake.asked == []


@pytest.mark.parametrize(
    "manifest",
    [
        {"schemaVersion": 2, "config": {"mediaType": "application/vnd.cncf.helm.config.v1+json"}},
        {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []},
        {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": "none", "annotations": {"a": 1}},
        {"schemaVersion": 1, "name": "an old one"},
    ],
)
def test_an_artifact_under_the_tag_is_a_foreign_image(fake, registry, repository, manifest) -> None:
    content = json.dumps(manifest).encode()
    fake.answers = [Reply(200, {"Content-Type": manifest.get("mediaType", OCI_MANIFEST)}, content)]
    there = published(registry, repository.tag("v1"))
    assert (there.digest, there.source_id, there.platforms) == (Digest.of(content), None, {})


def test_a_base_that_is_no_image_is_said_so(fake, registry, repository) -> None:
    chart = {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": str(BLOB.digest), "size": 7}
    content = json.dumps({"schemaVersion": 2, "config": chart, "layers": []}).encode()
    fake.answers = [Reply(200, {"Content-Type": OCI_MANIFEST}, content), Reply(200, content=BLOB.content)]
    with pytest.raises(InvalidVersion, match="is not an image"):
        find_image(registry, repository.tag("v1"), Platform("linux", "amd64"))


def test_an_index_without_its_image_is_no_base(fake, registry, repository) -> None:
    platform = Platform("linux", "amd64")
    content = index([Descriptor.of(b"{}", OCI_MANIFEST, platform)], annotations={})
    fake.answers = [Reply(200, {"Content-Type": OCI_INDEX}, content), Reply.error(404, "MANIFEST_UNKNOWN")]
    with pytest.raises(ServiceUnavailable, match="without its image for linux/amd64"):
        find_image(registry, repository.tag("v1"), platform)


@pytest.mark.parametrize(("wanted", "found"), [("v7", True), ("v6", True), ("v5", False)])
def test_an_older_arm_runs_on_a_newer_one(fake, registry, repository, wanted: str, found: bool) -> None:
    config = json.dumps({"os": "linux", "architecture": "arm", "variant": "v6", "rootfs": {"diff_ids": []}}).encode()
    manifest = json.dumps({"schemaVersion": 2, "config": Descriptor.of(config, OCI_CONFIG).to_json()}).encode()
    fake.answers = [Reply(200, {"Content-Type": OCI_MANIFEST}, manifest), Reply(200, content=config)]
    with contextlib.nullcontext() if found else pytest.raises(InvalidVersion, match="it has linux/arm/v6"):
        assert find_image(registry, repository.tag("v1"), Platform("linux", "arm", wanted))


# -- blobs that are streamed


@pytest.fixture
def large() -> bytes:
    return random.Random(5).randbytes(300_000)


def read(registry: Registry, repository: Repository, content: bytes) -> bytes:
    return b"".join(registry.blob_stream(repository, Descriptor.of(content, "application/octet-stream")))


def ranged(asked: Asked, content: bytes, cut: int | None = None) -> Reply:
    """Answer as a registry does that knows ranges."""
    start = int(asked.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    if not start:
        return Reply(200, content=content, cut=cut)
    told = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
    return Reply(206, told, content[start:], cut=cut)


def test_a_download_that_breaks_goes_on_where_it_broke(fake, registry, repository, large) -> None:
    fake.answer = lambda asked: ranged(asked, large, cut=100_000 if len(fake.asked) < 3 else None)
    assert read(registry, repository, large) == large
    assert [each.headers.get("Range") for each in fake.asked] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_download_goes_on_where_a_registry_knows_no_ranges(fake, registry, repository, large) -> None:
    fake.answers = [Reply(200, content=large, cut=100_000), Reply(503), Reply(200, content=large)]
    assert read(registry, repository, large) == large


def test_a_download_that_always_breaks_is_given_up(fake, registry, repository, large) -> None:
    fake.answer = lambda asked: ranged(asked, large, cut=1000)
    with pytest.raises(ServiceUnavailable, match="cannot be reached"):
        read(registry, repository, large)
    assert len(fake.asked) == 4


def test_a_part_that_was_not_asked_for_is_refused(fake, registry, repository, large) -> None:
    part = Reply(206, {"Content-Range": "bytes 5-10/300000"}, large[5:11])
    fake.answers = [Reply(200, content=large, cut=100_000), part]
    with pytest.raises(ServiceUnavailable, match="another part"):
        read(registry, repository, large)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x + b"more", lambda x: b"y" + x[1:]])
def test_the_last_bytes_of_a_wrong_blob_are_never_given(fake, registry, repository, large, change) -> None:
    fake.answer = lambda _: Reply(200, content=change(large))
    got: list[bytes] = []
    with pytest.raises(ServiceUnavailable, match=r"something else|ended after 299,999 of 300,000"):
        got.extend(registry.blob_stream(repository, Descriptor.of(large, "application/octet-stream")))
    assert 0 < sum(map(len, got)) < len(large)


def test_a_blob_of_no_bytes(fake, registry, repository) -> None:
    fake.answers = [Reply(200)]
    assert read(registry, repository, b"") == b""


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (Reply.error(404, "BLOB_UNKNOWN"), ServiceUnavailable, "404"),
        (Reply.error(403, "DENIED"), PermissionRefused, "403"),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>"), ServiceUnavailable, "website"),
        (Reply(302, {"Location": "ftp://127.0.0.1/"}), ServiceUnavailable, "HTTPS"),
        (Reply.error(503, "UNAVAILABLE"), ServiceUnavailable, "503"),
    ],
)
def test_a_blob_that_is_refused(*, fake, registry, repository, reply, error, message) -> None:
    fake.answer = lambda _: reply
    with pytest.raises(error, match=message):
        read(registry, repository, BLOB.content)


def test_a_download_that_is_redirected_carries_no_credential(fake, other, registry, repository, large) -> None:
    fake.answer = lambda asked: basic(asked, Reply(307, {"Location": f"http://{other.host}/blob?signed=1"}))
    other.answer = lambda asked: ranged(asked, large, cut=200_000 if len(other.asked) < 2 else None)
    assert read(registry, repository, large) == large
    assert [each.headers.get("Range") for each in other.asked] == [None, "bytes=200000-"]
    assert [each.authorization for each in other.asked] == [None, None]
    assert fake.asked[-1].authorization.startswith("Basic ")


def test_a_download_that_trickles_is_given_up(fake, repository, large) -> None:
    fake.answer = lambda _: Reply(200, content=large, slowly=True)
    policy = RetryPolicy(deadline=2, slowest=1e9)
    with Registries(policy=policy) as registries, pytest.raises(ServiceUnavailable, match="timed out"):
        read(registries.for_host(fake.host), repository, large)


# -- pushing


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (Reply.error(404, "NAME_UNKNOWN", "does not exist"), InvalidSettings, r"create 127.*/models/one.*REGISTRY_URL"),
        (Reply.error(401, "UNAUTHORIZED"), PermissionRefused, "not accepted"),
        (Reply.error(403, "DENIED", "no push for you"), PermissionRefused, "no push for you"),
        (Reply.error(405, "UNSUPPORTED"), PermissionRefused, "read-only"),
        (Reply.error(400, "NAME_INVALID"), InvalidSettings, "does not take this repository's name"),
        (Reply(413), InvalidSettings, "Raise the limit"),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>"), ServiceUnavailable, "website"),
        (Reply(202), ServiceUnavailable, "without the place"),
        (
            Reply(202, {"Location": "http://elsewhere.invalid/u"}),
            ServiceUnavailable,
            "elsewhere.invalid over plain HTTP, which is ref",
        ),
        (Reply(202, {"Location": "http://user:pass@127.0.0.1/u"}), ServiceUnavailable, "HTTPS"),
        (Reply(301, {"Location": "/elsewhere"}), ServiceUnavailable, "redirect"),
    ],
)
def test_an_upload_that_is_refused(*, fake, registry, repository, reply, error, message) -> None:
    fake.answer = lambda asked: reply if asked.method == "POST" else ABSENT
    for act in (lambda: registry.check_push(repository), lambda: registry.push_blob(repository, BLOB)):
        with pytest.raises(error, match=message):
            act()


def test_the_digest_that_the_registry_tells_is_compared(fake, registry, repository) -> None:
    wrong = {"Docker-Content-Digest": str(Digest.of(b"another"))}
    fake.answers = [Reply(201, wrong)]
    with pytest.raises(ServiceUnavailable, match="is not"):
        registry.put_manifest(repository, MANIFEST, OCI_INDEX, "v1")
    fake.answers = [ABSENT, Reply(202, {"Location": "/u"}), Reply(201, wrong), Reply(204)]
    with pytest.raises(ServiceUnavailable, match="is not"):
        registry.push_blob(repository, BLOB)


def test_an_upload_that_the_registry_forgot_is_not_a_missing_repository(fake, registry, repository) -> None:
    replies = {"HEAD": ABSENT, "POST": Reply(202, {"Location": "/u"}), "DELETE": Reply(404)}
    fake.answer = lambda asked: replies.get(asked.method, Reply.error(404, "BLOB_UPLOAD_UNKNOWN"))
    with pytest.raises(ServiceUnavailable, match="BLOB_UPLOAD_UNKNOWN"):
        registry.push_blob(repository, BLOB)


def test_a_token_server_that_refuses_a_mount_leaves_the_upload(fake, other, registry, repository) -> None:
    other.answer = lambda asked: Reply(403) if "base" in asked.path else Reply.json({"token": "good"})

    def home(asked: Asked) -> Reply:
        if asked.authorization != "Bearer good":
            return bearer(f"http://{other.host}/token")
        return {"HEAD": ABSENT, "POST": Reply(202, {"Location": "/u"}), "PUT": Reply(201)}[asked.method]

    fake.answer = home
    assert registry.push_blob(repository, BLOB, [Repository(fake.host, "base")]) == 7


@pytest.mark.parametrize("refusal", [Reply.error(401, "UNAUTHORIZED"), Reply.error(403, "DENIED"), Reply(404)])
def test_a_mount_that_is_refused_becomes_an_upload(fake, registry, repository, refusal) -> None:
    source = Repository(fake.host, "base")
    fake.answers = [ABSENT, refusal, Reply(202, {"Location": "/u"}), Reply(201)]
    assert registry.push_blob(repository, BLOB, [source]) == 7


def test_a_mount_that_becomes_an_upload_is_used_or_cancelled(fake, registry, repository) -> None:
    source = Repository(fake.host, "base")
    fake.answers = [ABSENT, Reply(202, {"Location": "/u?state=a%2Fb+c~%7E"}), Reply(201)]
    assert registry.push_blob(repository, BLOB, [source]) == 7
    assert fake.asked[1].path == f"/v2/models/one/blobs/uploads/?mount={BLOB.digest}&from=base"
    assert fake.asked[2].path == f"/u?state=a%2Fb+c~%7E&digest=sha256%3A{BLOB.digest.hex}"
    fake.answers = [Reply(202, {"Location": "/u"}), Reply(204)]
    assert registry.mount_blob(repository, BLOB.digest, source) is False
    assert (fake.asked[-1].method, fake.asked[-1].path) == ("DELETE", "/u")


def test_a_body_is_sent_again_with_the_token_that_was_renewed(fake, other, registry, repository) -> None:
    tokens = iter(["first", "second", "third"])
    other.answer = lambda _: Reply.json({"token": next(tokens), "expires_in": 3600})

    def home(asked: Asked) -> Reply:
        good = "second" if asked.method == "PUT" else "first"
        if asked.authorization != f"Bearer {good}":
            return bearer(f"http://{other.host}/token")
        return {"HEAD": ABSENT, "POST": Reply(202, {"Location": "/u"}), "PUT": Reply(201)}[asked.method]

    fake.answer = home
    assert registry.push_blob(repository, BLOB) == 7
    assert [each.body for each in fake.asked if each.method == "PUT"] == [b"content", b"content"]


def test_one_layer_that_is_refused_ends_the_push(fake, registry, repository, tmp_path: Path) -> None:
    made = make_layout(tmp_path / "layout", layers=[tar(f"file{n}", b"x") for n in range(20)])
    layout = open_layout(made.folder, Platform("linux", "amd64"))
    image = finished_image(layout, labels={}, annotations={}, created=datetime.now(UTC))
    refused = layout.layers[0].digest

    def home(asked: Asked) -> Reply:
        if asked.method == "HEAD" and str(refused) not in asked.path:
            return Reply(200)
        return Reply.error(403, "DENIED") if asked.method == "POST" else ABSENT

    fake.answer = home
    with pytest.raises(PermissionRefused):
        push_image(registry, repository, layout, image)
    asked = " ".join(f"{each.method} {each.path}" for each in fake.asked)
    assert str(image.config_descriptor.digest) not in asked
    assert "manifests" not in asked


# -- credentials stay at home


def basic(asked: Asked, then: Reply) -> Reply:
    challenge = Reply.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": 'Basic realm="registry"'})
    return then if asked.authorization else challenge


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_carries_no_credential(fake, other, registry, repository, status) -> None:
    # Another port is another host; it asks for the credential, too.
    fake.answer = lambda asked: basic(asked, Reply(status, {"Location": f"http://{other.host}/signed?sig=1"}))
    other.answer = lambda _: Reply.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": "Basic realm=x"})
    with pytest.raises(PermissionRefused) as caught:
        registry.manifest(repository.tag("v1"))
    assert [each.authorization for each in other.asked] == [None]
    assert "sig=1" not in str(caught.value)
    other.answer = lambda _: FOUND
    assert registry.manifest(repository.tag("v1")).content == MANIFEST
    assert [each.authorization for each in other.asked] == [None, None]


def test_a_redirect_away_and_back_carries_no_credential(fake, other, registry, repository) -> None:
    def home(asked: Asked) -> Reply:
        if asked.path == "/back":
            return Reply.error(403, "DENIED")
        return basic(asked, Reply(307, {"Location": f"http://{other.host}/"}))

    fake.answer = home
    other.answer = lambda _: Reply(307, {"Location": f"http://{fake.host}/back"})
    with pytest.raises(PermissionRefused):
        registry.manifest(repository.tag("v1"))
    assert [each.authorization for each in fake.asked if each.path == "/back"] == [None]


def test_an_upload_to_another_host_carries_no_credential(fake, other, registry, repository) -> None:
    def home(asked: Asked) -> Reply:
        return basic(asked, Reply(202, {"Location": f"http://{other.host}/u"}) if asked.method == "POST" else ABSENT)

    fake.answer = home
    other.answer = lambda _: Reply(201)
    assert registry.push_blob(repository, BLOB) == 7
    (put,) = other.asked
    assert (put.method, put.body, put.authorization) == ("PUT", b"content", None)


def test_redirects_in_a_circle_end(fake, registry, repository) -> None:
    fake.answer = lambda asked: Reply(302, {"Location": asked.path})
    with pytest.raises(ServiceUnavailable, match="too many redirects"):
        registry.manifest(repository.tag("v1"))
    assert len(fake.asked) < 20


# -- tokens


def bearer(realm: str, **more: str) -> Reply:
    parameters = ",".join(f'{name}="{value}"' for name, value in {"realm": realm, **more}.items())
    return Reply.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": f"Bearer {parameters}"})


def token_registry(fake: Fake, tokens: Fake, good: str) -> None:
    def home(asked: Asked) -> Reply:
        if asked.authorization == f"Bearer {good}":
            return FOUND
        return bearer(f"http://{tokens.host}/token?a=1", service="the service", scope="repository:models/one:pull")

    fake.answer = home


def test_a_token_is_asked_for_with_service_and_scope(fake, other, registry, repository) -> None:
    token_registry(fake, other, "good")
    other.answer = lambda _: Reply.json({"access_token": "good", "expires_in": 3600})
    for _ in range(2):
        assert registry.manifest(repository.tag("v1"))
    (asked,) = other.asked
    assert asked.path == "/token?a=1&service=the+service&scope=repository%3Amodels%2Fone%3Apull"
    assert asked.authorization == Credential("user", SECRET).basic


def test_a_token_that_is_refused_is_renewed_once(fake, other, registry, repository) -> None:
    tokens = iter(["first", "second", "third", "fourth"])
    other.answer = lambda _: Reply.json({"token": next(tokens), "expires_in": 3600})
    token_registry(fake, other, "first")
    assert registry.manifest(repository.tag("v1"))
    token_registry(fake, other, "second")
    assert registry.manifest(repository.tag("v1"))
    token_registry(fake, other, "none is good")
    before = len(fake.asked)
    with pytest.raises(PermissionRefused):
        registry.manifest(repository.tag("v1"))
    assert len(fake.asked) == before + 2


def test_a_token_that_ends_is_renewed_before(fake, other, registry, repository, monkeypatch) -> None:
    tokens = iter(["good", "better"])
    other.answer = lambda _: Reply.json({"token": next(tokens), "expires_in": 100})
    token_registry(fake, other, "good")
    registry.manifest(repository.tag("v1"))
    token_registry(fake, other, "better")
    real = __import__("time").monotonic
    monkeypatch.setattr("builder.oci.transport.time.monotonic", lambda: real() + 95)
    before = len(fake.asked)
    registry.manifest(repository.tag("v1"))
    assert len(fake.asked) == before + 1, "no 401 is needed to know that a token is over"


@pytest.mark.parametrize("lifetime", [10**400, 1e300, -1, True, "x", [], None, 0], ids=range(8))
def test_a_tokens_lifetime_is_any_number(fake, other, registry, repository, lifetime) -> None:
    # The host is one that an author may name behind FROM, and so is its token server's answer.
    other.answer = lambda _: Reply.json({"token": "good", "expires_in": lifetime})
    token_registry(fake, other, "good")
    assert registry.manifest(repository.tag("v1"))


def test_an_identity_token_is_posted(fake, other, repository) -> None:
    credentials = Credentials(explicit=fake.host, credential=Credential(identity_token=SECRET))
    token_registry(fake, other, "good")
    other.answer = lambda _: Reply.json({"access_token": "good"})
    with Registries(credentials) as registries:
        assert registries.for_host(fake.host).manifest(repository.tag("v1"))
    (asked,) = other.asked
    assert (asked.method, asked.authorization) == ("POST", None)
    assert asked.body.decode().split("&") == [
        "service=the+service",
        "grant_type=refresh_token",
        "client_id=model-image-builder",
        "scope=repository%3Amodels%2Fone%3Apull",
        f"refresh_token={SECRET}",
    ]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(401), PermissionRefused),
        (Reply(403), PermissionRefused),
        (Reply(400), PermissionRefused),
        (Reply(404), ServiceUnavailable),
        (Reply(503), ServiceUnavailable),
        (Reset(), ServiceUnavailable),
        (Reply(302, {"Location": "http://127.0.0.1/"}), ServiceUnavailable),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>"), ServiceUnavailable),
        (Reply.json({}), ServiceUnavailable),
        (Reply.json([]), ServiceUnavailable),
        (Reply.json({"token": 1}), ServiceUnavailable),
        (Reply.json({"token": "a\r\nX-Injected: 1"}), ServiceUnavailable),
        (Reply(200, content=b"x" * (5 << 20)), ServiceUnavailable),
    ],
)
def test_a_token_server_that_gives_none(*, fake, other, registry, repository, reply, error) -> None:
    token_registry(fake, other, "good")
    other.answer = lambda _: reply
    with pytest.raises(error) as caught:
        registry.manifest(repository.tag("v1"))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "realm",
    [
        "http://tokens.invalid/token",
        "https://user:pass@tokens.invalid/",
        "ftp://127.0.0.1/",
        "",
        "/token",
        "http://[",
        "http:///token",
        "http://a:b/",
    ],
)
def test_an_unacceptable_token_realm_gets_no_request(fake, registry, repository, realm) -> None:
    fake.answer = lambda _: bearer(realm)
    with pytest.raises((PermissionRefused, ServiceUnavailable), match="token server"):
        registry.manifest(repository.tag("v1"))


@pytest.mark.parametrize("header", ["", "Negotiate", "Bearer", 'Digest realm="x"', ",,,", 'Basic realm="'])
def test_a_challenge_that_cannot_be_answered_is_a_refusal(fake, registry, repository, header) -> None:
    fake.answer = lambda _: Reply.error(401, "UNAUTHORIZED", **{"WWW-Authenticate": header})
    with pytest.raises((PermissionRefused, ServiceUnavailable)):
        registry.manifest(repository.tag("v1"))


def test_no_secret_stands_in_an_error_a_log_or_a_repr(fake, other, registry, repository, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    token_registry(fake, other, "the-token-itself")
    other.answers = [Reply(503), Reply.json({"token": "the-token-itself"})]
    registry.manifest(repository.tag("v1"))
    fake.answer = lambda asked: Reply.error(403, "DENIED", f"not with {asked.authorization}")
    with pytest.raises(PermissionRefused):
        registry.manifest(repository.tag("v1"))
    shown = [caplog.text, repr(Credential("user", SECRET)), repr(vars(registry)), repr(vars(registry._transport))]
    shown += [repr(registry._transport._authorizer._tokens), repr(fake.asked and registry)]
    assert not any(SECRET in text or "the-token-itself" in text for text in shown)
    assert "trying again" in caplog.text


# -- the way there


def test_a_proxy_is_used_for_all_but_no_proxy(fake: Fake, tmp_path: Path) -> None:
    fake.answer = lambda _: FOUND
    far, near = "registry.invalid", "near.invalid"
    proxies = {"HTTP_PROXY": fake.host, "NO_PROXY": f"x,.{near}"}
    policy = RetryPolicy(attempts=1)
    with Registries(proxies=proxies, insecure=[far, near], policy=policy) as registries:
        assert registries.for_host(far).manifest(Repository(far, "x").tag("v1"))
        with pytest.raises(ServiceUnavailable, match=r"near\.invalid"):
            registries.for_host(near).manifest(Repository(near, "x").tag("v1"))
    (asked,) = fake.asked
    assert asked.path == "http://registry.invalid/v2/x/manifests/v1"


def test_a_host_that_is_not_named_is_never_reached_over_plain_http(fake: Fake) -> None:
    fake.answer = lambda asked: Reply(501)
    proxies = {"HTTP_PROXY": fake.host, "HTTPS_PROXY": f"http://{fake.host}"}
    with (
        Registries(proxies=proxies, policy=RetryPolicy(attempts=1)) as registries,
        pytest.raises(ServiceUnavailable),
    ):
        registries.for_host("registry.invalid").manifest(Repository("registry.invalid", "x").tag("v1"))
    assert all(each.method == "CONNECT" for each in fake.asked)


def test_a_named_host_that_does_not_speak_tls_says_how_to_name_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Loopback by its address, and not by its name.
        host = f"127.1:{listener.getsockname()[1]}"

        def answer() -> None:
            # Until the socket is shut down: a client that has waited long comes again.
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with Registries() as registries, pytest.raises(InvalidSettings, match=r"does not speak TLS.*INSECURE_REGISTR"):
            registries.for_host(host).manifest(Repository(host, "x").tag("v1"))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_named_host_is_reached_over_plain_http(fake: Fake) -> None:
    fake.answer = lambda _: FOUND
    host = fake.host.replace("127.0.0.1", "127.1")
    for name in (host, "127.1"):
        with Registries(insecure=[name]) as registries:
            assert registries.for_host(host).manifest(Repository(host, "x").tag("v1"))


@pytest.mark.parametrize("address", ["ftp://proxy.invalid", "http://[", "://:secret-word@"])
def test_an_invalid_proxy_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(InvalidSettings, match="HTTPS_PROXY") as caught:
        Registries(proxies={"HTTPS_PROXY": address})
    assert "secret-word" not in str(caught.value)


def test_an_invalid_ca_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "absent.pem"):
        with pytest.raises(InvalidSettings, match="SSL_CERT_FILE"):
            Registries(ca_bundle=tmp_path / name)


def test_settings_give_the_credential_to_their_registry_alone(fake, other, tmp_path) -> None:
    environ = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "REGISTRY_URL": f"{fake.host}/models",
        "REGISTRY_USER": "user",
        "REGISTRY_TOKEN": SECRET,
    }
    for server in (fake, other):
        server.answer = lambda asked: basic(asked, FOUND)
    with Registries.from_settings(Settings.from_environ(environ)) as registries:
        assert registries.for_host(fake.host).manifest(Repository(fake.host, "x").tag("v1"))
        with pytest.raises(PermissionRefused):
            registries.for_host(other.host).manifest(Repository(other.host, "x").tag("v1"))
    assert [each.authorization for each in other.asked] == [None]
    build = BuildSettings.from_environ(environ)
    with Registries.from_settings(build) as registries, pytest.raises(PermissionRefused):
        registries.for_host(fake.host).manifest(Repository(fake.host, "x").tag("v1"))
