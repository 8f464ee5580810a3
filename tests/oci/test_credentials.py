"""Where credentials come from, and that nothing of them is shown."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from builder.errors import BuilderError, InvalidSettings, PermissionRefused
from builder.oci.authn import Credential, Credentials
from tests.waiting import HANG, growing

SECRET = "s3cr3t-of-a-file"
HUB = "https://index.docker.io/v1/"


def auth(user: str = "user", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def config(folder: Path, value: object) -> Path:
    (folder / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture
def helper(tmp_path: Path, monkeypatch):
    """Put a credential helper on PATH: a shell script that reads the server's name into `$server`, in any time."""
    monkeypatch.setitem(Credentials.__init__.__kwdefaults__, "helper_timeout", HANG)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(script: str, name: str = "test") -> None:
        path = folder / f"docker-credential-{name}"
        path.write_text(f'#!/bin/sh\n[ "$1" = get ] || exit 9\nread -r server\n{script}\n')
        path.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("auths", "host", "user"),
    [
        ({"quay.io": auth()}, "quay.io", "user"),
        ({"quay.io": auth()}, "QUAY.io", "user"),
        ({"https://quay.io": auth()}, "quay.io", "user"),
        ({"https://quay.io/v2/": auth()}, "quay.io", "user"),
        ({"quay.io/": auth()}, "quay.io", "user"),
        ({"reg.example:5000": auth()}, "reg.example:5000", "user"),
        ({"quay.io": auth("one"), "https://quay.io/v1/": auth("two")}, "quay.io", "one"),
        ({HUB: auth()}, "docker.io", "user"),
        ({HUB: auth()}, "registry-1.docker.io", "user"),
        ({"docker.io": auth("plain"), HUB: auth("exact")}, "index.docker.io", "exact"),
        ({"docker.io": auth()}, "docker.io", "user"),
        ({"quay.io": {"username": "user", "password": SECRET}}, "quay.io", "user"),
        ({"quay.io": {**auth("coded"), "username": "plain", "password": "x"}}, "quay.io", "coded"),
        ({"quay.io": auth(password=f"{SECRET}\0\0")}, "quay.io", "user"),
    ],
)
def test_an_entry_is_found(auths, host: str, user: str, tmp_path: Path) -> None:
    found = Credentials(docker_config=config(tmp_path, {"auths": auths})).for_host(host)
    assert found == Credential(user, SECRET)


@pytest.mark.parametrize(
    ("auths", "host"),
    [
        ({"quay.io": auth()}, "quay.io.evil.example"),
        ({"quay.io": auth()}, "quay.io:5000"),
        ({"quay.io/domino": auth()}, "quay.io"),
        ({"quay.io": {}}, "quay.io"),
        ({"quay.io": {"auth": ""}}, "quay.io"),
        ({"": auth()}, "quay.io"),
        ({}, "quay.io"),
        (None, "quay.io"),
    ],
)
def test_an_entry_for_another_host_is_not_used(auths, host: str, tmp_path: Path) -> None:
    assert Credentials(docker_config=config(tmp_path, {"auths": auths})).for_host(host) is None


def test_a_colon_belongs_to_the_password(tmp_path: Path) -> None:
    found = Credentials(docker_config=config(tmp_path, {"auths": {"a.example": auth(password="a:b:c")}}))
    assert found.for_host("a.example") == Credential("user", "a:b:c")


def test_an_identity_token_wins(tmp_path: Path) -> None:
    entry = {**auth(password=""), "identitytoken": SECRET}
    found = Credentials(docker_config=config(tmp_path, {"auths": {"a.example": entry}})).for_host("a.example")
    assert found == Credential(identity_token=SECRET)


def test_an_explicit_credential_is_for_its_host_alone(tmp_path: Path) -> None:
    credentials = Credentials(
        explicit="registry-1.docker.io",
        credential=Credential("explicit", SECRET),
        docker_config=config(tmp_path, {"auths": {HUB: auth(), "quay.io": auth()}}),
    )
    assert credentials.for_host("docker.io") == Credential("explicit", SECRET)
    assert credentials.for_host("quay.io") == Credential("user", SECRET)
    assert credentials.for_host("ghcr.io") is None


def test_without_a_file_there_is_no_credential(tmp_path: Path) -> None:
    assert Credentials(docker_config=tmp_path).for_host("quay.io") is None
    assert Credentials(docker_config=tmp_path / "absent").for_host("quay.io") is None
    assert Credentials().for_host("quay.io") is None


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}",
        f'["{SECRET}"]',
        f'{{"auths": ["{SECRET}"]}}',
        f'{{"auths": {{"quay.io": {{"auth": "{SECRET}"}}}}}}',
        f'{{"auths": {{"quay.io": {{"auth": ["{SECRET}"]}}}}}}',
        '{"auths": {"quay.io": {"auth": "bm8gY29sb24="}}}',
        '{"auths": {"quay.io": {"username": 1, "password": "x"}}}',
        '{"credHelpers": "quay.io"}',
        '{"credHelpers": {"quay.io": "../../bin/sh"}}',
        '{"credsStore": "no/such"}',
        '{"credsStore": "is-not-installed"}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_malformed_file_is_named_and_not_shown(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="DOCKER_CONFIG") as caught:
        Credentials(docker_config=config(tmp_path, text)).for_host("quay.io")
    assert SECRET not in caught.value.one_line()


ANSWER = f'printf \'{{"ServerURL": "%s", "Username": "%s", "Secret": "{SECRET}"}}\' "$server" "$server"'


@pytest.mark.parametrize(
    ("host", "asked"), [("quay.io", "quay.io"), ("docker.io", HUB), ("reg.example:5000", "reg.example:5000")]
)
@pytest.mark.parametrize("kind", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_used(kind: str, host: str, asked: str, helper, tmp_path: Path) -> None:
    helper(ANSWER)
    value = {"credHelpers": {asked: "test"}} if kind == "credHelpers" else {"credsStore": "test"}
    assert Credentials(docker_config=config(tmp_path, value)).for_host(host) == Credential(asked, SECRET)


def test_a_helper_for_a_host_wins_over_the_store(helper, tmp_path: Path) -> None:
    helper(ANSWER)
    helper("exit 7", "other")
    value = {"credHelpers": {"quay.io": "test"}, "credsStore": "other"}
    assert Credentials(docker_config=config(tmp_path, value)).for_host("quay.io") == Credential("quay.io", SECRET)


def test_a_helper_gives_an_identity_token(helper, tmp_path: Path) -> None:
    helper(ANSWER.replace('"$server" "$server"', '"$server" "<token>"'))
    found = Credentials(docker_config=config(tmp_path, {"credsStore": "test"})).for_host("quay.io")
    assert found == Credential(identity_token=SECRET)


def test_a_helper_that_has_nothing_leaves_it_to_the_file(helper, tmp_path: Path) -> None:
    helper("echo credentials not found in native keychain; exit 1")
    value = {"credsStore": "test", "auths": {"quay.io": auth()}}
    credentials = Credentials(docker_config=config(tmp_path, value))
    assert credentials.for_host("quay.io") == Credential("user", SECRET)
    assert credentials.for_host("ghcr.io") is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no cloud today >&2; exit 1", "no cloud today"),
        ("echo the keyring is locked; exit 3", "the keyring is locked"),
        (f"{ANSWER}; exit 1", "failed"),
        (f"echo {SECRET}", "did not answer"),
        ("echo '[]'", "did not answer"),
        ("true", "did not answer"),
    ],
)
def test_a_helper_that_fails_is_named(script: str, message: str, helper, tmp_path: Path) -> None:
    helper(script)
    with pytest.raises(PermissionRefused, match=message) as caught:
        Credentials(docker_config=config(tmp_path, {"credsStore": "test"})).for_host("quay.io")
    assert "docker-credential-test" in str(caught.value)
    assert SECRET not in caught.value.one_line()


def test_a_helper_that_waits_is_ended_with_its_children(helper, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    # The child holds the pipe open as long as it lives.
    helper(f"exec 3> {alive}; sleep 6000 & echo started >&3; wait")
    for seconds in growing(1):
        reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
        credentials = Credentials(docker_config=config(tmp_path, {"credsStore": "test"}), helper_timeout=seconds)
        with pytest.raises(PermissionRefused, match=f"more than {seconds:g} s"):
            credentials.for_host("quay.io")
        os.set_blocking(reader, True)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        if said:
            break
    assert said == "started\n"


def test_a_repr_shows_nothing() -> None:
    for credential in (Credential("user-name", SECRET), Credential(identity_token=SECRET)):
        assert SECRET not in f"{credential!r} {credential}"
        assert "user-name" not in repr(credential)


def test_an_unreadable_docker_config_is_a_builder_error(helper, tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BuilderError):
        Credentials(docker_config=tmp_path).for_host("quay.io")
