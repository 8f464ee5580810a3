"""Domino's headers, as MLflow's own client sends them."""

from __future__ import annotations

import base64
import hmac
import importlib.metadata
import json
import subprocess
import sys

import pytest

from builder.errors import BuilderError
from builder.models.domino import DominoHeaders
from builder.models.mlflow_catalog import MlflowCatalog
from tests.models.http_answers import Answers, answering_server

KEY, RUN = "domino-api-key-0123456789", "65a1b2c3d4e5f60718293a4b"


def set_both(monkeypatch):
    monkeypatch.setenv("DOMINO_USER_API_KEY", KEY)
    monkeypatch.setenv("DOMINO_RUN_ID", RUN)


def headers_sent():
    answers = Answers(status=404)
    with answering_server(answers) as uri, pytest.raises(BuilderError):
        MlflowCatalog(uri).find("m", "1")
    return answers.headers[0]


def decoded(part):
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def test_mlflow_finds_the_plug_in():
    (found,) = importlib.metadata.entry_points(group="mlflow.request_header_provider", name="domino")
    assert found.load() is DominoHeaders


def test_both_headers_are_sent_with_every_request(monkeypatch):
    set_both(monkeypatch)
    sent = headers_sent()
    assert sent["X-Domino-Api-Key"] == KEY
    head, payload, signature = sent["X-Domino-Execution"].split(".")
    assert json.loads(decoded(head))["alg"] == "HS256"
    assert json.loads(decoded(payload)) == {"execution_id": RUN}
    assert decoded(signature) == hmac.digest(b"secret", f"{head}.{payload}".encode(), "sha256")


@pytest.mark.parametrize("missing", ["DOMINO_USER_API_KEY", "DOMINO_RUN_ID"])
@pytest.mark.parametrize("value", [None, "", " "])
def test_without_both_variables_there_is_neither_header(monkeypatch, missing, value):
    set_both(monkeypatch)
    if value is None:
        monkeypatch.delenv(missing)
    else:
        monkeypatch.setenv(missing, value)
    assert not [name for name in headers_sent() if name.lower().startswith("x-domino")]
    assert not DominoHeaders().in_context()


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
    script = "import sys, builder.models.domino; print(sorted({'mlflow', 'jwt', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
