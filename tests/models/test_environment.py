"""What MLflow's client, requests and boto3 are told through the process's environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from builder.clients import connected
from builder.errors import BuilderError
from builder.models.catalog import MlflowCatalog
from builder.settings import CatalogSettings, Settings
from scripts.certificates import for_loopback, self_signed
from tests.models.http_answers import Answers, answering_server


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Take back whatever a test exports."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def settings(**values):
    return CatalogSettings.from_environ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", **values})


def test_secrets_of_mlflow_come_from_files_too(tmp_path):
    for name, value in {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "hunter2222"}.items():
        (tmp_path / name).write_text(f"{value}\n")
    answers = Answers(status=404)
    with answering_server(answers) as uri:
        catalog = MlflowCatalog.from_settings(settings(MLFLOW_TRACKING_URI=uri, SECRETS_DIR=str(tmp_path)))
        with pytest.raises(BuilderError):
            catalog.find("m", "1")
    assert answers.headers[0]["Authorization"] == "Basic bWU6aHVudGVyMjIyMg=="


def test_a_private_ca_is_trusted_by_its_one_setting(tmp_path, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    authority = self_signed(tmp_path, "authority")
    certificate = for_loopback(tmp_path, authority)
    with answering_server(Answers(status=403), certificate.path, certificate.key_path) as uri:
        catalog = MlflowCatalog.from_settings(settings(MLFLOW_TRACKING_URI=uri, SSL_CERT_FILE=str(authority.path)))
        with pytest.raises(BuilderError) as raised:
            catalog.find("m", "1")
    assert type(raised.value).__name__ == "PermissionRefused"
    assert os.environ["AWS_CA_BUNDLE"] == str(authority.path)


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/theirs")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    ours = "/etc/hostname"
    MlflowCatalog.from_settings(settings(SSL_CERT_FILE=ours, HTTPS_PROXY="http://proxy:1"))
    assert os.environ["REQUESTS_CA_BUNDLE"] == "/theirs"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["HTTPS_PROXY"] == "http://proxy:1"


def test_a_server_that_does_not_answer_is_given_up_after_half_a_minute(monkeypatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    MlflowCatalog.from_settings(settings())
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"


def test_dominos_key_does_not_follow_a_redirect_to_another_host(monkeypatch):
    elsewhere = Answers()
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: resolve(host.replace("d.test", "127.0.0.1"), *rest, **more)
    )
    monkeypatch.setenv("NO_PROXY", "*")
    with answering_server(elsewhere) as other, answering_server(Answers(status=307, location=other)) as loopback:
        uri = loopback.replace("127.0.0.1", "d.test")
        values = {"DOMINO_USER_API_KEY": "domino-api-key", "DOMINO_RUN_ID": "run-id-123"}
        catalog = MlflowCatalog.from_settings(settings(MLFLOW_TRACKING_URI=uri, **values))
        with pytest.raises(BuilderError):
            catalog.find("m", "1")
    assert elsewhere.headers == []


def test_mlflow_is_imported_when_a_catalog_is_asked():
    script = """
import sys
import builder.models.catalog, builder.models.context, builder.publish.record, builder.models.register
builder.models.catalog.MlflowCatalog("http://127.0.0.1:1")
print(sorted({"mlflow", "requests", "boto3"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_settings_one_after_the_other_do_not_see_each_other_s(tmp_path):
    before = dict(os.environ)
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("token-of-the-first")
    first = settings(
        SECRETS_DIR=str(tmp_path), AWS_SECRET_ACCESS_KEY="key-of-the-first", SSL_CERT_FILE="/etc/hostname"
    )  # fmt: skip
    answers = Answers(status=404)
    with answering_server(answers) as uri:
        MlflowCatalog.from_settings(first)
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == "token-of-the-first"
        second = MlflowCatalog.from_settings(settings(MLFLOW_TRACKING_URI=uri))
        with pytest.raises(BuilderError):
            second.find("m", "1")
    assert "Authorization" not in answers.headers[0]
    changed = {name for name in os.environ if os.environ[name] != before.get(name)}
    assert not changed & {"MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSL_CERT_FILE", "AWS_CA_BUNDLE"}


def test_clients_that_are_closed_leave_the_environment_as_it_was(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    before = dict(os.environ)
    given = Settings.from_environ(
        {"MLFLOW_TRACKING_URI": "http://ours", "REGISTRY_URL": "r.test/x", "MLFLOW_TRACKING_TOKEN": "a-long-token"}
    )
    with connected(given):
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://ours"
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == "a-long-token"
        # What somebody else changes meanwhile stays.
        monkeypatch.setenv("ANOTHER", "x")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    assert dict(os.environ) == {**before, "ANOTHER": "x", "MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}


def test_a_catalog_from_before_is_as_it_was_when_other_clients_are_closed():
    MlflowCatalog.from_settings(settings(MLFLOW_TRACKING_TOKEN="the-first-token"))
    before = dict(os.environ)
    with connected(Settings.from_environ({"MLFLOW_TRACKING_URI": "http://ours", "REGISTRY_URL": "r.test/x"})):
        assert "MLFLOW_TRACKING_TOKEN" not in os.environ
    assert dict(os.environ) == before
