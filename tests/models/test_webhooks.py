"""MLflow's webhooks by `builder webhook`: registered, tried and deleted on a real server, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import certifi
import pytest

from builder.errors import InvalidSettings, UsageError, VersionNotFound
from builder.models.catalog import MlflowCatalog
from builder.models.webhooks import EVENTS, Webhooks, address_of
from scripts.certificates import for_loopback, self_signed, signed
from scripts.launch import clean_environ
from tests.listener.test_deliveries import WEBHOOKS_HERE, receiving
from tests.patience import PATIENT
from tests.servers.mlflow import run_mlflow

SECRET = "a-secret-of-the-tests"


@pytest.fixture(scope="module")
def server(launcher, tmp_path_factory):
    """An MLflow that delivers to this machine."""
    folder = tmp_path_factory.mktemp("mlflow-webhooks")
    options = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db")
    with run_mlflow(launcher, folder, *options, artifacts=str(folder), environ=WEBHOOKS_HERE) as running:
        yield running


def builder(server, *arguments, **environ):
    """Run `builder webhook`, and return its exit code, stdout and stderr."""
    variables = {"MLFLOW_TRACKING_URI": server.uri, "WEBHOOK_SECRET": SECRET, "LOG_FORMAT": "text", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "builder", "webhook", *arguments]
    environ = clean_environ(**{**variables, **PATIENT, **environ})
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
    return done.returncode, done.stdout, done.stderr


def test_registered_listed_tried_and_deleted(server):
    with receiving() as receiver:
        url = f"http://127.0.0.1:{receiver.server_address[1]}"
        code, stdout, stderr = builder(server, "create", url)
        assert code == 0, stderr
        identity = stdout.strip()
        code, stdout, _ = builder(server, "list", "-o", "json")
        expected = {
            "id": identity,
            "name": "builder",
            "url": f"{url}/webhook",
            "events": sorted(EVENTS),
            "active": True,
        }
        (row,) = json.loads(stdout)
        assert {**row, "events": sorted(row["events"])} == expected
        assert identity in builder(server, "list")[1]
        code, stdout, stderr = builder(server, "test", "builder")
        assert (code, stdout) == (0, ""), stderr
        assert receiver.next().headers["x-mlflow-signature"].startswith("v1,")
        # A second one would deliver everything twice.
        code, _, stderr = builder(server, "create", url)
        assert code == 78
        assert f"builder webhook delete {identity}" in stderr
    # The port stays taken, and nobody listens on it.
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(receiver.server_address)
        code, _, stderr = builder(server, "test", identity)
    assert code == 69
    assert "Check that the MLflow server reaches this address" in stderr
    assert builder(server, "delete", "builder")[0] == 0
    assert builder(server, "list")[1] == "This MLflow server has no webhook.\n"
    code, _, stderr = builder(server, "delete", "builder")
    assert code == 66
    assert "the server has no webhook" in stderr


@pytest.mark.parametrize(
    ("url", "environ", "setting"),
    [
        ("http://builder-listener.builder", {}, "MLFLOW_WEBHOOK_ALLOWED_SCHEMES=http,https"),
        ("https://127.0.0.1:8443", {}, "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS=true"),
        ("https://no-such-host.invalid", {}, "Use one that its DNS resolves"),
    ],
)
def test_what_a_server_refuses_by_default_is_told_with_its_setting(mlflow_server, url, environ, setting):
    code, _, stderr = builder(mlflow_server, "create", url, **environ)
    assert code == 78, stderr
    assert setting in stderr


@contextlib.contextmanager
def receiving_by_tls(certificate):
    """Take deliveries over TLS."""
    with receiving() as receiver:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.path, certificate.key_path)
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        yield receiver


def tried(server, receiver):
    """Return the exit code and stderr of a test delivery."""
    code, stdout, stderr = builder(server, "create", f"https://127.0.0.1:{receiver.server_address[1]}")
    assert code == 0, stderr
    identity = stdout.strip()
    try:
        code, _, stderr = builder(server, "test", identity)
        return code, stderr
    finally:
        builder(server, "delete", identity)


def test_a_certificate_that_the_server_does_not_trust_is_told(server, tmp_path):
    authority = self_signed(tmp_path, "authority")
    with receiving_by_tls(for_loopback(tmp_path, authority)) as receiver:
        code, stderr = tried(server, receiver)
    assert code == 69
    assert "The MLflow server does not trust the listener's certificate" in stderr
    assert "python -m certifi" in stderr


def test_an_authority_is_trusted_that_was_added_as_the_page_says(launcher, tmp_path):
    """Only the file of certifi counts, in the server's own environment; here in a copy of that package."""
    page = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text()
    (line, *_) = re.findall(r"`(cat ca\.pem >> [^`]+)`", page)
    authority = self_signed(tmp_path, "authority")
    shutil.copy(authority.path, tmp_path / "ca.pem")
    shutil.copytree(Path(certifi.__file__).parent, tmp_path / "packages" / "certifi")
    paths = {"PYTHONPATH": str(tmp_path / "packages"), "REQUESTS_CA_BUNDLE": str(authority.path)}
    options = ("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db")

    @contextlib.contextmanager
    def running():
        with run_mlflow(launcher, tmp_path, *options, artifacts=str(tmp_path), environ=WEBHOOKS_HERE | paths) as found:
            yield found

    # It has an address that is not in the certificate, too.
    other = signed(tmp_path, "elsewhere", authority, dns_names=["elsewhere.example.com"])
    with receiving_by_tls(for_loopback(tmp_path, authority)) as receiver, receiving_by_tls(other) as elsewhere:
        with running() as found:
            assert tried(found, receiver)[0] == 69
        environ = clean_environ(**paths, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        subprocess.run(["sh", "-ec", line], check=True, cwd=tmp_path, env=environ)
        with running() as found:
            assert tried(found, receiver)[0] == 0
            code, stderr = tried(found, elsewhere)
    assert code == 69
    assert "The listener's certificate is for another name" in stderr


def test_a_server_without_webhooks_is_told(mlflow_file_server):
    code, _, stderr = builder(mlflow_file_server, "list", MLFLOW_ALLOW_FILE_STORE="true")
    # It answers 500, as a server does that cannot read its secrets.
    assert code == 69, stderr
    assert "without a database, has no webhooks" in stderr


def test_a_secret_that_the_server_cannot_read_any_more_is_told(launcher, tmp_path):
    options = ("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db")
    without = {name: value for name, value in WEBHOOKS_HERE.items() if "KEY" not in name}

    @contextlib.contextmanager
    def running():
        with run_mlflow(launcher, tmp_path, *options, artifacts=str(tmp_path), environ=without) as found:
            yield found

    with running() as found:
        assert builder(found, "create", "http://127.0.0.1:1")[0] == 0
    with running() as found:
        code, _, stderr = builder(found, "list")
    assert code == 69
    assert "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY" in stderr


def test_a_secret_is_needed_and_is_not_shown(server):
    code, _, stderr = builder(server, "create", "http://127.0.0.1:1", WEBHOOK_SECRET="")
    assert code == 78
    assert "WEBHOOK_SECRET is missing" in stderr
    code, _, stderr = builder(server, "create", "http://127.0.0.1:1", WEBHOOK_SECRET="short-secret")
    assert code == 78
    assert "at least 16 characters" in stderr
    assert "short-secret" not in stderr


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://builder.example.com", "https://builder.example.com/webhook"),
        ("https://builder.example.com/", "https://builder.example.com/webhook"),
        ("https://example.com/builder/webhook", "https://example.com/builder/webhook"),
    ],
)
def test_where_a_listener_takes_deliveries(url, address):
    assert address_of(url) == address


@pytest.mark.parametrize(
    "url", ["", "builder.example.com", "ftp://example.com", "https://", "http://[", "https://x/?a"]
)
def test_an_address_has_to_be_one(url):
    with pytest.raises(UsageError, match="is not the address of a listener"):
        address_of(url)


def test_a_name_that_two_have_is_no_name(server, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    webhooks = Webhooks(MlflowCatalog(server.uri))
    made = [webhooks.create("two", f"http://127.0.0.1:{port}/webhook", SECRET) for port in (1, 2)]
    with pytest.raises(VersionNotFound, match="2 webhooks are called 'two'"):
        webhooks.find("two")
    with pytest.raises(InvalidSettings, match="There is a webhook"):
        webhooks.create("three", made[0].url, SECRET)
    for each in made:
        webhooks.delete(webhooks.find(each.id).id)
    assert list(webhooks.all()) == []
