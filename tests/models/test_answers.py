"""What a server that is away, or that says something odd, becomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import boto3
import pytest
from urllib3.util import Retry

from builder.errors import (
    InvalidSettings,
    InvalidVersion,
    PermissionRefused,
    ServiceUnavailable,
    TryAgain,
    VersionNotFound,
)
from builder.models import Artifact
from builder.models.catalog import MlflowCatalog
from builder.models.errors import answering, on_disk
from builder.models.store import ArtifactRoots, ArtifactStore
from builder.urls import parse_roots
from scripts.certificates import self_signed
from tests.models.http_answers import Answers, answering_server

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


def mlflow_error(code):
    return json.dumps({"error_code": code, "message": f"so says {code}"}).encode()


@pytest.fixture(autouse=True)
def _one_try(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.parametrize(
    ("status", "body", "error", "remedy"),
    [
        (401, b"", PermissionRefused, "credential for MLFLOW_TRACKING_URI"),
        (401, PAGE, PermissionRefused, "credential"),
        (401, b'{"message": "Unauthorized"}', PermissionRefused, "credential"),
        (403, b"{}", PermissionRefused, "credential"),
        (503, b"{}", ServiceUnavailable, "the server is up"),
        (403, b"", PermissionRefused, "credential"),
        (403, mlflow_error("PERMISSION_DENIED"), PermissionRefused, "credential"),
        (401, mlflow_error("UNAUTHENTICATED"), PermissionRefused, "credential"),
        (404, PAGE, ServiceUnavailable, "MLFLOW_TRACKING_URI"),
        (404, b"", ServiceUnavailable, "MLFLOW_TRACKING_URI"),
        (404, mlflow_error("ENDPOINT_NOT_FOUND"), ServiceUnavailable, "MLFLOW_TRACKING_URI"),
        (404, mlflow_error("RESOURCE_DOES_NOT_EXIST"), VersionNotFound, "Check the name"),
        (200, PAGE, ServiceUnavailable, "MLFLOW_TRACKING_URI"),
        (302, b"", ServiceUnavailable, "MLFLOW_TRACKING_URI"),
        (500, b"", ServiceUnavailable, "the server is up"),
        (500, mlflow_error("INTERNAL_ERROR"), ServiceUnavailable, "the server is up"),
        (502, PAGE, ServiceUnavailable, "the server is up"),
        (503, b"", ServiceUnavailable, "the server is up"),
        (429, b"", ServiceUnavailable, "the server is up"),
        (400, mlflow_error("INVALID_PARAMETER_VALUE"), VersionNotFound, "MODEL_NAME"),
    ],
)
def test_each_answer_of_mlflow_becomes_one_of_ours(status, body, error, remedy):
    with answering_server(Answers(status=status, body=body)) as uri, pytest.raises(error) as raised:
        MlflowCatalog(uri).find("m", "1")
    assert remedy in raised.value.remedy
    assert "find model 'm' version 1" in raised.value.what
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{port}", "https://127.0.0.1:{port}", "http://no-such-host.invalid:5000"]
)
def test_a_server_that_is_away_is_not_tried_for_minutes(uri, monkeypatch, dead_port):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    pauses, seconds_of = [], Retry.get_backoff_time

    def counted(self):
        pauses.append(seconds_of(self))
        return pauses[-1]

    monkeypatch.setattr(Retry, "get_backoff_time", counted)
    with pytest.raises(ServiceUnavailable, match="find model 'm'") as raised:
        MlflowCatalog(uri.format(port=dead_port)).find("m", "1")
    assert "MLFLOW_TRACKING_URI" in raised.value.remedy
    # As MLflow is set by default, it would try for four minutes.
    assert len(pauses) == 2
    assert sum(pauses) < 10


def test_a_certificate_that_nobody_trusts_names_the_setting(tmp_path):
    certificate = self_signed(tmp_path, "nobody")
    with answering_server(Answers(), certificate.path, certificate.key_path) as uri:
        with pytest.raises(InvalidSettings) as raised:
            MlflowCatalog(uri).find("m", "1")
        assert "SSL_CERT_FILE" in raised.value.remedy


@pytest.mark.parametrize("uri", ["ftp://example.com", "http://", "nonsense://x", "https://[::1"])
def test_an_invalid_tracking_uri_is_refused(uri):
    with pytest.raises((InvalidSettings, ServiceUnavailable), match="MLFLOW_TRACKING_URI"):
        MlflowCatalog(uri).find("m", "1")


def test_no_credential_of_a_uri_is_shown(dead_port):
    uri = f"http://user:hunter2222@127.0.0.1:{dead_port}"
    with pytest.raises(ServiceUnavailable) as raised:
        MlflowCatalog(uri).find("m", "1")
    assert "hunter2222" not in str(raised.value)


# ---- artifact stores


def proxied(uri):
    return Artifact(path="a", size=4, root=f"{uri}/api/2.0/mlflow-artifacts/artifacts/1", remote="a")


def store_that_answers(monkeypatch, answers, tmp_path):
    monkeypatch.setattr(ArtifactStore._download.retry, "wait", lambda *_: 0)
    with answering_server(answers) as uri:
        ArtifactStore(uri).download(proxied(uri), tmp_path / "a")


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        (Answers(status=404), InvalidVersion),
        (Answers(status=403), PermissionRefused),
        (Answers(status=500), ServiceUnavailable),
        (Answers(body=b"abc"), ServiceUnavailable),
        (Answers(body=b"abcde"), ServiceUnavailable),
        (Answers(body=b"abcd", cut=1), ServiceUnavailable),
    ],
    ids=["404", "403", "500", "short", "long", "cut"],
)
def test_a_download_that_fails_leaves_nothing(monkeypatch, answers, error, tmp_path):
    with pytest.raises(error, match="artifact 'a'"):
        store_that_answers(monkeypatch, answers, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_is_tried_again_where_the_store_is_away(monkeypatch, tmp_path):
    left = [503, 503]
    answers = Answers(body=b"abcd", forward=lambda _: (left.pop(), b"") if left else None)
    store_that_answers(monkeypatch, answers, tmp_path)
    assert (tmp_path / "a").read_bytes() == b"abcd"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_object_store_without_a_credential(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    # What another test's object store took would be remembered.
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    artifact = Artifact(path="a", size=1, root="s3://bucket/folder", remote="a")
    roots = ArtifactRoots("http://127.0.0.1:1", named=parse_roots("s3://bucket"))
    with pytest.raises(PermissionRefused, match="download the artifact 'a'"):
        ArtifactStore("http://127.0.0.1:1", roots).download(artifact, tmp_path / "a")


def test_an_object_store_without_its_library_names_the_extra(tmp_path):
    script = """
import sys
sys.modules["boto3"] = None
from pathlib import Path
from builder.errors import InvalidSettings
from builder.models.store import ArtifactRoots, ArtifactStore
from builder.models import Artifact
from builder.urls import parse_roots
store = ArtifactStore("http://127.0.0.1:1", ArtifactRoots("http://127.0.0.1:1", named=parse_roots("s3://bucket")))
try:
    store.download(Artifact(path="a", size=1, root="s3://bucket/f", remote="a"), Path("a"))
except InvalidSettings as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "'boto3'" in done.stdout
    assert "model-image-builder[s3]" in done.stdout


# ---- our own disk


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("block", [on_disk("write"), answering("write", server="the store")])
def test_a_full_disk_can_be_tried_again(block):
    with pytest.raises(TryAgain, match="disk is full"), block, open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        full.write(b"x")


def test_any_other_refusal_of_the_disk_is_a_matter_of_settings(tmp_path):
    with pytest.raises(InvalidSettings, match="write the context"), on_disk("write the context"):
        (tmp_path / "no" / "such").write_bytes(b"")


def test_errors_other_than_disk_errors_pass_through():
    with pytest.raises(ZeroDivisionError), on_disk("divide"):
        1 / 0  # noqa: B018
