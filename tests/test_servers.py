"""The servers are what the other tests take them for."""

import base64
import json
import ssl

import httpx2
import pytest

from scripts.launch import ambient, clean_environ
from tests.servers.registries import PASSWORD, PULL_PASSWORD, PULL_USER, USER
from tests.waiting import HANG


def upload(server, *, auth=None, headers=None):
    verify = ssl.create_default_context(cafile=server.ca) if server.ca else True
    with httpx2.Client(verify=verify, trust_env=False, timeout=HANG) as client:
        return client.post(f"{server.url}/v2/smoke/blobs/uploads/", auth=auth, headers=headers)


def test_anyone_may_push_to_the_anonymous_registry(registry):
    assert upload(registry).status_code == 202


def test_the_third_major_version_answers_the_same(registry_v3):
    assert upload(registry_v3).status_code == 202


def test_the_read_only_registry_refuses_a_push(read_only_registry):
    assert upload(read_only_registry).status_code == 405


@pytest.mark.parametrize(
    ("auth", "status"), [(None, 401), ((USER, "wrong"), 401), ((USER, PASSWORD), 202)], ids=["none", "wrong", "right"]
)
def test_the_basic_registry_asks_for_its_password(basic_registry, auth, status):
    assert upload(basic_registry, auth=auth).status_code == status


def test_the_private_authority_is_needed_to_trust_the_tls_registry(tls_registry):
    assert upload(tls_registry, auth=(USER, PASSWORD)).status_code == 202
    with (
        pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        httpx2.Client(trust_env=False, timeout=HANG) as client,
    ):
        client.get(f"{tls_registry.url}/v2/")


@pytest.mark.parametrize(
    ("auth", "status"), [((USER, PASSWORD), 202), ((PULL_USER, PULL_PASSWORD), 401)], ids=["publisher", "puller"]
)
def test_a_token_allows_what_its_user_may(token_registry, auth, status):
    challenge = upload(token_registry).headers["www-authenticate"]
    assert f'realm="{token_registry.tokens.realm}"' in challenge
    assert 'scope="repository:smoke:pu' in challenge  # the registry tells the two actions in any order
    query = {"service": "registry.test", "scope": "repository:smoke:pull,push"}
    answer = httpx2.get(token_registry.tokens.realm, params=query, auth=auth, trust_env=False, timeout=HANG)
    headers = {"Authorization": f"Bearer {answer.json()['token']}"}
    assert upload(token_registry, headers=headers).status_code == status
    assert token_registry.tokens.asked[-1] == (auth[0], ("repository:smoke:pull,push",))


def test_the_token_server_refuses_a_wrong_password(token_registry):
    answer = httpx2.get(token_registry.tokens.realm, auth=(USER, "wrong"), trust_env=False, timeout=HANG)
    assert answer.status_code == 401


def test_a_docker_config_holds_the_credential_of_its_registry(token_registry, registry, tmp_path):
    auths = json.loads((token_registry.docker_config(tmp_path / "a") / "config.json").read_text())["auths"]
    assert base64.b64decode(auths[token_registry.host]["auth"]).decode() == f"{USER}:{PASSWORD}"
    assert json.loads((registry.docker_config(tmp_path / "b") / "config.json").read_text()) == {"auths": {}}


def logged(server, monkeypatch):
    import mlflow

    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(server.uri)
    run = client.create_run(client.create_experiment("smoke")).info
    client.log_text(run.run_id, "hello", "folder/greeting.txt")
    assert [item.path for item in client.list_artifacts(run.run_id, "folder")] == ["folder/greeting.txt"]
    return run.artifact_uri


def test_an_artifact_goes_through_the_proxying_mlflow(mlflow_server, monkeypatch):
    assert logged(mlflow_server, monkeypatch).startswith("mlflow-artifacts:/")


def test_an_artifact_goes_to_the_file_store(mlflow_file_server, monkeypatch):
    assert mlflow_file_server.artifacts in logged(mlflow_file_server, monkeypatch)


def test_an_artifact_goes_to_the_object_store(mlflow_s3_server, monkeypatch):
    assert logged(mlflow_s3_server, monkeypatch).startswith(mlflow_s3_server.artifacts)


def test_the_base_image_is_valid_for_three_platforms(base_image, crane):
    crane("validate", "--remote", base_image)
    index = json.loads(crane("manifest", base_image))
    platforms = [
        "/".join(p[k] for k in ("os", "architecture", "variant") if k in p)
        for p in (manifest["platform"] for manifest in index["manifests"])
    ]
    assert platforms == ["linux/amd64", "linux/arm64", "linux/arm/v7"]


def test_no_setting_of_the_machine_reaches_a_test(monkeypatch):
    names = ("MLFLOW_TRACKING_URI", "REGISTRY_TOKEN", "DOCKER_CONFIG", "AWS_PROFILE", "BASE_IMAGE", "BUILDER_WORKSPACE")
    assert all(ambient(name) for name in names)
    kept = ("PATH", "HOME", "SSL_CERT_FILE", "HTTPS_PROXY", "PIP_INDEX_URL", "AWS_CA_BUNDLE", "BUILDER_TEST_SERVERS")
    assert not any(ambient(name) for name in kept)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert "MLFLOW_TRACKING_URI" not in clean_environ()


def test_crane_says_why_it_failed(crane, registry):
    with pytest.raises(AssertionError, match=r"MANIFEST_UNKNOWN|NAME_UNKNOWN"):
        crane("manifest", f"{registry.host}/nothing:here")
