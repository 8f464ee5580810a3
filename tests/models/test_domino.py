"""Domino's headers, as MLflow's own client sends them."""

from __future__ import annotations

import base64
import hmac
import importlib.metadata
import json
import os
import socket
import subprocess
import sys

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from builder.domino import DominoAuth
from builder.errors import BuilderError, InvalidSettings
from builder.models.catalog import MlflowCatalog
from tests.models.http_answers import Answers, answering_server

ELSEWHERE = "mlflow.domino.test"
KEY, RUN = "domino-api-key-0123456789", "65a1b2c3d4e5f60718293a4b"


def set_both(monkeypatch):
    monkeypatch.setenv("DOMINO_USER_API_KEY", KEY)
    monkeypatch.setenv("DOMINO_RUN_ID", RUN)


@pytest.fixture(autouse=True)
def _own_environment():
    """Take back whatever a test, or a catalog, puts into the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _a_server_elsewhere(monkeypatch):
    """Have a name of no loopback host lead to loopback, as a test may ask nobody else."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: resolve(host.replace(ELSEWHERE, "127.0.0.1"), *rest, **more)
    )
    monkeypatch.setenv("NO_PROXY", "*")


def headers_sent(host=ELSEWHERE):
    answers = Answers(status=404)
    with answering_server(answers) as loopback:
        uri = os.environ["MLFLOW_TRACKING_URI"] = loopback.replace("127.0.0.1", host)
        with pytest.raises(BuilderError):
            MlflowCatalog(uri).find("m", "1")
    return answers.headers[0]


def decoded(part):
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_mlflow_finds_the_plug_in():
    (found,) = importlib.metadata.entry_points(group="mlflow.request_auth_provider", name="domino")
    assert found.load() is DominoAuth


def test_both_headers_are_sent_with_every_request(monkeypatch):
    set_both(monkeypatch)
    sent = headers_sent()
    assert sent["X-Domino-Api-Key"] == KEY
    head, payload, signature = sent["X-Domino-Execution"].split(".")
    assert json.loads(decoded(head))["alg"] == "HS256"
    assert json.loads(decoded(payload)) == {"execution_id": RUN}
    assert decoded(signature) == hmac.digest(b"secret", f"{head}.{payload}".encode(), "sha256")


@pytest.mark.parametrize("value", [None, "", " "])
def test_each_header_is_of_its_variable(monkeypatch, value):
    def without(name):
        set_both(monkeypatch)
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        return dominos(headers_sent())

    assert without("DOMINO_RUN_ID") == ["X-Domino-Api-Key"]
    # A run alone proves nothing, and is in every run's environment.
    assert without("DOMINO_USER_API_KEY") == []


def test_a_bearer_token_and_the_run(monkeypatch):
    monkeypatch.setenv("DOMINO_RUN_ID", RUN)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tracking-token")
    sent = headers_sent()
    assert sent["Authorization"] == "Bearer tracking-token"
    assert dominos(sent) == ["X-Domino-Execution"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_dominos_own_proxy_in_a_run_adds_them_itself(monkeypatch, host):
    set_both(monkeypatch)
    assert not dominos(headers_sent(host))


def test_in_a_run_another_authentication_may_be_chosen(monkeypatch):
    monkeypatch.setenv("DOMINO_RUN_ID", RUN)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tracking-token")
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    MlflowCatalog("https://d")
    assert os.environ["MLFLOW_TRACKING_AUTH"] == "kubernetes"


def test_domino_headers_go_to_no_other_server(monkeypatch):
    """A notebook that has published asks another server by MLflow's own client."""
    set_both(monkeypatch)
    other = Answers(status=404)
    headers_sent()
    with answering_server(other) as uri, pytest.raises(MlflowException):
        MlflowClient(uri).get_experiment("1")
    assert other.headers
    assert not dominos(other.headers[0])


def test_a_client_that_did_not_ask_for_them_sends_none(monkeypatch):
    """The wheel is installed, and the variables are set: that alone is no reason."""
    set_both(monkeypatch)
    asked = Answers(status=404)
    with answering_server(asked) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(MlflowException):
            MlflowClient(uri).get_experiment("1")
    assert asked.headers
    assert not dominos(asked.headers[0])


@pytest.mark.parametrize(
    ("named", "asked", "sent"),
    [
        ("https://d", "https://d/api", True),
        ("https://d", "https://D:443/api", True),
        ("https://d:443/x", "https://d/api", True),
        ("https://d", "http://d/api", False),
        ("https://d", "https://d:8443/api", False),
        ("https://d", "https://d@other/api", False),
        ("https://d", "https://d.other/api", False),
        ("databricks", "https://d/api", False),
    ],
)
def test_domino_headers_go_to_one_origin_only(monkeypatch, named, asked, sent):
    set_both(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    request = DominoAuth().get_auth()(requests.Request("GET", asked).prepare())
    assert bool(dominos(request.headers)) is sent


def test_another_authentication_beside_them_is_a_matter_of_settings(monkeypatch):
    set_both(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    with pytest.raises(InvalidSettings, match="MLFLOW_TRACKING_AUTH"):
        MlflowCatalog("https://d")


def dominos(headers):
    return [name for name in headers if name.lower().startswith("x-domino")]


def test_mlflows_own_credential_still_works_beside_them(monkeypatch):
    set_both(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tracking-token")
    sent = headers_sent()
    assert sent["Authorization"] == "Bearer tracking-token"
    assert sent["X-Domino-Api-Key"] == KEY


def test_a_line_break_in_the_variable_is_no_second_header(monkeypatch):
    monkeypatch.setenv("DOMINO_USER_API_KEY", f"{KEY}\n")
    monkeypatch.setenv("DOMINO_RUN_ID", f"{RUN}\n")
    assert headers_sent()["X-Domino-Api-Key"] == KEY


def test_the_plug_in_loads_nothing_of_mlflow():
    script = "import sys, builder.domino; print(sorted({'mlflow', 'jwt', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
